"""
The course keeps its promises: each row of docs/course.md is one call, in its hand-out the tests
that guide fail, and with the bodies put back it is the repository again; and the grader is fooled
by no submission that hangs, crashes or prints.

Hand-outs are tried one after another by forks of one process, which imports torch once for all. The
grader is tried on a course of one line, without torch.
"""
import csv
import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from typing import NamedTuple

import pytest
from conftest import REPO, is_one_line

import docs.grade
from docs.assignment import (
    ANSWERS,
    ANSWERS_HANDED_OUT,
    COURSE,
    assignments,
    blank_out,
    find,
    put_back,
    repository_files,
)
from docs.grade import COLUMNS, Outcome, read_report

PAGE = COURSE.read_text(encoding="utf-8")
ASSIGNMENTS = assignments()
LIMIT = 600  # seconds for the tests of an assignment
# reads pytest's arguments for each folder, as JSON
FORKS = f"""\
import json, os, signal, sys
import numpy, pytest, torch
for folder, args in json.load(sys.stdin).items():
    if os.fork() == 0:
        signal.alarm({LIMIT})
        os.chdir(folder)
        os._exit(pytest.main(["-n0", "--tb=line", "-p", "no:cacheprovider",
                              "--junitxml=report.xml", *args]))
    os.wait()
"""
# of each assignment a wrong solution that looks right, as pairs: what the right one has, and what
# the wrong one has instead
WRONG = {
    "rotary positions": [("1 - slowed * (1 - 1 / config.rope_factor)", "1")],
    "attention in a sliding window": [  # only full attention asks for the mask from outside
        ("def causal_mask(", "def own_mask("), ("causal_mask(n_first", "own_mask(n_first"),
        ("causal_mask(T", "own_mask(T")],
    "memory: read": [("self.w_out(E_mem).sigmoid()", "torch.ones_like(E_mem)")],
    "memory: gates": [("-log_gR.expm1() / (-z).sigmoid()",
                       "(1 - log_gR.exp()) / (1 - g_forget).clamp(min=1e-6)")],
    "memory: write": [("self.gates(C, C, repeats)", "self.gates(C, C)")],
    "from segments to a stream": [("return self.output_gate(E_mem) * E_mem,",
                                   "return torch.zeros_like(h),")],
    "sampling": [("x, state = step(token[:, None], state)",
                  "idx = torch.cat((idx, token[:, None]), 1); x, state = self.features(idx)")],
    "a recurrent rival: RMT": [("rope, layers)\n            skip", "rope, [])\n            skip")],
    "learning rate": [("max(0.0, 1 - step / (config.lr_decay_iters or config.max_iters))",
                       "1 - step / (config.lr_decay_iters or config.max_iters)")],
}
each_assignment = pytest.mark.parametrize("assignment", ASSIGNMENTS, ids=lambda a: a.title)


def section(text, heading):
    """What stands between a heading and the next one, in one line."""
    found = re.findall(rf"^##+ {re.escape(heading)}\n(.+?)(?=^##|\Z)", text, re.M | re.S)
    assert len(found) == 1, f"{heading} is there {len(found)} times"
    return " ".join(found[0].split())


def call_of(assignment):
    """What docs/course.md tells the teacher to call for a hand-out: arguments behind `python`."""
    calls = re.findall(r"`python (-m docs\.assignment [^`]+)`", section(PAGE, assignment.title))
    assert len(calls) == 1
    return shlex.split(calls[0])


# --- All hand-outs

class Tried(NamedTuple):
    """A hand-out."""
    said: str          # by the program that made it
    files: set         # all of its files, as paths from its root
    outcome: Outcome   # of the tests that guide, blanked out


def handed_out(assignment, checkout):
    """The folder of a hand-out."""
    return checkout.folder / call_of(assignment)[-1].removeprefix("--out=")


def hand_out_by_call(assignment, checkout):
    """Call what the page says in a checkout -> what it prints, and the folder of the hand-out"""
    _, program, *args = call_of(assignment)
    code, out, err = checkout.call(program, *args)
    assert (code, err) == (0, "")
    return out, handed_out(assignment, checkout)


def run_guides(folders):
    """Run the tests that guide, {folder: pytest's arguments} -> the Outcome of each, in order"""
    args = {str(folder): args for folder, args in folders.items()}
    done = subprocess.run([sys.executable, "-c", FORKS], input=json.dumps(args), text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    reports = [folder / "report.xml" for folder in folders]
    return [read_report(report) if report.exists() else Outcome({}, done.stderr or "no report")
            for report in reports]


def put_bodies_back(assignment, folder):
    """Put back what is blank in a hand-out."""
    _, bodies = blank_out((REPO / assignment.file).read_bytes().decode(), assignment.functions)
    file = folder / assignment.file
    file.write_bytes(put_back(file.read_bytes().decode(), bodies).encode())


@pytest.fixture(scope="module")
def tried(checkout):
    """What came of all assignments: {title: Tried}"""
    made = [hand_out_by_call(assignment, checkout) for assignment in ASSIGNMENTS]
    files = [{path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
             for _, folder in made]
    outcomes = run_guides({folder: assignment.pytest_args
                           for assignment, (_, folder) in zip(ASSIGNMENTS, made)})
    for assignment, (_, folder) in zip(ASSIGNMENTS, made):
        put_bodies_back(assignment, folder)
    return {assignment.title: Tried(said, files, outcome) for assignment, (said, _), files, outcome
            in zip(ASSIGNMENTS, made, files, outcomes)}


@pytest.fixture(scope="module")
def mistaken(tried, checkout):
    """The Outcome of the tests that guide, for each wrong solution: {title: Outcome}"""
    folders = {}
    for assignment in ASSIGNMENTS:
        folders[handed_out(assignment, checkout)] = ["--exitfirst", *assignment.pytest_args]
        text = (REPO / assignment.file).read_text(encoding="utf-8")
        for right, wrong in WRONG[assignment.title]:
            assert text.count(right) == 1
            text = text.replace(right, wrong)
        (handed_out(assignment, checkout) / assignment.file).write_text(text, encoding="utf-8")
    outcomes = run_guides(folders)
    for assignment in ASSIGNMENTS:
        shutil.copy(REPO / assignment.file, handed_out(assignment, checkout) / assignment.file)
    return {assignment.title: outcome for assignment, outcome in zip(ASSIGNMENTS, outcomes)}


def test_the_table_has_nine_assignments_and_none_is_overlooked():
    table = [line for line in PAGE.splitlines() if line.startswith("|")]
    assert len(ASSIGNMENTS) == len(table) - 2 == 9


@each_assignment
def test_handed_out_all_tests_that_guide_fail(assignment, tried):
    outcome = tried[assignment.title].outcome
    assert outcome.tests and not outcome.note
    others = {test: why or "passed" for test, why in outcome.tests.items()
              if "NotImplementedError" not in why}
    assert not others, "these tests do not fail for what is blanked out"


@each_assignment
def test_every_word_of_the_expression_selects_a_test(assignment, tried):
    wanted = re.sub(r"\bnot \w+", "", assignment.pytest_args[-1])
    words = set(re.findall(r"\w+", wanted)) - {"and", "or"}
    assert words
    for word in words:
        found = tried[assignment.title].outcome.tests
        assert any(word in test for test in found), f"{word} selects nothing"


@each_assignment
def test_put_back_a_hand_out_is_the_repository_again(assignment, tried, checkout):
    folder, files = handed_out(assignment, checkout), tried[assignment.title].files
    assert {path.as_posix() for path in repository_files(REPO)} - files == {"tests/test_course.py"}
    changed = {file for file in files if not file.startswith("results/")  # measured meanwhile
               and (folder / file).read_bytes() != (REPO / file).read_bytes()}
    assert changed == {ANSWERS.as_posix()}


@each_assignment
def test_a_wrong_solution_that_looks_right_does_not_pass(assignment, mistaken):
    outcome = mistaken[assignment.title]
    assert outcome.tests and not outcome.note
    assert any(outcome.tests.values()), "all tests that guide pass"


@each_assignment
def test_a_hand_out_has_no_answers_no_history_and_no_caches(assignment, tried):
    said, files, _ = tried[assignment.title]
    assert {"README.md", "train.py", "docs/course.md", "tests/conftest.py"} <= files
    assert not [file for file in files if file.endswith(".pyc") or file.startswith(".git/")]
    assert "tests/test_course.py" not in files
    assert f"python -m pytest {assignment.guide}\n" in said
    assert all(function in said for function in assignment.functions)


def test_a_hand_out_has_a_page_without_answers(tried, checkout):
    folder = handed_out(ASSIGNMENTS[0], checkout)
    assert (folder / ANSWERS).read_text() == ANSWERS_HANDED_OUT


@each_assignment
def test_signatures_and_docstrings_stay_and_comments_go(assignment):
    before = (REPO / assignment.file).read_text(encoding="utf-8")
    blank, bodies = blank_out(before, assignment.functions)
    assert blank.count("raise NotImplementedError\n") == len(bodies) == len(assignment.functions)
    kept = {line for line in blank.splitlines() if "#" in line}
    for body in bodies.values():
        assert not kept.intersection(line for line in body if "#" in line)
    left = iter(before.splitlines())  # all that is not of a body stands there, in the same order
    assert all(line in left for line in blank.splitlines() if "NotImplementedError" not in line)


@each_assignment
def test_every_assignment_says_what_it_teaches_and_has_a_question_with_an_answer(assignment):
    text = section(PAGE, assignment.title)
    assert "**Teaches** " in text and " Read " in text and assignment.hours > 0
    question = re.search(r"\*\*Discuss:\*\* (.+\?)", text)[1]
    asked, answer = re.fullmatch(r"\*(.+?\?)\* (.+)",
                                 section((REPO / ANSWERS).read_text(encoding="utf-8"),
                                         assignment.title)).groups()
    assert asked == question and len(answer) > 200


@each_assignment
def test_an_assignment_is_found_by_its_title_and_by_its_functions(assignment):
    assert find([assignment.title]) == find(assignment.title.split()) == assignment
    assert find(assignment.functions) == assignment
    assert all(find([function]) == assignment for function in assignment.functions)


def test_without_arguments_the_assignments_are_printed(call):
    code, out, err = call("docs.assignment")
    assert (code, err) == (0, "")
    for line, assignment in zip(out.splitlines(), ASSIGNMENTS, strict=True):
        assert line.startswith(assignment.title)
        assert f" {assignment.hours} h " in line and line.endswith(", ".join(assignment.functions))


@pytest.mark.parametrize("args, named", [
    (["MemoryBank.walk"], ["MemoryBank.walk", '"memory: gates"']),
    (["rotate", "draw_token"], ["rotate draw_token", "sampling"]),
    (["learning rate", "--out=full"], ["full", "--out"]),
    (["learning rate", "--out=full/notes.txt"], ["full/notes.txt", "--out"]),
    (["learning rate", "--out=full/notes.txt/a"], ["notes.txt"]),
    (["learning rate", "--outs=new"], ["--outs=new", "--out?"])])
def test_a_hand_out_that_cannot_be_made_is_refused_in_one_line(checkout, call, args, named):
    full = checkout.folder / "full"
    full.mkdir(exist_ok=True)
    (full / "notes.txt").write_text("mine")
    code, _, err = call("docs.assignment", *args)
    assert is_one_line(code, err, *named), err
    assert os.listdir(full) == ["notes.txt"] and (full / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("source, name, complaint", [
    ("def f():\n    '''a'''\n    return 1\n", "g", "g is there 0 times"),
    ("def f():\n    '''a'''\n    return 1\n" * 2, "f", "f is there 2 times"),
    ("def f():\n    return 1\n", "f", "f is no function with a docstring"),
    ("class f:\n    '''a'''\n    b = 1\n", "f", "f is no function with a docstring")])
def test_a_function_that_cannot_be_blanked_out_is_named(source, name, complaint):
    with pytest.raises(ValueError, match=f"^{complaint}"):
        blank_out(source, [name])


def test_a_blank_line_or_a_comment_behind_the_docstring_goes_too():
    body = "\n        # why\n        return 1\n"
    source = f'class A:\n    def f(self):\n        """a"""\n{body}\nb = 2\n'
    blank, bodies = blank_out(source, ["A.f"])
    assert blank == source.replace(body, "        raise NotImplementedError\n")
    assert put_back(blank, bodies) == source


def test_what_cannot_be_printed_is_told_in_one_line(checkout, monkeypatch):
    def no_room(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("docs.assignment.print", no_room, raising=False)
    code, _, err = checkout.call("docs.assignment", "learning rate", "--out=out/no_room")
    assert is_one_line(code, err, "No space left on device")


# --- The grader, on a course of one line

TOOLS = ("docs/__init__.py", "docs/assignment.py", "docs/grade.py", "lib/__init__.py",
         "lib/config.py", "data/__init__.py", "data/files.py")
RIGHT = 'def add(a, b):\n    """a + b"""\n    return a + b\n'
LITTLE = {
    ".gitignore": "out/\n__pycache__/\n",
    "docs/course.md": '| sums | 1 | `add` | sums.py | `tests/test_sums.py -k "add"` |\n',
    "sums.py": RIGHT,
    "tests/test_sums.py": """\
import pytest

import sums

@pytest.mark.parametrize("b", [0, 1, 2])
def test_add(b):
    assert sums.add(3, b) == 3 + b

def test_another():
    assert False
""",
}
# a child that outlives what has started it would go on to write
CHILD = """\
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", '''
import time
for _ in range(10_000):
    with open("HEART", "a") as f: f.write("x")
    time.sleep(0.05)
'''])
while not os.path.exists("HEART"): time.sleep(0.01)
"""
# a report like pytest's, wherever an argument of this process says that it goes
FORGED = """\
import glob, os, re, sys, tempfile
cases = "".join(f'<testcase classname="tests.test_sums" name="test_add[{b}]"/>' for b in range(3))
said = " ".join(map(str, [*sys.argv, *sys.orig_argv, *os.environ.values()]))
for path in re.findall(r"[^ '=]+\\.xml", said) + glob.glob(tempfile.gettempdir() + "/*/*.xml"):
    with open(path, "w") as f:
        f.write(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
os._exit(0)
"""
SUBMISSIONS = {  # {name: (file, its text, how many of three tests pass, what the note has)}
    "right": ("right.py", RIGHT, 3, ""),
    "folder": ("folder/sums.py", RIGHT, 3, ""),
    "loud": ("loud.py", "print('loud ' * 20_000_000)\n" + RIGHT, 3, ""),
    "half": ("half.py", "def add(a, b):\n    return a + min(b, 1)\n", 2, "test_add[2]: "),
    "blank": ("blank.py", "def add(a, b):\n    raise NotImplementedError\n", 0, "NotImplemented"),
    "typo": ("typo.py", "def add(a, b:\n", 0, "does not import: SyntaxError: "),
    "leaves": ("leaves.py", CHILD + "os._exit(0)\n", 0, "exit code 0"),
    "stops": ("stops.py", "raise SystemExit(0)\n", 0, "SystemExit"),
    "skips": ("skips.py", "import pytest\npytest.skip('', allow_module_level=True)\n", 0, "run"),
    "forges": ("forges.py", FORGED, 0, "exit code 0"),
    "other": ("other/lm2.py", RIGHT, 0, "has no sums.py"),
    "notes.txt": ("notes.txt", RIGHT, 0, "has no sums.py"),
}


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    """A repository with one function, its course and its submissions, without git."""
    folder = tmp_path_factory.mktemp("little")
    files = {f"in/{file}": text for file, text, *_ in SUBMISSIONS.values()}
    hangs = CHILD + "time.sleep(3600)\n"
    files |= {"in/.DS_Store": "", "slow/hangs.py": hangs, "slow/ok.py": RIGHT}
    for name, text in (LITTLE | files).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("HEART", f"{folder}/{path.name}.heart"))
    for name in TOOLS:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPO / name, folder / name)
    return folder


def run_program(folder, *args):
    """A program of a repository -> exit code, standard output, standard error"""
    done = subprocess.run([sys.executable, "-m", *args], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def grade_little(little, folder, out, *flags):
    """Grade submissions to the little course -> {name: row}, what was printed"""
    code, printed, err = run_program(little, "docs.grade", "sums", folder, f"--out={out}", *flags)
    assert (code, err) == (0, "")
    with open(little / out, newline="") as f:
        return {row["name"]: row for row in csv.DictReader(f)}, printed


@pytest.fixture(scope="module")
def graded(little):
    return grade_little(little, "in", "out/sums.csv")


@pytest.mark.parametrize("name", SUBMISSIONS)
def test_a_submission_counts_as_many_tests_as_it_passes(graded, name):
    rows, printed = graded
    row, (_, _, passed, note) = rows[name], SUBMISSIONS[name]
    assert tuple(row) == COLUMNS and int(row["seconds"]) >= 0
    assert (int(row["passed"]), int(row["failed"]), row["total"]) == (passed, 3 - passed, "3")
    assert note in row["note"] and bool(note) == bool(row["note"]) and len(row["note"]) <= 200
    assert f"{name}: {passed} of 3, " in printed


def test_there_is_a_row_for_each_submission_in_order(graded):
    assert list(graded[0]) == sorted(SUBMISSIONS)


def is_still(heart):
    """Whether the child of a submission has written, and writes no more."""
    size = heart.stat().st_size
    time.sleep(0.5)
    return 0 < size == heart.stat().st_size


def test_after_ctrl_c_the_grades_so_far_are_there(tmp_path, monkeypatch, capsys):
    def grade_once(assignment, submission, wanted, seconds):
        if submission.name == "b.py":
            raise KeyboardInterrupt
        return dict.fromkeys(COLUMNS, 1) | {"name": "a", "note": ""}

    for name in "ab":
        (tmp_path / f"{name}.py").touch()
    monkeypatch.setattr(docs.grade, "grade", grade_once)
    monkeypatch.setattr(docs.grade, "tests_to_pass", lambda *_: ["test"])
    out = tmp_path / "out" / "grades.csv"
    monkeypatch.setattr(sys, "argv", ["", "memory: gates", str(tmp_path), f"--out={out}"])
    with pytest.raises(SystemExit) as stop:
        docs.grade.main()
    assert stop.value.code == 130 and out.read_text().splitlines()[1].startswith("a,")


def test_a_submission_that_hangs_is_stopped_and_costs_only_itself(little):
    for limit in (5, 60, 600):  # on a busy machine it takes more than 5 s until it hangs
        with suppress(AssertionError):  # not even the teacher's own file was in time
            rows, _ = grade_little(little, "slow", f"out/{limit}.csv", f"--seconds={limit}")
            if (little / "hangs.py.heart").exists() and rows["ok"]["passed"] == "3":
                break
    assert [row["passed"] for row in rows.values()] == ["0", "3"]
    assert rows["hangs"]["note"] == f"timed out after {limit} s"
    assert is_still(little / "hangs.py.heart")


def test_what_a_submission_has_started_ends_with_it(graded, little):
    assert is_still(little / "leaves.py.heart")


def test_grades_are_not_written_over(graded, little):
    before = (little / "out/sums.csv").read_bytes()
    code, _, err = run_program(little, "docs.grade", "sums", "in", "--out=out/sums.csv")
    assert is_one_line(code, err, "out/sums.csv", "--out")
    assert (little / "out/sums.csv").read_bytes() == before


def test_where_the_teachers_own_file_fails_nothing_is_graded(little, tmp_path):
    broken = shutil.copytree(little, tmp_path / "broken", ignore=shutil.ignore_patterns("out"))
    (broken / "sums.py").write_text(SUBMISSIONS["half"][1])
    code, out, err = run_program(broken, "docs.grade", "sums", "in")
    assert is_one_line(code, err, "sums.py", "test_add[2]", "--seconds") and not out
    assert not list(broken.glob("out/*"))


def test_a_test_that_is_reported_twice_fails_if_it_fails_once(tmp_path):
    case = '<testcase classname="t" name="a">{}</testcase>'
    once, problem = case.format(""), case.format('<error message="why"/>')
    printed = case.format("<system-out>loud</system-out>")
    for cases, why in ((once + problem, "why"), (problem + once, "why"), (printed, "")):
        (tmp_path / "report.xml").write_text(f"<testsuite>{cases}</testsuite>")
        assert read_report(tmp_path / "report.xml") == ({"t::a": why}, "")


def test_a_hand_out_can_come_back_as_a_submission(tried, checkout):
    assignment = find(["learning rate"])
    submitted = checkout.folder / "submitted" / "anna"
    shutil.copytree(handed_out(assignment, checkout), submitted)
    code, out, err = checkout.call("docs.grade", "learning rate", "submitted", "--out=rate.csv")
    assert (code, err) == (0, "") and re.fullmatch(r"anna: 1 of 1, \d+ s\nrate.csv\n", out)


@pytest.mark.parametrize("args, named", [
    ([], ["docs.grade"]), (["memory: gates"], ["docs.grade"]),
    (["walk", "empty"], ["walk", '"memory: gates"']),
    (["memory: gates", "none"], ["none"]), (["memory: gates", "empty"], ["empty", "NAME.py"]),
    (["memory: gates", "empty", "--seconds=0"], ["seconds=0"]),
    (["memory: gates", "empty", "--seconds=soon"], ["seconds=soon"]),
    (["memory: gates", "empty", "--out=play.txt"], ["play.txt", "--out"])])
def test_what_cannot_be_graded_is_refused_in_one_line(checkout, call, args, named):
    (checkout.folder / "empty").mkdir(exist_ok=True)
    before = (checkout.folder / "play.txt").read_bytes()
    code, out, err = call("docs.grade", *args)
    assert is_one_line(code, err, *named) and not out, err
    assert (checkout.folder / "play.txt").read_bytes() == before
