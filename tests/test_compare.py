"""
compare.py: rows x seeds -> results. Rows whose `code` is a folder with two quick programs stand for
training and asking; one test runs the real ones.
"""
import csv
import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing import get_context
from unittest.mock import patch

import pytest
from conftest import REPO, SMALL, is_one_line

import compare
from lib import experiment as ex
from lib import measured, programs
from lib.origin import commit

TRAIN = '''
import json, pathlib, signal, sys, time
flags = dict(word.removeprefix("--").partition("=")[::2] for word in sys.argv[1:])
out = pathlib.Path(flags["out_dir"])
with open(out.parent / "calls.txt", "a") as f:
    f.write("train " + " ".join(sys.argv[1:]) + "\\n")
if "match_params" in flags:
    assert (pathlib.Path(flags["match_params"]) / "config.json").exists()
if "init_from" in flags:
    assert (pathlib.Path(flags["init_from"]) / "best.pt").exists()
if "fail" in flags:
    sys.exit("error: fail=1 was asked for")
stopped = []
signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
log = out / "log.csv"
begin = len(log.read_text().splitlines()) - 1 if "resume" in flags else 0
if not begin:
    (out / "config.json").write_text(json.dumps({"parameters": 1000, "train": {
        "max_iters": 4, "batch_size": 9, "device": "cpu", "dtype": "float32",
        "slow": "slow" in flags}}))  # as many texts a step as no preset has
    log.write_text("step,val_loss,accuracy\\n")
slow = json.loads((out / "config.json").read_text())["train"]["slow"]
for step in range(begin, 5):
    waits = slow and step == 2 and "resume" not in flags
    end = time.monotonic() + 60 * waits
    while time.monotonic() < end and not stopped and not (out.parent / "release").exists():
        time.sleep(0.01)
    (out / "ckpt.pt").touch()
    if stopped:
        break
    with log.open("a") as f:
        f.write(f"{step},{1 - step / 10},{step / 4}\\n")
    if step == 4:
        (out / "best.pt").touch()
'''
EVAL = '''
import csv, pathlib, sys
run, *words = sys.argv[1:]
flags = dict(word.removeprefix("--").partition("=")[::2] for word in words)
out = pathlib.Path(flags["out_dir"])
with open(pathlib.Path(run).parent / "calls.txt", "a") as f:
    f.write("ask " + " ".join(sys.argv[1:]) + "\\n")
out.mkdir(exist_ok=True)
path, n = out / "results.csv", int(flags["n_samples"])
columns = "task,length,n,right,answers,commit,device,dtype,torch".split(",")
if not path.exists():
    path.write_text(",".join(columns) + "\\n")
with path.open("a", newline="") as f:
    for task in flags["tasks"].split(","):
        answers = "1" + "0" * (n - 1)
        cells = [task, flags["lengths"], n, 1, answers, "abc", "cpu", "float32", "2"]
        csv.writer(f).writerow(cells)
'''
HEAD = """
title = "Which is better?"
preset = "config/babilong_qa1.toml"
seeds = [1, 2]
tasks = "qa1,qa2"
ask = { "0k,1k" = 4 }
measure = ["val_loss"]
until = { accuracy = 0.5 }
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A folder with the quick programs, and an experiment of three rows."""
    monkeypatch.setattr(programs, "POLL", 0.02)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick/train.py").write_text(TRAIN)
    (tmp_path / "quick/eval_babilong.py").write_text(EVAL)
    return Lab(tmp_path)


class Lab:
    def __init__(self, folder):
        self.folder = folder
        self.write('[[row]]\nname = "base"', '[[row]]\nname = "wide"\nmatch = "base"',
                   '[[row]]\nname = "asked otherwise"\nrun_of = "wide"\nask_flags = "--rag=10"')

    def write(self, *rows, head=HEAD):
        code = 'code = "quick"\n'
        text = head + "\n".join(f"{row}\n{'' if 'run_of' in row else code}" for row in rows)
        (self.folder / "mine.toml").write_text(text)

    def call(self, capsys, monkeypatch, *flags):
        """compare.py in this process -> exit code, standard output, standard error"""
        handler = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(sys, "argv", ["compare.py", "mine.toml", *flags])
        capsys.readouterr()
        try:
            compare.main()
            code = 0
        except SystemExit as e:
            code = e.code
        finally:
            signal.signal(signal.SIGTERM, handler)
        return code, *capsys.readouterr()

    def calls(self):
        path = self.folder / "out/compare/calls.txt"
        return path.read_text().splitlines() if path.exists() else []

    def results(self, name="mine.csv"):
        with open(self.folder / "results" / name, newline="") as f:
            return list(csv.DictReader(f))


@pytest.fixture
def run(lab, capsys, monkeypatch):
    return lambda *flags: lab.call(capsys, monkeypatch, *flags)


def test_what_is_missing_is_trained_asked_and_recorded(lab, run):
    code, out, err = run("--jobs=2")
    assert code == 0, err
    assert "Which is better?" in out and "| base |" in out and "| asked otherwise |" in out
    calls = lab.calls()
    assert sum(call.startswith("train") for call in calls) == 4, "two rows with two seeds"
    assert sum(call.startswith("ask") for call in calls) == 3 * 2 * 2, "three rows, two lengths"
    rows = lab.results()
    assert len(rows) == 2 * (4 + 2) * 2 + 2 * 4
    assert list(rows[0]) == list(measured.COLUMNS)
    order = [(row["row"], row["seed"]) for row in rows]
    assert list(dict.fromkeys(order)) == [(name, seed) for name in ("base", "wide",
                                          "asked otherwise") for seed in "12"]
    accuracy = [row for row in rows if row["measure"] == "accuracy"]
    for row in accuracy:
        assert (row["n"], row["right"], row["value"]) == ("4", "1", "0.2500")
        assert row["answers"] == "1000"
        assert (row["commit"], row["dtype"], row["parameters"]) == ("abc", "float32", "1000")
        assert row["command"] == f'python compare.py mine.toml --only="{row["row"]}"'
    losses = [row for row in rows if row["measure"] == "val_loss"]
    assert {row["value"] for row in losses} == {"0.6"} and len(losses) == 4
    minutes = [row for row in rows if row["measure"] == "minutes until accuracy 0.5"]
    assert len(minutes) == 4 and all(float(row["value"]) < 1 for row in minutes)
    log = lab.results("mine_log.csv")
    assert [(row["row"], row["seed"], row["step"]) for row in log] == [
        (name, seed, step) for name in ("base", "wide") for seed in "12" for step in "01234"]
    experiment = ex.load("mine.toml")
    tokens = ex.planned_tokens(experiment, experiment.row[0], {"max_iters": 4, "batch_size": 9})
    assert [int(row["tokens"]) for row in log] == [step * tokens // 4 for step in range(5)] * 4
    assert (lab.folder / "results/mine.png").stat().st_size > 1000


def test_a_second_call_does_nothing(lab, run):
    run("--jobs=2")
    files = {path: path.read_bytes() for path in (lab.folder / "results").glob("*.csv")}
    calls = lab.calls()
    code, out, _ = run()
    assert code == 0 and "| base |" in out and lab.calls() == calls
    assert {path: path.read_bytes() for path in (lab.folder / "results").glob("*.csv")} == files
    # and results are enough: the runs may be gone
    (lab.folder / "out").rename(lab.folder / "elsewhere")
    run()
    assert lab.calls() == []


def test_only_and_seeds_choose_and_what_they_need_is_trained(lab, run):
    code, out, err = run("--only=asked otherwise", "--seeds=2", "--jobs=1")
    assert code == 0, err
    assert {(row["row"], row["seed"]) for row in lab.results()} == {("asked otherwise", "2")}
    trained = [call for call in lab.calls() if call.startswith("train")]
    assert len(trained) == 2 and all("--seed=2" in call for call in trained)
    run("--jobs=2")
    assert sum(call.startswith("train") for call in lab.calls()) == 4


def test_a_row_to_match_is_not_trained_again_where_results_know_its_size(lab, run):
    def jobs():
        experiment, rows = ex.load("mine.toml"), measured.read_results("results/mine.csv")
        config = compare.CompareConfig(["mine.toml"], only="wide", seeds="2", out_dir="elsewhere")
        return [(job.row.name, job.size) for job in compare.find_jobs(experiment, config, rows)]

    lab.write('[[row]]\nname = "base"', '[[row]]\nname = "wide"\nmatch = "base"')
    assert run("--only=base", "--seeds=1")[0] == 0
    assert jobs() == [("base", ""), ("wide", "")], "another checkout may not take a number"
    text = (lab.folder / "mine.toml").read_text()
    head, _, foot = text.rpartition('code = "quick"\n')
    (lab.folder / "mine.toml").write_text(head + foot)
    assert jobs() == [("wide", "1000")]
    (lab.folder / "quick/lm2.py").write_text("changed = True\n")
    assert jobs() == [("base", ""), ("wide", "")], "the results are of other code"


def test_a_run_that_goes_on_needs_no_other(lab, run):
    experiment = ex.load("mine.toml")
    config = compare.CompareConfig(["mine.toml"], only="wide", seeds="1")
    base, wide = compare.find_jobs(experiment, config, [])
    wide.folder.mkdir(parents=True)
    (wide.folder / "ckpt.pt").touch()
    assert [job.row.name for job in compare.find_jobs(experiment, config, [])] == ["wide"]


def test_a_training_that_was_stopped_from_outside_is_no_result(lab, run):
    quick = lab.folder / "quick/train.py"
    quick.write_text("import os\n" + TRAIN.replace(
        "for step in range", "os.kill(os.getpid(), signal.SIGINT)\nfor step in range"))
    code, _, err = run("--seeds=1", "--only=base")
    assert code == 1 and "its training was stopped: the same command goes on" in err
    assert not list((lab.folder / "results").iterdir())


def test_two_experiments_of_one_name_are_refused(lab, capsys, monkeypatch):
    (lab.folder / "other").mkdir()
    (lab.folder / "other/mine.toml").write_text((lab.folder / "mine.toml").read_text())
    code, _, err = lab.call(capsys, monkeypatch, "other/mine.toml")
    assert is_one_line(code, err, "two experiments have the name mine")


def test_a_dry_run_says_what_would_be_run_and_runs_nothing(lab, run):
    code, out, _ = run("--dry_run", "--jobs=2")
    assert code == 0 and lab.calls() == [] and not (lab.folder / "results").exists()
    assert "mine: base, seed 1: train about " in out and "ask 0k x 4, 1k x 4" in out
    assert "6 runs, about " in out and "2 at a time" in out
    run("--seeds=1", "--jobs=2")
    store = lab.folder / "results/mine.csv"
    rows = [{**row, "minutes": "80.00"} for row in lab.results()]
    measured.write_results(store, rows)
    _, out, _ = run("--dry_run", "--jobs=2")
    assert "seed 2: train about 80 min" in out and "seed 1" not in out, "as it took before"
    assert "3 runs, about 1 h 20 min, 2 at a time" in out
    lab.write('[[row]]\nname = "base"\nflags = "--max_iters=10"',
              '[[row]]\nname = "wide"\nflags = "--max_iters=40"',
              '[[row]]\nname = "new"\nflags = "--max_iters=20"')
    _, out, _ = run("--dry_run", "--seeds=2")
    assert "base, seed 2: train about 80 min" in out
    assert "new, seed 2: train about 160 min" in out, "at the pace of base, not of wide"


def test_a_failing_row_costs_only_itself_and_is_named(lab, run):
    lab.write('[[row]]\nname = "base"', '[[row]]\nname = "bad"\nflags = "--fail=1"',
              '[[row]]\nname = "needs bad"\ninit_from = "bad"', '[[row]]\nname = "last"')
    code, out, err = run("--jobs=2", "--seeds=1")
    assert code == 1
    assert sum("--fail" not in call for call in lab.calls() if call[:5] == "train") == 1, \
        "two rows that are trained alike have one run"
    assert {row["row"] for row in lab.results()} == {"base", "last"} and "| last |" in out
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert lines[0].startswith("error: mine: bad, seed 1 failed: error: fail=1 was asked for")
    assert lines[1] == ("error: mine: needs bad, seed 1 failed: it needs mine: bad, seed 1, which "
                        "failed")


def test_a_job_that_has_to_wait_lets_others_go_first(lab, run):
    lab.write('[[row]]\nname = "base"\nflags = "--slow=1"',
              '[[row]]\nname = "asked otherwise"\nrun_of = "base"\nask_flags = "--rag=10"',
              '[[row]]\nname = "goes on"\ninit_from = "base"', '[[row]]\nname = "last"')
    release = '(pathlib.Path(run).parent / "release").touch()\n'  # base trains until then
    (lab.folder / "quick/eval_babilong.py").write_text(EVAL + release)
    code, _, err = run("--jobs=2", "--seeds=1")
    assert code == 0, err
    kinds = [call.split()[0] for call in lab.calls()]
    assert kinds[:4] == ["train", "train", "ask", "ask"]


def as_in_the_background():
    """As a shell starts a program in the background, also where the tests run under nohup."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def begun(lab):
    """A compare.py in a process of its own, whose training waits in step 2 -> process, its log"""
    lab.write('[[row]]\nname = "base"\nflags = "--slow=1"')
    script = "import compare; compare.programs.POLL = 0.02; compare.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "mine.toml", "--seeds=1", "--jobs=1"], cwd=lab.folder,
        env=os.environ | {"PYTHONPATH": str(REPO)}, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=as_in_the_background)
    log = None
    for _ in range(3000):
        found = list((lab.folder / "out/compare").glob("*/log.csv"))
        if found and found[0].read_text().count("\n") >= 3:
            log = found[0]
            break
        time.sleep(0.02)
    assert log, "the run has not begun"
    yield process, log
    subprocess.run(["pkill", "-f", str(log.parent.name)])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_is_stopped_goes_on(lab, run, begun, number):
    process, log = begun
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped; the same command goes on" in err
    assert log.read_text().count("\n") == 3, "the training was stopped, too"
    before = measured.elapsed(log.parent)[-1][0]
    code, _, err = run("--seeds=1")
    assert code == 0, err
    assert "--resume" in lab.calls()[1] and measured.elapsed(log.parent)[-1][0] > before
    assert len(lab.results()) == 4 + 2


def test_a_training_whose_compare_was_killed_is_not_begun_twice(lab, run, begun):
    process, log = begun
    process.kill()
    process.wait()
    process.stderr.close()
    code, _, err = run("--seeds=1")
    assert code == 1 and "another compare.py works on" in err and len(lab.calls()) == 1


def test_minutes_that_nobody_noted_are_not_known(lab, run, begun):
    process, log = begun
    process.kill()
    process.wait()
    process.stderr.close()
    (log.parent.parent / "release").touch()  # the training goes on by itself
    for _ in range(3000):
        with suppress(programs.Failed), programs.locked(log.parent):  # until then it holds the lock
            break
        time.sleep(0.02)
    assert ex.is_trained(log.parent)
    lab.write('[[row]]\nname = "base"\nflags = "--slow=1"', head=HEAD.replace("until", "# until"))
    assert run("--seeds=1")[0] == 0
    assert {(row["minutes"], row["tokens_per_s"]) for row in lab.results()} == {("", "")}
    lab.write('[[row]]\nname = "base"\nflags = "--slow=1"')
    code, _, err = run("--seeds=1")
    out = log.parent.relative_to(lab.folder)
    assert code == 1 and f"are not known, as compare.py was killed meanwhile: delete {out}" in err
    times = (log.parent / "times.csv").read_text().splitlines()
    (log.parent / "times.csv").write_text("\n".join([*times, "nan,4"]))
    assert measured.elapsed(log.parent) == [], "as of a run that went on once more"


def test_nohup_keeps_it_from_a_hangup(lab, monkeypatch, capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        lab.call(capsys, monkeypatch, "--dry_run")
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_two_that_record_at_once_lose_nothing(lab, run):
    run("--seeds=1", "--only=base")
    rows, experiment = lab.results(), ex.load("mine.toml")

    def record(first):
        with (patch("lib.measured.save_log"), patch("lib.measured.measured",
              lambda experiment, row, seed, *_: [rows[0] | {"seed": str(seed)}])):
            for seed in range(first, first + 20):
                measured.save(experiment, experiment.row[0], seed, [], None, "results")

    both = [get_context("fork").Process(target=record, args=(first,)) for first in (10, 50)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        process.kill()
    assert len(lab.results()) == len(rows) + 40


def test_a_log_that_cannot_be_read_costs_no_evaluations(lab, run):
    lab.write('[[row]]\nname = "base"')
    run("--seeds=1")
    log = lab.folder / "results/mine_log.csv"
    whole = log.read_text()
    log.write_text(whole.replace("base,1,", 'base,1,"', 1) + "x" * 200_000)
    code, _, err = run("--seeds=2")
    assert code == 2 and "mine_log.csv is damaged" in err and "Traceback" not in err
    log.write_text(whole)
    assert run()[0] == 0
    assert {line["seed"] for line in lab.results("mine_log.csv")} == {"1", "2"}


def test_the_order_of_the_rows_is_that_of_the_experiment(lab, run):
    rows = ['[[row]]\nname = "base"', '[[row]]\nname = "other"\nflags = "--n_layer=2"']
    lab.write(*rows)
    run("--seeds=1")
    lab.write(*reversed(rows))
    _, out, _ = run("--seeds=1")
    assert "minus other" in out and lab.results()[0]["row"] == "other"


def test_what_cannot_be_written_is_told_before_anything_runs(lab, run):
    (lab.folder / "file").touch()
    for flag in ("out_dir", "results_dir"):
        code, _, err = run(f"--{flag}=file/inside")
        assert is_one_line(code, err, f"{flag}=file/inside is not a folder", f"another --{flag}")
    assert not lab.calls()


def test_what_was_asked_fewer_questions_says_so(lab, run):
    quick = lab.folder / "quick/eval_babilong.py"
    quick.write_text(EVAL.replace('int(flags["n_samples"])', "3"))
    code, _, err = run("--seeds=1", "--only=base")
    assert code == 1 and "it has no 4 answers to qa1 at 0k: ask fewer" in err


def test_what_was_answered_is_recorded_length_by_length(lab, run):
    quick = lab.folder / "quick/eval_babilong.py"
    refusing = "import sys\nif '--lengths=1k' in sys.argv: sys.exit('error: too long')\n"
    quick.write_text(refusing + EVAL)
    code, out, err = run("--seeds=1", "--only=base")
    assert code == 1 and "base, seed 1 failed: error: too long" in err
    assert {row["length"] for row in lab.results()} == {"0k", ""} and "| base |" in out
    quick.write_text(EVAL)
    calls = lab.calls()
    assert run("--seeds=1", "--only=base")[0] == 0
    assert [call.split()[0] for call in lab.calls()[len(calls):]] == ["ask"]


def test_fewer_questions_are_the_first_of_more(lab, run):
    run("--seeds=1", "--only=base")
    first, calls = lab.results(), lab.calls()
    for n, asked_again in ((3, 0), (5, 2)):
        lab.write('[[row]]\nname = "base"', head=HEAD.replace("= 4", f"= {n}"))
        assert run("--seeds=1")[0] == 0
        assert len(lab.calls()) == len(calls) + asked_again and (lab.results() == first) == (n == 3)


def test_code_that_is_edited_while_compare_runs_gives_no_results(lab, run):
    edit = 'pathlib.Path(__file__).with_name("lm2.py").write_text("new = 1")'
    (lab.folder / "quick/train.py").write_text(f"{TRAIN}    if step == 4:\n        {edit}")
    code, _, err = run("--seeds=1", "--only=base")
    assert code == 1 and "its code or preset was edited since compare.py began: take" in err
    assert not list((lab.folder / "results").iterdir())
    code, out, _ = run("--seeds=1", "--only=base")
    assert code == 0 and "| base |" in out
    assert sum(call.startswith("train") for call in lab.calls()) == 2


def test_a_failure_is_told_while_the_others_go_on_and_at_the_end(lab, run):
    lab.write('[[row]]\nname = "base"', '[[row]]\nname = "bad"\nflags = "--fail=1"')
    code, _, err = run("--seeds=1", "--jobs=1")
    assert code == 1 and "mine: bad, seed 1 failed, the others go on: error: fail=1" in err
    assert err.splitlines()[-1].startswith("error: mine: bad, seed 1 failed: error: fail=1")


def test_no_steps_are_a_training_too(lab, run):
    train = lab.folder / "quick/train.py"
    train.write_text(TRAIN.replace('"max_iters": 4', '"max_iters": 0'))
    assert run("--seeds=1", "--only=base")[0] == 0


def test_a_run_is_for_one_compare_alone(lab, run):
    experiment = ex.load(lab.folder / "mine.toml")
    folder = ex.folder_of(experiment, experiment.row[0], 1, "out/compare")
    with programs.locked(folder):
        code, _, err = run("--seeds=1", "--only=base")
    assert code == 1 and f"another compare.py works on {folder}: wait for it" in err
    assert not list((lab.folder / "results").iterdir())


def test_a_row_whose_code_changed_is_marked_and_measured_anew_if_asked(lab, run, monkeypatch):
    run("--seeds=1", "--jobs=2")
    calls = lab.calls()
    (lab.folder / "quick/lm2.py").write_text("changed = True\n")
    code, out, _ = run("--seeds=1")
    assert code == 0 and lab.calls() == calls
    assert "mine: base, wide, asked otherwise measured with other code or flags: --again" in out
    assert "| base (as of " in out and "| base |" not in out
    before, drawn = {row["run"] for row in lab.results()}, []
    monkeypatch.setattr("lib.figure.plot", lambda *args: drawn.append(args[-1]))
    code, out, _ = run("--seeds=1", "--again", "--only=base", "--jobs=1")
    assert code == 0 and len(lab.calls()) > len(calls)
    assert "| base |" in out and "| wide (as of " in out
    now = {row["run"] for row in lab.results() if row["row"] == "base"}
    assert now.isdisjoint(before) and {drawn[0]["base"]} == now, "as in the picture"


@pytest.mark.parametrize("change, commit", [
    ("", "abc"), ('change = [["lm2.py", "wide(C).tanh()", "C"]]', "this")])
def test_a_changed_copy_is_of_the_commit_it_was_made_of(tmp_path, monkeypatch, change, commit):
    monkeypatch.setattr("lib.origin.commit", {ex.ROOT: "this", tmp_path: "that"}.get)
    (tmp_path / "mine.toml").write_text(f'{HEAD}[[row]]\nname = "mine"\n{change}')
    (tmp_path / "answers").mkdir()
    for name, text in {
            "config.json": '{"parameters": 9, "train": {"device": "cpu", "dtype": "float32"}}',
            "log.csv": "step,val_loss\n0,1\n",
            "answers/results.csv": "task,length,n,right,answers,commit,dtype,torch\n"
                                   "qa1,0k,1,1,1,abc,float32,2\n"}.items():
        (tmp_path / name).write_text(text)
    experiment = ex.load(tmp_path / "mine.toml")
    keys = [("accuracy", "qa1", "0k", 1), ("val_loss", "", "", 0)]
    row, loss = measured.measured(experiment, experiment.row[0], 1, keys, tmp_path)
    assert (row["commit"], row["right"], loss["commit"]) == (commit, "1", "this")
    experiment.row[0].code, experiment.row[0].change = str(tmp_path), []
    loss, = measured.measured(experiment, experiment.row[0], 1, keys[1:], tmp_path)
    assert loss["commit"] == "that", "another checkout has its own"


def test_a_tag_is_no_commit(tmp_path):
    def git(*args):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", *args], cwd=tmp_path,
                       check=True, capture_output=True)
    git("init")
    git("commit", "--allow-empty", "-m", "one")
    git("tag", "-a", "v1.0", "-m", "first")
    assert len(commit(tmp_path)) == 40


def test_a_folder_without_git_of_its_own_has_no_commit():
    assert commit(REPO / "experiments") == commit("/") == "unknown"


def test_results_of_other_seeds_and_rows_stay(lab, run):
    run("--seeds=1", "--jobs=2")
    first = lab.results()
    lab.write('[[row]]\nname = "new"')
    run("--seeds=2", "--jobs=1")
    rows = lab.results()
    assert [row for row in rows if row["row"] != "new"] == first
    assert {row["seed"] for row in rows if row["row"] == "new"} == {"2"}


@pytest.mark.parametrize("flags, named", [
    (["--only=none"], "only=none"), (["--seeds=1,9"], "seeds=1,9"), (["--seeds=a"], "seeds=a"),
    (["--jobs=-1"], "jobs=-1"), (["nowhere.toml"], "nowhere.toml"), (["--job=1"], "--job=1")])
def test_bad_flags_are_refused_in_one_line(lab, run, flags, named):
    code, _, err = run(*flags)
    assert is_one_line(code, err, named) and lab.calls() == []


def test_bad_files_are_refused_in_one_line_and_stay(lab, run):
    (lab.folder / "results").mkdir()
    store = lab.folder / "results/mine.csv"
    row = dict.fromkeys(measured.COLUMNS, "1") | {"length": "0k"}
    damages = ["experiment,row\n", "x", ",".join(measured.COLUMNS) + "\nmine,base\n"]
    damages += [f"{','.join(row)}\n{','.join((row | {'minutes': bad}).values())}\n"
                for bad in ("nan", "inf", "-1", "x")]
    for damage in damages:
        store.write_text(damage)
        code, _, err = run()
        assert is_one_line(code, err, "mine.csv") and store.read_text() == damage
    store.unlink()
    log = lab.folder / "results/mine_log.csv"
    log.write_text("Row,seed,step\nbase,1,0\n")
    with pytest.raises(ValueError, match="mine_log.csv is damaged or foreign"):
        measured.read_log(log.parent, "mine")
    (lab.folder / "mine.toml").write_text("title =")
    assert is_one_line(*[run()[i] for i in (0, 2)], "mine.toml")
    assert lab.calls() == []


@pytest.mark.parametrize("row, named", [
    ('flags = "--mem_slot=8"', "row 'a': mem_slot is not known"),
    ('flags = "--mem_slots=0"', "mem_slots=0"), ('flags = "--memory=none"', "time dilation"),
    ('flags = "--max_iters=1e3"\nchange = [["lm2.py", "wide(C).tanh()", "C"]]', "1e3"),
    ('flags = "--mem_slot=8"\nchange = [["lm2.py", "wide(C).tanh()", "C"]]', "mem_slot is not"),
    ('flags = "--max_iters=abc"', "max_iters=abc"),
    ('preset = "config/pairs.toml"\nflags = "--pairs=1"', "1 in pairs=1 must be a number from 2"),
    ('flags = "--dataset=shakespeare"', "dataset=shakespeare has nothing to ask"),
    ('ask_flags = "--ragg=10"', "ragg is not known"), ('ask_flags = "--rag=-1"', "rag=-1")])
def test_flags_that_a_program_would_refuse_are_refused_before_anything_runs(lab, run, row, named):
    (lab.folder / "mine.toml").write_text(f'{HEAD}[[row]]\nname = "a"\n{row}\n')
    code, _, err = run("--dry_run")
    assert is_one_line(code, err, named, "mine")


@pytest.mark.parametrize("flag", ["--only=base", "--seeds=1", "--again", "--dry_run"])
def test_what_is_of_an_experiment_needs_one(capsys, monkeypatch, flag):
    monkeypatch.setattr("sys.argv", ["compare.py", "--write", flag])
    with pytest.raises(SystemExit) as stop:
        compare.main()
    assert is_one_line(stop.value.code, capsys.readouterr().err, "no experiment is named")


def test_what_cannot_be_printed_is_told_in_one_line(run, monkeypatch):
    def no_room(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(compare, "print", no_room, raising=False)
    code, _, err = run("--dry_run")
    assert is_one_line(code, err, "No space left")


def test_a_change_may_bring_a_flag_of_its_own(lab, run):
    (lab.folder / "mine.toml").write_text(HEAD + """[[row]]
name = "a"
flags = "--forget_bias=4 --mem_write=delta"
change = [["lm2.py", "mem_slots: int =", "forget_bias: float = 2.0\\n    mem_slots: int ="],
          ["lm2.py", "attend aligned", "attend aligned delta"]]
""")
    code, out, err = run("--dry_run")
    assert code == 0 and "mine: a, seed 1: train" in out, err


def test_a_row_that_goes_on_from_another_may_freeze_it(lab, run):
    (lab.folder / "mine.toml").write_text(
        f'{HEAD}[[row]]\nname = "a"\n[[row]]\nname = "b"\ninit_from = "a"\n'
        'flags = "--freeze=decoder"')
    assert run("--dry_run")[0] == 0


def test_known_times_are_those_of_the_experiment():
    rows = [{"experiment": name, "row": "LM2", "minutes": minutes}
            for name, minutes in (("ten", "60"), ("ten", "70"), ("text", "7"), ("text", ""))]
    assert measured.known_seconds(rows) == {("ten", "LM2"): 65 * 60, ("text", "LM2"): 7 * 60}


def test_it_needs_an_experiment(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare.py"])
    with pytest.raises(SystemExit) as stop:
        compare.main()
    assert is_one_line(stop.value.code, capsys.readouterr().err, "experiments/qa1.toml")


def test_losses_are_those_of_the_best_step_and_minutes_those_until_a_figure(lab):
    experiment = ex.load(lab.folder / "mine.toml")
    log = [dict(step=str(step), val_loss=loss) for step, loss in
           ((0, "4.0"), (10, "1.5"), (20, "1.9"))]
    assert measured.best(log)["val_loss"] == "1.5"
    stories = [{**row, "accuracy": "0.5"} for row in log]
    assert measured.best(stories) is stories[-1], "of stories the last weights count"
    experiment.until = {"val_loss": 1.6}
    times = [(0.0, 0), (30.0, 5), (66.0, 12), (120.0, 20)]
    until = "minutes until val_loss 1.6"
    assert measured.reached(experiment, until, lab.folder, log, times) == "1.10"
    experiment.until = {"loss": 1}
    with pytest.raises(ValueError, match="until has loss, .* use step, val_loss"):
        measured.reached(experiment, "minutes until loss 1", lab.folder, log, times)
    experiment.until = {"val_loss": 1.4}
    assert measured.reached(experiment, "minutes until val_loss 1.4", lab.folder, log, times) == ""


# --- The real programs

def test_the_real_programs_train_match_and_answer(checkout):
    (checkout.folder / "small.toml").write_text(
        "".join(f"{key} = {value!r}\n" for key, _, value in
                (flag.removeprefix("--").partition("=") for flag in SMALL) if not value.isdigit())
        + "".join(f"{key} = {value}\n" for key, _, value in
                  (flag.removeprefix("--").partition("=") for flag in SMALL) if value.isdigit())
        + 'dataset = "babilong"\ncorpus = "play.txt"\nlengths = "0k"\nmax_iters = 2\n'
          'eval_interval = 1\n')
    (checkout.folder / "tiny.toml").write_text("""
title = "Tiny"
preset = "small.toml"
seeds = [1]
tasks = "qa1"
ask = { "0k" = 2 }
[[row]]
name = "LM2"
[[row]]
name = "window"
flags = "--memory=none"
match = "LM2"
change = [["lm2.py", "F.silu(", "F.gelu("]]
""")
    code, out, err = checkout.run("compare.py", "tiny.toml", "--jobs=2")
    assert code == 0, err
    with open(checkout.folder / "results/tiny.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["row"] for row in rows] == ["LM2", "window"]
    sizes = [int(row["parameters"]) for row in rows]
    assert max(sizes) <= 1.02 * min(sizes) and all(row["n"] == "2" for row in rows)
    assert "| LM2 |" in out and (checkout.folder / "results/tiny.png").exists()
