"""The README shows the code that is there."""
import re

from conftest import REPO

README = (REPO / "README.md").read_text()


def test_equations_stand_next_to_lines_of_the_model():
    section = README.split("## The equations and their lines")[1].split("\n## ")[0]
    rows = re.findall(r"^\|.*\| `(\w+)` \| `(.+)` \|$", section, re.M)
    source = (REPO / "lm2.py").read_text().split("class MemoryBank(")[1]
    assert len(rows) == 9
    for method, line in rows:
        assert line in source.split(f"def {method}(", 1)[1].split("\n    def ")[0], f"{method} has no line {line}"


def test_files_and_presets_it_names_are_there():
    for name in set(re.findall(r"\]\(([\w./]+)\)", README)) | set(re.findall(r"config/\w+\.toml", README)):
        assert (REPO / name).exists(), name


def test_assignments_name_functions_and_tests_that_exist():
    source = (REPO / "lm2.py").read_text() + (REPO / "train.py").read_text() + (REPO / "rmt.py").read_text()
    tests = "".join(path.read_text() for path in REPO.glob("tests/test_*.py"))
    rows = re.findall(r"^\| [\w: ]+ \| (`.+) \| (`.+) \|$", README.split("## Use it in a course")[1], re.M)
    assert len(rows) == 9
    for functions, guides in rows:
        for name in re.findall(r"`(?:\w+\.)?(\w+)`", functions):
            assert f"def {name}(" in source, name
        for name in re.findall(r"`(\w+)`", guides):
            assert re.search(rf"def test_\w*{name}", tests), name
