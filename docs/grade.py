"""
Grade the submissions of an assignment of docs/course.md by the tests that guide:

    python -m docs.grade "memory: gates" submissions --out=out/gates.csv

A submission is a file NAME.py, or a folder NAME with the file at its place (NAME/lm2.py). It
replaces that file in a fresh copy of this repository. The tests run there in a process of their
own, which is killed after --seconds. They run the student's code with your rights.
"""
import csv
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data.files import atomic_open
from docs.assignment import ROOT, copy_repository, find
from lib.config import at_least, parse, user_errors

COLUMNS = ("name", "passed", "failed", "total", "seconds", "note")
NOTE_LENGTH = 200  # characters


@dataclass
class GradeConfig:
    what: list = field(default_factory=list)  # the assignment, and the folder of submissions
    seconds: int = 300  # what a submission may take
    # files
    out: str = "out/grades.csv"  # CSV file to write, a new one

    def __post_init__(self):
        at_least(self, 1, "seconds")
        if len(self.what) < 2:
            raise ValueError("name an assignment and a folder: "
                             'python -m docs.grade "memory: gates" submissions')


# --- To run tests

class Outcome(NamedTuple):
    """What came of tests."""
    tests: dict  # {name of a test, with its file: why it failed, "" if it passed}
    note: str    # why they did not run, "" if they did


def run_tests(folder, args, seconds):
    """
    Run pytest in a folder, for so many seconds at most -> its Outcome. What it prints is dropped.
    """
    with tempfile.TemporaryDirectory() as secret:
        # where the report goes stands neither in the sources nor in the arguments of the process,
        # lest a submission write one itself
        report = Path(secret) / f"{secrets.token_hex(8)}.xml"
        args = ["-n0", "-s", "--tb=line", "-p", "no:cacheprovider", f"--junitxml={report}", *args]
        process = subprocess.Popen(
            [sys.executable, "-"], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True)
        program = f"import pytest, sys\nsys.exit(pytest.main({args!r}))"
        try:
            process.communicate(program.encode(), timeout=seconds)
            return read_report(report)
        except subprocess.TimeoutExpired:
            return Outcome({}, f"timed out after {seconds} s")
        except (OSError, ElementTree.ParseError):
            return Outcome({}, f"ended before its tests did, exit code {process.returncode}")
        finally:
            kill(process)


def kill(process):
    """Kill a process, and all that it has started and that still runs."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):  # nothing of it runs any more
            os.killpg(process.pid, signal.SIGKILL)
    else:  # Windows
        process.kill()
    process.wait()


def read_report(path):
    """pytest's report -> an Outcome. Raises OSError or ElementTree.ParseError."""
    tests, note = {}, ""
    for case in ElementTree.parse(path).iter("testcase"):
        name, why = f"{case.get('classname')}::{case.get('name')}", ""
        for problem in case:
            if problem.tag in ("failure", "error", "skipped"):
                why = problem.get("message") or problem.tag
            if why in ("collection failure", "internal error"):  # as pytest calls them
                *_, last = f"{why}\n{problem.text}".strip().splitlines()
                note = f"does not import: {last.removeprefix('E').strip()}"
        tests[name] = tests.get(name) or why  # a test that ends with an error is there twice
    return Outcome(tests, note)


# --- To grade

def try_file(assignment, path, seconds):
    """The Outcome of the tests that guide, with a file instead of that of the assignment."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy_repository(Path(folder))
        shutil.copyfile(path, Path(folder) / assignment.file)
        return run_tests(folder, assignment.pytest_args, seconds)


def tests_to_pass(assignment, seconds):
    """The names of the tests that guide. Raises ValueError where they fail with your own file."""
    outcome = try_file(assignment, ROOT / assignment.file, seconds)
    failed = [f"{test}: {why}" for test, why in outcome.tests.items() if why]
    if outcome.note or failed or not outcome.tests:
        reason = outcome.note or next(iter(failed), "none ran; does git know their files?")
        raise ValueError(f"your own {assignment.file} does not pass the tests that guide "
                         f"({reason}): mend it, or give it more --seconds")
    return list(outcome.tests)


def grade(assignment, submission, wanted, seconds):
    """The row of a submission, {column: value}. wanted: the names of the tests it has to pass."""
    path = submission / assignment.file if submission.is_dir() else submission
    start = time.monotonic()
    if path.is_file() and path.suffix == ".py" and os.access(path, os.R_OK):
        outcome = try_file(assignment, path, seconds)
    else:
        outcome = Outcome({}, f"has no {assignment.file} that can be read")
    failed = {test: outcome.tests.get(test, "did not run") for test in wanted}
    failed = {test: why for test, why in failed.items() if why}
    note = outcome.note
    if failed and not note:
        test, why = next(iter(failed.items()))
        note = f"{test.split('::')[-1]}: {why}"
    values = (submission.name.removesuffix(".py"), len(wanted) - len(failed), len(failed),
              len(wanted), round(time.monotonic() - start), " ".join(note.split())[:NOTE_LENGTH])
    return dict(zip(COLUMNS, values))


def submissions_in(folder):
    """The files and folders in a folder, without hidden ones. Raises ValueError or OSError."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder: name the one with the submissions")
    found = sorted(path for path in Path(folder).iterdir() if not path.name.startswith((".", "__")))
    if not found:
        raise ValueError(f"{folder} has no submissions: put files NAME.py or folders NAME into it")
    return found


def write_grades(path, rows):
    """Write the rows so far. Raises OSError."""
    with atomic_open(path, "w", encoding="utf-8", errors="replace", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main():
    config, _ = parse(GradeConfig, __doc__)
    with user_errors():
        if Path(config.out).exists():
            raise ValueError(f"{config.out} is there already: name another file with --out")
        *words, folder = config.what
        assignment, submissions = find(words), submissions_in(folder)
        wanted = tests_to_pass(assignment, config.seconds)
        rows = []
        write_grades(config.out, rows)  # what cannot be written is told at once
        for submission in submissions:
            row = grade(assignment, submission, wanted, config.seconds)
            rows.append(row)
            write_grades(config.out, rows)
            print(f"{row['name']}: {row['passed']} of {row['total']}, {row['seconds']} s"
                  f"{row['note'] and ': '}{row['note']}", flush=True)
    print(config.out)


if __name__ == "__main__":
    main()
