"""lib/programs.py: programs that compare.py runs; tests/test_compare.py stops and kills them."""
import os

import pytest

from lib import programs
from lib.programs import Failed, Programs, locked


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run the source of a program -> what it said, behind the line that says what was called."""
    monkeypatch.setattr(programs, "POLL", 0.02)

    def call(source, threads=1):
        (tmp_path / "program.py").write_text(source)
        output = tmp_path / "said.txt"
        with locked(tmp_path / "run") as lock:
            Programs(threads).call(tmp_path / "program.py", ["--seed=1"], output, lock)
        called, *said = output.read_text().splitlines()
        assert called == f"{tmp_path / 'program.py'} --seed=1"
        return "\n".join(said)
    return call


def test_jobs_share_the_cores_unless_the_user_says_how_many_threads(call, monkeypatch):
    source = "import os; print(os.environ['OMP_NUM_THREADS'])"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert call(source, threads=3) == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert call(source, threads=3) == "1"


def test_a_bar_does_not_fill_the_file_of_what_a_program_says(call):
    source = ("import time\nfrom tqdm import tqdm\n"
              "with tqdm(total=9, disable=False) as bar:\n"
              "    for _ in range(9): time.sleep(0.12); bar.update()")
    assert call(source).count("%") == 2, "at the start and at the end"


@pytest.mark.parametrize("source, reason", [
    ("raise SystemExit('error: no text')", "^error: no text .all of it: .*said.txt"),
    ("import sys; sys.exit(2)", "^it said nothing"),
    ("import os; print('so far', flush=True); os.kill(os.getpid(), 9)", "^signal 9: so far")])
def test_a_program_that_fails_is_named_with_its_last_line(call, source, reason):
    with pytest.raises(Failed, match=reason):
        call(source)


def test_a_run_is_locked_once(tmp_path):
    with locked(tmp_path), pytest.raises(Failed, match="another compare.py works on"):
        with locked(tmp_path):
            pass
    with locked(tmp_path) as lock:
        copy = os.dup(lock.fileno())  # like that of a process that is just being started
    with locked(tmp_path):
        pass
    os.close(copy)
