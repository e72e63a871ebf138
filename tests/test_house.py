"""
The house keeps its order: imports go down only, and no file outgrows its budget.

    tests -> programs (*.py at the top level) -> lib -> baselines, data -> lm2.py

Each check returns its complaints, which name the file. The checks are tried on a broken house, too.
"""
import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docs.assignment import repository_files

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {"lm2.py": 0, "baselines": 1, "data": 1, "lib": 2, "programs": 3, "docs": 3,
          "tests": 4}
MAX_COLUMNS = 100
MAX_LINES = {"lm2.py": 520, "train.py": 350}
MAX_LINES_ELSEWHERE = 400
README_LINES, README_BYTES = 180, 14_336
TOP_LEVEL_ENTRIES = 20


# --- What belongs to the house: what a hand-out of the course has

def python_files(root):
    return [path for path in repository_files(root) if path.suffix == ".py"]


def text_of(root, path):
    return (root / path).read_text(encoding="utf-8")


# --- Imports

def imported_names(source):
    """
    The dotted names that a source imports, in functions too: `from data.text import windows` is
    "data.text" and "data.text.windows", since that may be a file as well; `from . import text` is
    "." and ".text".
    """
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            inside = f"{module}." if node.module else module
            names += [module, *(inside + alias.name for alias in node.names)]
    return names


def file_of(name, importer, files):
    """The file of the house that a dotted name means in the file that imports it, or None."""
    dots = len(name) - len(name.lstrip("."))
    if dots:
        folders = [importer.parents[dots - 1]]
    else:
        folders = [Path("."), importer.parent, Path("tests")]
    parts = [part for part in name.split(".") if part]
    for folder in folders:
        package = folder.joinpath(*parts, "__init__.py")
        module = folder.joinpath(*parts[:-1], f"{parts[-1]}.py") if parts else package
        for path in (module, package):
            if path in files and path != importer:
                return path
    return None


def imports(root):
    """{file: the files of the house that it imports}"""
    files = python_files(root)
    graph = {}
    for path in files:
        found = [file_of(name, path, files) for name in imported_names(text_of(root, path))]
        graph[path] = [other for other in dict.fromkeys(found) if other]
    return graph


def room(path):
    """Where a file lives: its folder, "programs" for the top level, and lm2.py for itself."""
    if path == Path("lm2.py"):
        return "lm2.py"
    return path.parts[0] if len(path.parts) > 1 else "programs"


def imports_upwards(root):
    complaints = []
    for path, others in imports(root).items():
        if room(path) not in FLOORS:
            complaints.append(f"{path}: the folder {room(path)} has no floor in FLOORS")
            continue
        for other in others:
            sideways = room(path) == room(other)
            down = FLOORS.get(room(other), 0) < FLOORS[room(path)]
            if not (sideways or down):
                complaints.append(f"{path} imports {other}: imports go down only")
    return complaints


def circles(root):
    """Imports that come back to where they began."""
    graph = imports(root)
    complaints, done = [], set()

    def follow(path, trail):
        if path in trail:
            circle = trail[trail.index(path):] + [path]
            complaints.append("a circle of imports: " + " imports ".join(map(str, circle)))
        elif path not in done:
            for other in graph[path]:
                follow(other, trail + [path])
            done.add(path)

    for path in graph:
        follow(path, [])
    return complaints


def imports_of_the_model(root):
    """lm2.py needs torch and Python, nothing else."""
    names = {name.split(".")[0] for name in imported_names(text_of(root, "lm2.py"))}
    foreign = sorted(names - sys.stdlib_module_names - {"torch"})
    return [f"lm2.py imports {name or '.'}: it needs torch and Python alone" for name in foreign]


# --- Budgets

def long_lines(root):
    complaints = []
    for path in python_files(root):
        for number, line in enumerate(text_of(root, path).splitlines(), 1):
            columns = len(line)
            if columns > MAX_COLUMNS:
                complaints.append(f"{path}:{number} has {columns} columns, more than {MAX_COLUMNS}")
    return complaints


def long_files(root):
    complaints = []
    for path in python_files(root):
        allowed = MAX_LINES.get(str(path), MAX_LINES_ELSEWHERE)
        lines = len(text_of(root, path).splitlines())
        if room(path) != "tests" and lines > allowed:
            complaints.append(f"{path} has {lines} lines, more than {allowed}")
    return complaints


def long_readme(root):
    readme = (root / "README.md").read_bytes()
    lines = len(readme.splitlines())
    complaints = []
    if lines > README_LINES:
        complaints.append(f"README.md has {lines} lines, more than {README_LINES}")
    if len(readme) > README_BYTES:
        complaints.append(f"README.md has {len(readme)} bytes, more than {README_BYTES}")
    return complaints


def crowded_top_level(root):
    """What `ls` shows: hidden files do not count."""
    entries = sorted({path.parts[0] for path in repository_files(root)})
    entries = [entry for entry in entries if not entry.startswith(".")]
    if len(entries) <= TOP_LEVEL_ENTRIES:
        return []
    listed = ", ".join(entries)
    return [f"the top level has {len(entries)} entries, more than {TOP_LEVEL_ENTRIES}: {listed}"]


# --- The promises

CHECKS = (imports_upwards, circles, imports_of_the_model, long_lines, long_files, long_readme,
          crowded_top_level)


@pytest.mark.parametrize("check", CHECKS)
def test_house_is_in_order(check):
    complaints = check(ROOT)
    assert not complaints, "\n".join(complaints)


def test_all_floors_are_looked_at():
    files = python_files(ROOT)
    assert {room(path) for path in files} == set(FLOORS)
    graph = imports(ROOT)
    assert Path("lm2.py") in graph[Path("lib/checkpoint.py")]
    assert Path("lib/checkpoint.py") in graph[Path("train.py")]


HOUSE = (
    "README.md", "lm2.py", "train.py", "sample.py", "lib/__init__.py", "lib/config.py",
    "lib/optim.py", "data/__init__.py", "data/babi.py", "data/files.py", "data/text.py",
    "baselines/rmt.py", "docs/page.md", "tests/conftest.py",
)


@pytest.fixture
def house(tmp_path):
    """A small house in order, all its files empty, without git."""
    (tmp_path / ".gitignore").write_text("out/\ndata/*/\n__pycache__/\n*.tmp\n")
    write_files(tmp_path, dict.fromkeys(HOUSE, ""))
    assert [check(tmp_path) for check in CHECKS] == [[]] * len(CHECKS)
    return tmp_path


def write_files(root, files):
    """Write files, {path: text}, into a folder."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


WIDE = "x = " + "1" * 97


@pytest.mark.parametrize("check, files, complaint", [
    (imports_upwards, {"data/text.py": "from lib import config"},
     "data/text.py imports lib/config.py"),
    (imports_upwards, {"data/text.py": "def late():\n    from baselines.rmt import RMT"},
     "data/text.py imports baselines/rmt.py"),
    (imports_upwards, {"baselines/rmt.py": "import data.babi"},
     "baselines/rmt.py imports data/babi.py"),
    (imports_upwards, {"lib/optim.py": "from train import main"}, "lib/optim.py imports train.py"),
    (imports_upwards, {"train.py": "from conftest import TEXT"},
     "train.py imports tests/conftest.py"),
    (imports_upwards, {"lm2.py": "import train"}, "lm2.py imports train.py"),
    (imports_upwards, {"shop/till.py": "import lm2"}, "shop/till.py: the folder shop has no floor"),
    (circles, {"data/text.py": "from data.files import x", "data/files.py": "from . import text"},
     "data/files.py imports data/text.py imports data/files.py"),
    (circles, {"train.py": "import sample", "sample.py": "import train"},
     "sample.py imports train.py imports sample.py"),
    (imports_of_the_model, {"lm2.py": "import math, numpy.linalg"}, "lm2.py imports numpy"),
    (imports_of_the_model, {"lm2.py": "from lib.optim import Muon"}, "lm2.py imports lib"),
    (long_lines, {"tests/conftest.py": WIDE}, "tests/conftest.py:1 has 101 columns"),
    (long_files, {"lm2.py": "\n" * 521}, "lm2.py has 521 lines"),
    (long_files, {"train.py": "\n" * 351}, "train.py has 351 lines"),
    (long_files, {"lib/config.py": "\n" * 401}, "lib/config.py has 401 lines"),
    (long_readme, {"README.md": "\n" * 181}, "README.md has 181 lines"),
    (long_readme, {"README.md": "x" * 14_337}, "README.md has 14337 bytes"),
    (crowded_top_level, {f"program{i}.py": "" for i in range(12)}, "21 entries"),
])
def test_what_breaks_the_house_is_named(house, check, files, complaint):
    write_files(house, files)
    assert complaint in "\n".join(check(house))


@pytest.mark.parametrize("files", [
    {"lm2.py": "import torch.nn as nn\nfrom math import pi"},
    {"lib/config.py": "import lm2\nfrom data import text\nfrom lib import optim"},
    {"tests/conftest.py": "import train\nfrom lib import optim", "train.py": "import lm2"},
    {"tests/conftest.py": "\n" * 2000, "lm2.py": "\n" * 520, "train.py": "x" * 100},
])
def test_what_the_house_allows_is_not_complained_of(house, files):
    write_files(house, files)
    assert not sum((check(house) for check in CHECKS), [])


def test_what_git_ignores_does_not_belong_to_the_house(house):
    ignored = ("out/run/wide.py", "data/play/wide.py", "lib/__pycache__/wide.py", "x.tmp")
    write_files(house, dict.fromkeys(ignored, WIDE))
    assert {str(path) for path in repository_files(house)} == {*HOUSE, ".gitignore"}


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git")
def test_with_git_what_it_tracks_belongs_to_the_house(house):
    write_files(house, {"notes.py": WIDE})
    subprocess.run(["git", "init", "--quiet"], cwd=house, check=True)
    subprocess.run(["git", "add", *HOUSE], cwd=house, check=True)
    assert {str(path) for path in repository_files(house)} == set(HOUSE)
