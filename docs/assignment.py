"""
Hand out an assignment of docs/course.md: a copy of this repository in which functions are blank.

    python -m docs.assignment                                   # the assignments
    python -m docs.assignment "memory: gates" --out=out/gates
    python -m docs.assignment MemoryBank.gates --out=out/gates  # the same, by one of its functions

Signatures and docstrings stay. It prints which tests guide the student. docs/grade.py grades.
"""
import ast
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from data.files import read_utf8
from lib.config import parse, user_errors

ROOT = Path(__file__).resolve().parent.parent
COURSE = ROOT / "docs" / "course.md"
ANSWERS = Path("docs", "instructors.md")
ANSWERS_HANDED_OUT = "# For instructors\n\nThis page is left out of a hand-out.\n"
ROW = re.compile(r"^\| ([^|`]+) \| (\d+) \| (`[^|]+`) \| (\S+\.py) \| `([^|`]+)` \|$", re.M)


@dataclass
class AssignmentConfig:
    assignment: list = field(default_factory=list)  # a title in docs/course.md, or a function there
    # files
    out: str = "out/handout"  # folder of the hand-out: a new one, or an empty one


# --- The table of docs/course.md

class Assignment(NamedTuple):
    """A row of the table."""
    title: str
    hours: int
    functions: list  # as in MemoryBank.read
    file: str
    guide: str       # what stands behind `python -m pytest`: files, -k, an expression

    @property
    def pytest_args(self):
        return shlex.split(self.guide)


def assignments():
    """All rows of the table. Raises OSError."""
    return [Assignment(title, int(hours), re.findall(r"`([\w.]+)`", functions), file, guide)
            for title, hours, functions, file, guide in ROW.findall(read_utf8(COURSE))]


def find(words):
    """
    The assignment that is meant: by its title, in one word or several, or by one or several of its
    functions. Raises ValueError where there is none, or OSError.
    """
    known = assignments()
    for assignment in known:
        if " ".join(words) == assignment.title or set(words) <= set(assignment.functions):
            return assignment
    titles = ", ".join(f'"{assignment.title}"' for assignment in known)
    raise ValueError(f'"{" ".join(words)}" is no assignment: use {titles}, or a function of one')


# --- To blank out, and to put back

def body_of(source, name):
    """
    The body of a function behind its docstring: its first line (from 0), the line behind its last,
    and how far it is indented. name: as in rotate, or MemoryBank.read. Raises ValueError.
    """
    node = ast.parse(source)
    for part in name.split("."):
        found = [child for child in node.body if getattr(child, "name", "") == part]
        if len(found) != 1:
            raise ValueError(f"{name} is there {len(found)} times: name a function that is there "
                             "once")
        node = found[0]
    if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node):
        raise ValueError(f"{name} is no function with a docstring to work from: write one")
    return node.body[0].end_lineno, node.end_lineno, node.body[0].col_offset


def replace_body(source, name, body):
    """The source with other lines for a function's body, and the lines that were there."""
    lines = source.splitlines(keepends=True)
    first, end, _ = body_of(source, name)
    return "".join(lines[:first] + body + lines[end:]), lines[first:end]


def blank_out(source, names):
    """The source without the bodies of functions, and {name: its body}. Raises ValueError."""
    bodies = {}
    for name in names:
        _, _, indent = body_of(source, name)
        blank = [" " * indent + "raise NotImplementedError\n"]
        source, bodies[name] = replace_body(source, name, blank)
    return source, bodies


def put_back(source, bodies):
    """The source with the bodies that blank_out took away."""
    for name, body in bodies.items():
        source, _ = replace_body(source, name, body)
    return source


# --- Copies of the repository

def repository_files(root):
    """The files of a checkout, as paths from its root: what git tracks, or what is not ignored."""
    paths = tracked_files(root)
    if not paths:  # a copy without git
        patterns = [".git/", *(root / ".gitignore").read_text().split()]
        paths = [path.relative_to(root) for path in root.rglob("*")]
        paths = [path for path in paths if not is_ignored(path, patterns)]
    return sorted(path for path in paths if (root / path).is_file())


def tracked_files(root):
    """What git tracks; nothing where there is no .git, or no git."""
    if not ((root / ".git").exists() and shutil.which("git")):
        return []
    git = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    return [Path(name) for name in git.stdout.split("\0") if name]


def is_ignored(path, patterns):
    """Does a file match a line of .gitignore? out/ and data/*/ name folders, *.tmp names files."""
    for pattern in patterns:
        places = path.parents if pattern.endswith("/") else (path, *path.parents)
        pattern = pattern.rstrip("/")
        if any(fnmatch(str(place) if "/" in pattern else place.name, pattern) for place in places):
            return True
    return False


def copy_repository(folder):
    """Copy the files of this repository, without its history, into a folder. Raises OSError."""
    for path in repository_files(ROOT):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)


def hand_out(assignment, folder):
    """
    Write the hand-out of an assignment into a folder. The answers to the questions are not in it,
    nor the test of the course, which fails where a function is blank. Raises ValueError or OSError.
    """
    source = (ROOT / assignment.file).read_bytes().decode()  # ends of lines as they are
    blank, _ = blank_out(source, assignment.functions)
    copy_repository(folder)
    (folder / assignment.file).write_bytes(blank.encode())
    (folder / ANSWERS).write_text(ANSWERS_HANDED_OUT)  # so that no link to it is dead
    (folder / "tests" / "test_course.py").unlink(missing_ok=True)


# --- The program

@user_errors(OSError)
def main():
    config, _ = parse(AssignmentConfig, __doc__)
    with user_errors():
        if not config.assignment:
            for each in assignments():
                print(f"{each.title:<32} {each.hours} h   {', '.join(each.functions)}")
            return
        assignment, folder = find(config.assignment), Path(config.out)
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise ValueError(f"{folder} is there and is not an empty folder: name another one "
                             "with --out")
        hand_out(assignment, folder)
    print(f"{folder}: blank in {assignment.file}: {', '.join(assignment.functions)} "
          f"(about {assignment.hours} h)\n"
          f"the tests that guide, to be called there: python -m pytest {assignment.guide}")


if __name__ == "__main__":
    main()
