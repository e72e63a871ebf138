"""
The course keeps its promise: for each row of docs/course.md the tests that guide fail while the
functions are blanked out, and pass when they are put back.

Each row is tried in a copy of the sources, two at a time.
"""
import ast
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
from conftest import REPO, copy_sources

INDENT = re.compile(" *")


class Assignment(NamedTuple):
    """A row of the table."""
    title: str
    functions: list  # as in MemoryBank.read
    file: str
    guide: list      # what stands behind `python -m pytest`: files, -k, an expression

    @property
    def files(self):
        return self.guide[:-2]

    @property
    def expression(self):
        return self.guide[-1]


def assignments(text):
    """The rows of the table in a text."""
    rows = re.findall(r"^\| ([^|`]+) \| (`[^|]+`) \| (\S+\.py) \| `([^|`]+)` \| .+ \|$", text, re.M)
    return [Assignment(title, re.findall(r"`([\w.]+)`", functions), file, shlex.split(guide))
            for title, functions, file, guide in rows]


COURSE = (REPO / "docs" / "course.md").read_text(encoding="utf-8")
ASSIGNMENTS = assignments(COURSE)
each_assignment = pytest.mark.parametrize("assignment", ASSIGNMENTS, ids=lambda a: a.title)


# --- To blank out, and to put back

def body_of(source, name):
    """
    The lines of a function's body, without its docstring: first (from 0), and behind the last.
    name: as in rotate, or MemoryBank.read
    """
    node = ast.parse(source)
    for part in name.split("."):
        found = [child for child in node.body if getattr(child, "name", "") == part]
        assert len(found) == 1, f"{name} is there {len(found)} times"
        node = found[0]
    assert isinstance(node, ast.FunctionDef), f"{name} is no function"
    assert ast.get_docstring(node), f"{name} has no docstring to work from"
    return node.body[0].end_lineno, node.end_lineno


def replace_body(source, name, body):
    """The source with other lines for a function's body, and the lines that were there."""
    lines = source.splitlines(keepends=True)
    first, end = body_of(source, name)
    return "".join(lines[:first] + body + lines[end:]), lines[first:end]


def blank_out(source, names):
    """The source without the bodies of functions, and {name: its body}."""
    bodies = {}
    for name in names:
        first, _ = body_of(source, name)
        indent = INDENT.match(source.splitlines()[first]).group()
        blank = [f"{indent}raise NotImplementedError\n"]
        source, bodies[name] = replace_body(source, name, blank)
    return source, bodies


def put_back(source, bodies):
    for name, body in bodies.items():
        source, _ = replace_body(source, name, body)
    return source


def signatures(source):
    """Name, arguments and docstring of all functions."""
    return [(node.name, ast.unparse(node.args), ast.get_docstring(node))
            for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]


# --- To run the tests that guide

class Outcome(NamedTuple):
    """What came of the tests that guide."""
    code: int     # exit code of pytest: 0 all passed, 1 some failed, all else: they did not run
    tests: dict   # {name of a test, with its file: why it failed, "" if it passed}
    output: str


def run_tests(folder, *args):
    """Run tests in a folder -> their Outcome"""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "--tb=line",
               f"--junitxml={report}", *args]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    tests = {}
    for case in ElementTree.parse(report).iter("testcase"):
        why = " ".join(str(child.get("message")) or child.tag for child in case)
        tests[f"{case.get('classname')}::{case.get('name')}"] = why
    return Outcome(done.returncode, tests, done.stdout[-3000:] + done.stderr[-3000:])


def try_blanked(assignment, folder):
    """
    Blank the functions of an assignment out in a copy, run the tests that guide, put the bodies
    back -> the Outcome, and whether the file is then as it was
    """
    copy_sources(folder)
    path = folder / assignment.file
    before = path.read_bytes()
    blank, bodies = blank_out(before.decode(), assignment.functions)
    path.write_bytes(blank.encode())
    outcome = run_tests(folder, *assignment.guide)
    path.write_bytes(put_back(path.read_bytes().decode(), bodies).encode())
    return outcome, path.read_bytes() == before


def try_whole(folder):
    """Run the tests that guide of all assignments, with nothing blanked out -> the Outcome"""
    copy_sources(folder)
    files = dict.fromkeys(file for assignment in ASSIGNMENTS for file in assignment.files)
    expression = " or ".join(f"({assignment.expression})" for assignment in ASSIGNMENTS)
    return run_tests(folder, *files, "-k", expression)


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """What came of all assignments: {title: (Outcome, file as before)}, the Outcome of the whole"""
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(try_whole, tmp_path_factory.mktemp("whole"))
        folders = [tmp_path_factory.mktemp("blanked") for _ in ASSIGNMENTS]
        blanked = pool.map(try_blanked, ASSIGNMENTS, folders)
        return dict(zip([a.title for a in ASSIGNMENTS], blanked)), whole.result()


# --- The promises

def test_the_table_has_nine_assignments_and_none_is_overlooked():
    table = [line for line in COURSE.splitlines() if line.startswith("|")]
    assert len(ASSIGNMENTS) == len(table) - 2 == 9


@each_assignment
def test_blanked_out_all_tests_that_guide_fail(assignment, tried):
    outcome, _ = tried[0][assignment.title]
    assert outcome.code == 1, f"the tests did not run:\n{outcome.output}"
    assert outcome.tests
    others = {test: why or "passed" for test, why in outcome.tests.items()
              if "NotImplementedError" not in why}
    assert not others, "these tests do not fail for what is blanked out"


@each_assignment
def test_every_word_of_the_expression_selects_a_test(assignment, tried):
    outcome, _ = tried[0][assignment.title]
    wanted = re.sub(r"\bnot \w+", "", assignment.expression)
    words = set(re.findall(r"\w+", wanted)) - {"and", "or"}
    assert words
    for word in words:
        assert any(word in test for test in outcome.tests), f"{word} selects nothing"


@each_assignment
def test_put_back_all_tests_that_guide_pass(assignment, tried):
    outcome, as_before = tried[0][assignment.title]
    assert as_before, f"{assignment.file} is not as it was"
    found = {test: tried[1].tests.get(test, "did not run") for test in outcome.tests}
    assert found and not any(found.values()), tried[1].output


@each_assignment
def test_signatures_and_docstrings_stay(assignment):
    before = (REPO / assignment.file).read_text(encoding="utf-8")
    blank, bodies = blank_out(before, assignment.functions)
    assert blank.count("raise NotImplementedError\n") == len(bodies) == len(assignment.functions)
    assert signatures(blank) == signatures(before)
