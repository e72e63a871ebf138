"""train.py: what a run leaves, that it goes on where it stopped, that bad input costs nothing."""
import csv
import errno
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
import tomllib
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import REPO, SMALL, Checkout, is_one_line

import train
from data import files
from data import tokenizer as tokenizers
from data.dataset import EvaluationBatch
from eval_babilong import EvalConfig
from lib import checkpoint
from lib.config import from_dict, parse
from lib.llama import shape_of
from lib.run import Stop, check_free, claim
from lm2 import LM2
from sample import SampleConfig
from train import TrainConfig, batches, learning_rate_factor

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
EIGHT = ["--max_iters=8", "--eval_interval=4", "--dropout=0.1", "--momentum=0.8"]


@pytest.fixture(scope="module")
def run(checkout):
    """A finished run of 8 steps in out/whole -> what it printed."""
    return checkout.train("out/whole", *EIGHT)


@pytest.fixture
def copy(checkout, run):
    """A copy of that run, to be changed -> its folder."""
    folder = checkout.folder / "out/copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkout.folder / "out/whole", folder)
    return folder


def contents(folder):
    files = folder.iterdir() if folder.is_dir() else ()
    return {f.name: f.read_bytes() for f in files if f.name != ".lock"}


def rows(checkout, out_dir):
    return list(csv.DictReader(checkout.log(out_dir).splitlines()))


def step_of(folder, name="ckpt.pt"):
    return torch.load(folder / name, weights_only=True)["step"]


def wait_for(condition, process, seconds=60):
    """Wait until a process in the background has got so far."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


# --- What a run leaves

def test_a_path_with_a_space_is_printed_to_be_copied(checkout):
    out = checkout.train("out/my run", "--max_iters=0")
    assert out.endswith("more text: python sample.py --out_dir='out/my run'\n")


def test_run_leaves_its_files_and_ends_with_text_and_their_paths(checkout, run):
    folder = checkout.folder / "out/whole"
    assert set(contents(folder)) == set(checkpoint.FILES)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "play.txt (sha256 " in run and "writes:" in run
    assert all(f"out/whole/{name}" in run for name in ("loss.png", "ckpt.pt", "best.pt"))
    found = rows(checkout, "out/whole")
    assert [int(row["step"]) for row in found] == list(range(9))
    assert [row["step"] for row in found if row["val_loss"]] == ["0", "4", "8"]
    assert all(float(row["loss"]) > 0 for row in found[:-1])
    saved = json.loads((folder / "config.json").read_text())
    assert saved["train"]["max_iters"] == 8 and len(saved["data"]["sha256"]) == 64
    assert saved["data"]["source"].endswith("play.txt")


def test_best_and_last_can_be_told_apart(checkout, run):
    last, best = (torch.load(checkout.folder / "out/whole" / name, weights_only=True)
                  for name in ("ckpt.pt", "best.pt"))
    assert last["step"] == 8 and best["val_loss"] == last["best_val_loss"]
    assert "optimizers" in last and "optimizers" not in best


def test_muon_heeds_its_flags(checkout, run):
    found = torch.load(checkout.folder / "out/whole/ckpt.pt", weights_only=True)
    group = found["optimizers"][0]["param_groups"][0]
    assert (group["momentum"], group["weight_decay"]) == (0.8, 0.1)


def test_learning_rate_warms_up_and_decays():
    config = TrainConfig(max_iters=100, warmup_iters=9, learning_rate=0.02, min_lr=0.002)
    factors = [learning_rate_factor(step, config) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[100] == pytest.approx(0.1)
    assert max(factors) == factors[9] and factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[4] == pytest.approx(0.5 * (1 - 0.9 * 4 / 100)), "warm-up times decay"
    longer = TrainConfig(max_iters=50, lr_decay_iters=200)
    assert learning_rate_factor(100, longer) == pytest.approx(0.5)
    shorter = replace(config, max_iters=200, lr_decay_iters=100)
    assert learning_rate_factor(150, shorter) == pytest.approx(0.1), "min_lr from there on"


class Numbered:
    """Data whose batches say which ones they are."""
    progress = 7

    def batch(self, config, step, part):
        return torch.tensor([step, part, self.progress]), torch.tensor([config.seed])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_in_order_up_to_the_next_evaluation(num_workers):
    config = SimpleNamespace(num_workers=num_workers, seed=5, gradient_accumulation_steps=2,
                             eval_interval=10, max_iters=23)
    for first, end in ((7, 10), (20, 23)):
        found = list(batches(Numbered(), config, first, 1, 3, torch.device("cpu")))
        # the second of three processes has parts 1 and 1 + 3 of each step
        wanted = [[step, part, 7] for step in range(first, end) for part in (1, 4)]
        assert [x.tolist() for x, _ in found] == wanted
        assert all(y.tolist() == [5] for _, y in found)


def test_any_number_of_steps_between_evaluations_takes_no_memory():
    config = SimpleNamespace(num_workers=0, seed=5, gradient_accumulation_steps=10 ** 6,
                             eval_interval=2 ** 31 - 1, max_iters=2 ** 31 - 1)
    x, _ = next(batches(Numbered(), config, 0, 0, 1, torch.device("cpu")))
    assert x.tolist() == [0, 0, 7]


def test_run_begins_with_the_weights_of_another(checkout, run):
    checkout.train("out/more", "--max_iters=0", "--init_from=out/whole")
    first, second = (torch.load(checkout.folder / path / "best.pt", weights_only=True)
                     for path in ("out/whole", "out/more"))
    assert all(torch.equal(p, second["model"][name]) for name, p in first["model"].items())
    assert first["val_loss"] == second["val_loss"] and second["step"] == 0


@pytest.mark.parametrize("args, named", [
    (["--init_from=out/nothing"], "out/nothing/config.json"),
    (["--init_from=out/whole", "--n_layer=2"], "give --n_layer=1"),
    (["--init_from=out/whole", "--dataset=letters.txt"], "not in the vocabulary"),
], ids=str)
def test_weights_of_another_model_are_refused(checkout, call, run, args, named):
    letters = "".join(sorted(set((checkout.folder / "play.txt").read_text())))
    as_many_others = letters.replace("a", "\u00e4") * 50
    (checkout.folder / "letters.txt").write_text(as_many_others, encoding="utf-8")
    code, _, err = call("train.py", "--dataset=play.txt", "--out_dir=out/odd", *SMALL, *args)
    assert is_one_line(code, err, named)
    assert not (checkout.folder / "out/odd/ckpt.pt").exists()


# --- A run goes on where it stopped

def test_stopped_by_max_iters_and_resumed_gives_the_same_losses(checkout, call, run):
    checkout.train("out/halves", *EIGHT, "--max_iters=4", "--lr_decay_iters=8")
    code, _, err = call("train.py", "--resume", "--out_dir=out/halves", "--max_iters=8",
                        "--num_workers=2")  # made ahead, the same batches
    assert code == 0, err
    assert checkout.log("out/halves") == checkout.log("out/whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL],
                         ids=lambda number: number.name)
def test_interrupted_and_resumed_gives_the_same_losses(checkout, call, number):
    out_dir = f"out/{number.name}"
    folder = checkout.folder / out_dir
    args = ["--eval_interval=20", "--lr_decay_iters=200", "--min_lr=0.01"]
    process = checkout.start("train.py", "--dataset=play.txt", f"--out_dir={out_dir}", *SMALL,
                             *args, "--max_iters=1000000")
    wait_for(lambda: (folder / "log.csv").exists() and checkout.log(out_dir).count("\n") > 50,
             process)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 0 and "stopped at step" in out and "--resume" in out, err
    last = step_of(folder)
    assert last >= 40
    more = f"--max_iters={last + 15}"
    code, _, err = call("train.py", "--resume", f"--out_dir={out_dir}", more)
    assert code == 0, err
    checkout.train("out/unbroken", *args, more, "--overwrite")
    assert checkout.log(out_dir) == checkout.log("out/unbroken")


def test_a_signal_to_the_whole_group_stops_a_run_that_makes_batches_ahead(checkout):
    process = checkout.start("train.py", "--dataset=play.txt", "--out_dir=out/group", *SMALL,
                             "--max_iters=1000000", "--num_workers=2")
    log = checkout.folder / "out/group/log.csv"
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 20, process)
    os.killpg(process.pid, signal.SIGTERM)  # as timeout and job schedulers do
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped at step" in out, err
    assert step_of(checkout.folder / "out/group") >= 20, "nothing of the training is lost"


@pytest.fixture
def stop():
    """A Stop, whose signal handlers go away after the test."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Stop(torch.device("cpu"), 1)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def two_rows(continues=False):
    """An evaluation batch with three answers: 4, 5 and 5."""
    y = torch.tensor([[-1, 4, -1], [5, -1, 5]])
    return EvaluationBatch("val_loss", torch.zeros_like(y), y, continues, ["qa1", "qa6"])


class Parrot(torch.nn.Module):
    """A model that says 5 at each place; its loss counts the batches of a stream."""

    def forward(self, x, y, state=None, repeats=None):
        batches_before = state or 0
        logits = torch.nn.functional.one_hot(torch.full_like(x, 5), 6).float()
        return logits, torch.tensor(float(batches_before)), batches_before + 1


def evaluate(evaluation_batches, stop):
    data = SimpleNamespace(evaluation_batches=lambda config: evaluation_batches)
    config = SimpleNamespace(dtype="float32")
    return train.evaluate(Parrot(), data, config, torch.device("cpu"), stop)


def test_evaluation_stops_between_two_batches(stop):
    def interrupted():
        yield two_rows()
        os.kill(os.getpid(), signal.SIGINT)
        yield two_rows()

    assert evaluate(interrupted(), stop) is None


def test_each_target_and_each_answer_counts_the_same(stop):
    long = EvaluationBatch("val_loss", torch.zeros(1, 9, dtype=torch.long),
                           torch.full((1, 9), 5), True, [])
    found = evaluate([two_rows(), long], stop)
    assert found["val_loss"] == (3 * 0 + 9 * 1) / 12
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert (found["qa1"], found["qa6"]) == (0, 1)


def test_state_is_carried_along_a_stream_and_not_into_another(stop):
    stream = [two_rows(), two_rows(continues=True), two_rows(continues=True), two_rows()]
    assert evaluate(stream, stop)["val_loss"] == (0 + 1 + 2 + 0) / 4


# --- Several processes

SIX = ["--max_iters=6", "--eval_interval=3"]


@pytest.fixture(scope="module")
def stopped(checkout):
    """
    A run of two batches a step: two steps in one process, the third in two processes, which are
    stopped during a long evaluation -> what those printed
    """
    checkout.train("out/two", "--gradient_accumulation_steps=2", "--max_iters=2",
                   "--lr_decay_iters=6", "--eval_interval=3")
    process = checkout.start(*TORCHRUN, "train.py", "--resume", "--out_dir=out/two", *SIX,
                             "--eval_iters=1000000")
    wait_for(lambda: step_of(checkout.folder / "out/two") == 3, process)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    return out


def test_a_stop_during_a_long_evaluation_under_torchrun_loses_nothing(checkout, stopped):
    assert "stopped at step 3, saved in out/two" in stopped
    assert step_of(checkout.folder / "out/two") == 3


def test_two_processes_train_as_one_with_the_same_batch(checkout, call, stopped):
    """... and one goes on with the batch of two."""
    shutil.copytree(checkout.folder / "out/two", checkout.folder / "out/ended")
    code, _, err = call("train.py", "--resume", "--out_dir=out/ended", *SIX, "--eval_iters=1")
    assert code == 0, err
    checkout.train("out/one", *SIX, "--batch_size=4")
    checkout.train("out/accumulated", *SIX, "--gradient_accumulation_steps=2")
    losses = {name: [float(row["loss"]) for row in rows(checkout, f"out/{name}") if row["loss"]]
              for name in ("one", "accumulated", "ended")}
    assert len(losses["one"]) == 6
    assert losses["ended"] == pytest.approx(losses["one"], rel=1e-4)
    assert losses["accumulated"] == pytest.approx(losses["one"], rel=1e-4)
    processes = [(about["processes"], about["train"]["gradient_accumulation_steps"])
                 for about in map(checkpoint.load_config, (checkout.folder / "out/two",
                                                           checkout.folder / "out/ended"))]
    assert processes == [(2, 1), (1, 2)]


def children(process):
    """Process ids of what a process has started."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def test_where_a_machine_is_gone_the_other_ends_with_one_line_and_the_run_goes_on(checkout, call):
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    node = ["-m", "torch.distributed.run", "--nnodes=2", "--rdzv_backend=c10d",
            f"--rdzv_endpoint=localhost:{port}", "train.py", "--dataset=play.txt",
            "--out_dir=out/many", *SMALL, "--max_iters=1000000", "--eval_interval=5"]
    lost, other = checkout.start(*node), checkout.start(*node)
    ckpt = checkout.folder / "out/many/ckpt.pt"
    wait_for(lambda: ckpt.exists() and step_of(ckpt.parent) >= 5, lost)
    for pid in [lost.pid, *children(lost)]:  # torchrun and its process, both at once
        os.kill(pid, signal.SIGKILL)
    _, err = other.communicate(timeout=60)
    assert other.returncode != 0
    assert err.count("error: another process of this run is gone") == 1
    assert "train.py\", line" not in err  # torchrun reports at length, the program does not
    assert lost.wait() == -signal.SIGKILL
    step = step_of(ckpt.parent)
    code, _, err = call("train.py", "--resume", "--out_dir=out/many", f"--max_iters={step + 2}")
    assert code == 0, err


@pytest.mark.parametrize("environment, named", [
    ({"RANK": "1"}, "WORLD_SIZE"), ({"WORLD_SIZE": "2"}, "RANK"), ({"RANK": "x"}, "RANK=x"),
    ({"RANK": "5", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=5")], ids=str)
def test_half_set_environment_is_refused(checkout, call, monkeypatch, environment, named):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, _, err = call("train.py", "--dataset=play.txt", "--out_dir=out/half", *SMALL)
    assert is_one_line(code, err, named, "torchrun")
    assert not (checkout.folder / "out/half").exists()


# --- Nobody's work is lost

@pytest.mark.parametrize("args, named", [
    ([], "there is a run in out/copy"), (["--resume", "--n_layer=2"], "n_layer=2"),
    (["--resume", "--batch_size=9"], "batch_size=9"),
    (["--resume", "--max_iters=3"], "max_iters=3"), (["--resume", "--seed=9"], "seed=9"),
    (["--resume", "--dataset=other.txt"], "other.txt"), (["--resume", "--overwrite"], "exclude"),
], ids=str)
def test_a_run_is_not_overwritten_or_resumed_as_another(call, copy, args, named):
    before = contents(copy)
    code, _, err = call("train.py", "--out_dir=out/copy", *args)
    assert is_one_line(code, err, named)
    assert contents(copy) == before


@pytest.mark.parametrize("name", checkpoint.FILES)
def test_a_folder_with_a_single_file_of_a_run_is_not_written_into(call, copy, name):
    for other in set(checkpoint.FILES) - {name}:
        (copy / other).unlink()
    before = contents(copy)
    code, _, err = call("train.py", "--dataset=play.txt", "--out_dir=out/copy", *SMALL)
    assert is_one_line(code, err, "out/copy", "--overwrite")
    assert contents(copy) == before


def test_overwrite_replaces_a_run(checkout, copy):
    checkout.train("out/copy", "--max_iters=2", "--overwrite", "--seed=2")
    assert step_of(copy) == 2 and len(rows(checkout, "out/copy")) == 3


@pytest.mark.parametrize("args", [["--n_head=3"], ["--dataset=none.txt"], ["--tokenizer=bpe"],
                                  ["--init_from=out/not-there"], ["--n_embd=1000000"]], ids=str)
def test_overwrite_that_is_refused_keeps_the_old_run(call, copy, args):
    before = contents(copy)
    code, _, err = call("train.py", "--dataset=play.txt", "--out_dir=out/copy", "--overwrite",
                        *SMALL, *args)
    assert is_one_line(code, err)
    assert contents(copy) == before


def test_overwrite_with_a_model_that_cannot_begin_keeps_the_old_run(call, copy, monkeypatch):
    before = contents(copy)
    monkeypatch.setattr(LM2, "forward", lambda *args, **kwargs: (None, torch.tensor(math.nan)))
    code, _, _ = call("train.py", "--dataset=play.txt", "--out_dir=out/copy", "--overwrite", *SMALL)
    assert "step 0: the loss is not finite" in code
    assert contents(copy) == before


@pytest.mark.parametrize("args", [["--resume"], ["--overwrite"]], ids=str)
def test_a_run_that_another_train_py_writes_is_left_to_it(call, copy, args):
    before, lock = contents(copy), claim(copy, 0, may_exist=True)
    args = ["--dataset=play.txt", "--out_dir=out/copy", *SMALL, "--max_iters=10", *args]
    code, _, err = call("train.py", *args)
    assert is_one_line(code, err, "another program writes the run in out/copy")
    assert contents(copy) == before
    lock.close()
    code, _, err = call("train.py", *args)
    assert code == 0 and contents(copy) != before, err
    claim(copy, 0, may_exist=True).close()  # it is free again


def test_a_run_that_comes_into_the_folder_meanwhile_is_not_replaced(call, copy, monkeypatch):
    """... while the data of this one are prepared, which may take long."""
    before, seen = contents(copy), []
    monkeypatch.setattr("lib.run.check_free", lambda folder: seen.append(folder) or (
        len(seen) > 1 and check_free(folder)))
    code, _, err = call("train.py", "--dataset=play.txt", "--out_dir=out/copy", *SMALL)
    assert is_one_line(code, err, "there is a run in out/copy")
    assert contents(copy) == before and len(seen) == 2


def test_resume_goes_on_from_what_another_train_py_saved_last(call, copy, monkeypatch):
    order, restore = [], train.run.restore
    monkeypatch.setattr("lib.run.claim", lambda *args, **more: order.append("lock") or claim(
        *args, **more))
    monkeypatch.setattr("lib.run.restore", lambda *args: order.append("read") or restore(*args))
    code, _, err = call("train.py", "--resume", "--out_dir=out/copy", "--max_iters=9")
    assert code == 0 and order == ["lock", "read"], err


def test_overwrite_with_no_room_for_what_is_synced_keeps_the_old_run(call, copy, monkeypatch):
    def fsync(number):
        if os.fstat(number).st_size > 10_000:  # ckpt.pt, which is saved first
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    before = contents(copy)
    monkeypatch.setattr(os, "fsync", fsync)
    code, _, err = call("train.py", "--dataset=play.txt", "--out_dir=out/copy", "--overwrite",
                        *SMALL)
    assert is_one_line(code, err, "out/copy/ckpt.pt cannot be written: Disk quota exceeded")
    assert contents(copy) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_overwrite_that_dies_while_it_saves_leaves_no_mixed_run(checkout, call, copy, name):
    def atomic_open(path, *args, **kwargs):
        if path.name == name:
            raise OSError(f"{path} cannot be written")
        return original(path, *args, **kwargs)

    original = files.atomic_open
    with (patch("lib.checkpoint.atomic_open", atomic_open),
          patch("data.files.atomic_open", atomic_open)):
        code, _, err = call("train.py", "--dataset=play.txt", "--out_dir=out/copy", "--overwrite",
                            *SMALL, "--n_layer=2")
    assert is_one_line(code, err, name)
    code, out, err = call("sample.py", "--out_dir=out/copy", "--device=cpu")
    assert is_one_line(code, err, "there is no checkpoint") and not out


def test_a_checkpoint_is_saved_before_the_evaluation(checkout):
    seen = []

    def evaluate(model, data, config, device, stop):
        seen.append(step_of(checkout.folder / "out/first"))
        return original(model, data, config, device, stop)

    original = train.evaluate
    with patch("train.evaluate", evaluate):
        checkout.train("out/first", "--max_iters=4", "--eval_interval=2")
    assert seen == [0, 2, 4]


@pytest.mark.parametrize("interval", [1, 20])
def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(checkout, call, interval):
    code, _, _ = call("train.py", "--dataset=play.txt", "--out_dir=out/nan", *SMALL, "--overwrite",
                      "--max_iters=20", f"--eval_interval={interval}", "--learning_rate=1e29",
                      "--adam_lr=1e29", "--grad_clip=0")
    assert re.search(r"step [1-3]: the loss is not finite; out/nan keeps .* lower --learning_rate",
                     code)
    assert step_of(checkout.folder / "out/nan") == 0, "later weights give no finite loss"
    code, out, err = call("sample.py", "--out_dir=out/nan", "--max_new_tokens=5", "--device=cpu")
    assert code == 0 and len(out) == 5 + len("\n"), err


LOGS = {"one more column": lambda log: log.replace("\r\n", ",x\r\n", 1),
        "one more column throughout": lambda log: log.replace("\r\n", ",1\r\n"),
        "one more cell": lambda log: log[:-2] + ",7\r\n",
        "one more cell in the middle": lambda log: log.replace("\r\n3", ",7\r\n3"),
        "one cell less": lambda log: log.replace(",\r\n3", "\r\n3"),
        "a word": lambda log: log.replace("\r\n3,", "\r\n3,low", 1),
        "cut in an early row": lambda log: log[:len(log) // 3]}


@pytest.mark.parametrize("damage", LOGS)
def test_resume_keeps_a_log_that_it_does_not_understand(call, copy, damage):
    log = (copy / "log.csv").read_bytes().decode()
    assert LOGS[damage](log) != log
    (copy / "log.csv").write_bytes(LOGS[damage](log).encode())
    before = contents(copy)
    code, _, err = call("train.py", "--resume", "--out_dir=out/copy", "--max_iters=10")
    assert is_one_line(code, err, "log.csv:")
    assert contents(copy) == before


def test_resume_makes_the_row_again_that_was_cut_when_the_run_was_killed(checkout, call, copy):
    log = (copy / "log.csv").read_bytes()
    (copy / "log.csv").write_bytes(log[:log.rindex(b"8,") + 4])
    code, _, err = call("train.py", "--resume", "--out_dir=out/copy")
    assert code == 0, err
    assert (copy / "log.csv").read_bytes() == log


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_resume_without_a_log_begins_a_new_one(checkout, call, copy, kind):
    (copy / "log.csv").unlink() if kind == "missing" else (copy / "log.csv").write_text("")
    code, _, err = call("train.py", "--resume", "--out_dir=out/copy", "--max_iters=10")
    assert code == 0, err
    assert [row["step"] for row in rows(checkout, "out/copy")] == ["8", "9", "10"]


def test_resume_without_a_best_checkpoint_makes_one(call, copy):
    (copy / "best.pt").unlink()
    code, _, err = call("train.py", "--resume", "--out_dir=out/copy", "--max_iters=9")
    assert code == 0 and step_of(copy, "best.pt") >= 8, err


def test_a_full_disk_is_told_before_work_is_done(checkout, call):
    with patch("shutil.disk_usage", return_value=SimpleNamespace(free=1_000_000)):
        code, out, err = call("train.py", "--dataset=play.txt", "--out_dir=out/full", *SMALL)
    assert is_one_line(code, err, "out_dir=out/full", "make room") and "step" not in out
    assert contents(checkout.folder / "out/full") == {}


@pytest.mark.parametrize("args", [["--resume", "--max_iters=10"], ["--overwrite", *SMALL]],
                         ids=["resume", "overwrite"])
def test_a_disk_that_fills_up_costs_no_file(call, copy, args):
    before, (soft, hard) = contents(copy), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        code, _, err = call("train.py", "--dataset=play.txt", "--out_dir=out/copy", *args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert is_one_line(code, err, "out/copy/ckpt.pt")
    assert contents(copy) == before, "and nothing is left aside"


# --- Nothing derived is trusted unchecked

@pytest.mark.parametrize("changed", ["trainer", "simulator"])
def test_resume_uses_the_tokenizer_of_the_run(checkout, call, changed):
    """... whatever the same text would give today."""
    out_dir = f"out/{changed}"
    stories = ["--dataset=babilong", "--corpus=play.txt", "--tasks=qa1", "--lengths=0k"]
    bpe = ["--tokenizer=bpe", "--vocab_size=300", "--max_iters=2"]
    args = bpe if changed == "trainer" else [*stories, *bpe]
    code, _, err = call("train.py", "--dataset=play.txt", f"--out_dir={out_dir}", *SMALL, *args)
    assert code == 0, err
    before = (checkout.folder / out_dir / "tokenizer.json").read_bytes()
    other = tokenizers.train_bpe("quite another text, quite another trainer. " * 99, 270)
    with (patch("data.tokenizer.train_bpe", lambda *_: other),
          patch("data.curriculum.tokenizer_text", lambda text: "none of this")):
        code, _, err = call("train.py", "--resume", f"--out_dir={out_dir}", "--max_iters=3")
    assert code == 0, err
    assert (checkout.folder / out_dir / "tokenizer.json").read_bytes() == before


def test_resume_notices_that_the_text_has_changed(checkout, call):
    play = checkout.folder / "changing.txt"
    play.write_text("One text. " * 99)
    args = ["train.py", "--out_dir=out/changing"]
    assert call(*args, "--dataset=changing.txt", *SMALL, "--max_iters=2")[0] == 0
    for text, named in (("text One. ", "changing.txt is not the one"), ("Other?", "vocabulary")):
        play.write_text(text * 99)
        code, _, err = call(*args, "--resume", "--max_iters=4")
        assert is_one_line(code, err, named)


@pytest.mark.parametrize("args", [[], ["--dataset=babilong", "--tasks=qa1", "--lengths=0k"]],
                         ids=["dataset", "corpus"])
def test_resume_finds_the_text_from_another_folder(checkout, args):
    out_dir = checkout.folder / "out/moved"
    checkout.train("out/moved", "--corpus=play.txt", *args, "--max_iters=1", "--overwrite")
    elsewhere = checkout.folder / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    there = Checkout.__new__(Checkout)
    there.folder = elsewhere
    code, _, err = there.call("train.py", "--resume", f"--out_dir={out_dir}", "--max_iters=2")
    assert code == 0 and step_of(out_dir) == 2, err


def test_a_run_that_was_renamed_goes_on_in_its_new_folder(checkout, call, copy):
    """... and the folder that has its old name is left alone."""
    before = contents(checkout.folder / "out/whole")
    code, _, err = call("train.py", "--resume", "--out_dir=out/copy", "--max_iters=9")
    assert code == 0 and step_of(copy) == 9, err
    assert contents(checkout.folder / "out/whole") == before


def test_run_from_before_a_flag_goes_on_as_with_its_default(call, copy):
    saved = json.loads((copy / "config.json").read_text())
    del saved["train"]["init_from"], saved["processes"]
    (copy / "config.json").write_text(json.dumps(saved))
    args = ["train.py", "--resume", "--out_dir=out/copy"]
    code, _, err = call(*args, "--init_from=out/whole")
    assert is_one_line(code, err, "init_from=out/whole cannot change")
    code, _, err = call(*args, "--max_iters=9")
    assert code == 0, err


def test_compile_survives_a_resume(checkout, call, copy):
    saved = json.loads((copy / "config.json").read_text())
    saved["train"]["compile"] = True
    (copy / "config.json").write_text(json.dumps(saved))
    args = ["train.py", "--resume", "--out_dir=out/copy"]
    with (patch("lib.device.can_compile", return_value=True),
          patch("torch.compile", side_effect=lambda model: model) as compiled):
        code, _, err = call(*args, "--max_iters=9")
        assert code == 0 and compiled.called, err
        code, _, err = call(*args, "--max_iters=10", "--compile=False")
        assert code == 0, err
    assert not checkpoint.load_config(copy)["train"]["compile"]
    with patch("lib.device.can_compile", return_value=False):
        code, _, err = call(*args, "--max_iters=11", "--compile")
    assert is_one_line(code, err, "compile=True", "g++", "--compile=False")


# --- Damaged and foreign runs

def edited(name, change):
    """A way to damage a run: change what is in one of its files; a dict may be changed in place."""
    def damage(folder):
        path, is_json = folder / name, name.endswith(".json")
        value = json.loads(path.read_text()) if is_json else torch.load(path, weights_only=True)
        value = change(value) or value
        path.write_text(json.dumps(value)) if is_json else torch.save(value, path)
    return damage


def without(key, part=None):
    """A change for `edited`: a key is gone."""
    def change(found):
        del (found[part] if part else found)[key]
    return change


def truncated(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


DAMAGES = {
    "best.pt copied over ckpt.pt": (
        lambda folder: shutil.copy(folder / "best.pt", folder / "ckpt.pt"), "best.pt"),
    "ckpt.pt of nanoGPT": (edited("ckpt.pt", lambda found: {
        "model": found["model"], "model_args": {}, "optimizer": {}, "iter_num": 3, "config": {},
        "best_val_loss": 2.0}), "another program"),
    "ckpt.pt missing": (lambda folder: (folder / "ckpt.pt").unlink(), "ckpt.pt"),
    "ckpt.pt truncated": (truncated("ckpt.pt"), "ckpt.pt is damaged"),
    "ckpt.pt of another model": (
        edited("ckpt.pt", lambda found: found["model_config"].update(n_layer=2)), "n_layer=2"),
    "ckpt.pt of a newer version": (
        edited("ckpt.pt", lambda found: found["model_config"].update(new=2)), "new"),
    "ckpt.pt with a weight less": (
        edited("ckpt.pt", without("norm.weight", "model")), "norm.weight"),
    "ckpt.pt with another optimizer": (
        edited("ckpt.pt", without(0, "optimizers")), "ckpt.pt"),
    "ckpt.pt with a step that is no number": (
        edited("ckpt.pt", lambda found: found.update(step="8")), "step"),
    "best.pt of another model": (
        edited("best.pt", lambda found: found["model_config"].update(mlp_ratio=9.0)),
        "best.pt has mlp_ratio=9.0"),
    "best.pt damaged": (truncated("best.pt"), "best.pt is damaged"),
    "config.json missing": (lambda folder: (folder / "config.json").unlink(), "no run to resume"),
    "config.json truncated": (truncated("config.json"), "config.json is damaged"),
    "config.json a list": (edited("config.json", lambda found: [found]), "config.json is damaged"),
    "config.json of another run": (
        edited("config.json", lambda found: found["train"].update(n_embd=32)), "n_embd"),
    "config.json with a word for a number": (
        edited("config.json", lambda found: found["train"].update(max_iters="x")), "max_iters=x"),
    "config.json with a list for a word": (
        edited("config.json", lambda found: found["train"].update(memory=["lm2"])), "memory="),
    "config.json with nan": (
        edited("config.json", lambda found: found["train"].update(min_lr=float("nan"))), "min_lr"),
    "config.json with a value out of range": (
        edited("config.json", lambda found: found["train"].update(n_head=-2)), "n_head=-2"),
    "config.json with an unknown key": (
        edited("config.json", lambda found: found["train"].update(bank=2)), "bank is not known"),
    "config.json without a part": (
        edited("config.json", without("train")), "'train'"),
    "config.json with other processes": (
        edited("config.json", lambda found: found.update(processes="two")), "processes=two"),
    "tokenizer.json missing": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    "tokenizer.json without its kind": (
        edited("tokenizer.json", without("kind")), "tokenizer.json"),
    "tokenizer.json of another run": (
        edited("tokenizer.json", lambda found: {**found, "chars": found["chars"][::-1]}),
        "tokenizer.json"),
    "log.csv a folder": (
        lambda folder: (folder / "log.csv").unlink() or (folder / "log.csv").mkdir(), "log.csv"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_or_foreign_run_is_not_resumed(call, copy, name):
    damage, named = DAMAGES[name]
    damage(copy)
    before = {f.name: f.read_bytes() for f in copy.iterdir() if f.is_file()}
    code, _, err = call("train.py", "--resume", "--out_dir=out/copy", "--max_iters=10")
    assert is_one_line(code, err, named)
    assert {f.name: f.read_bytes() for f in copy.iterdir() if f.is_file()} == before


def test_checkpoint_of_a_compiled_model_is_resumed_and_sampled(call, copy):
    for name in ("ckpt.pt", "best.pt"):
        edited(name, lambda found: found.update(
            model={f"_orig_mod.{key}": value for key, value in found["model"].items()}))(copy)
    assert call("sample.py", "--out_dir=out/copy", "--device=cpu", "--max_new_tokens=3")[0] == 0
    code, _, err = call("train.py", "--resume", "--out_dir=out/copy", "--max_iters=9")
    assert code == 0, err


# --- Bad input

FIELDS = {name: field.type for name, field in TrainConfig.__dataclass_fields__.items()}


@pytest.mark.parametrize("name", [name for name, kind in FIELDS.items() if kind in (int, float)])
def test_no_number_is_nan_infinite_or_too_long(name):
    values = ["nan", "inf", "-inf", "NaN", "1e999", "-1e999", "many", "", "0x3"]
    if FIELDS[name] is int:
        values += ["9" * 23, "-" + "9" * 23, "2147483648", "1.5"]
    for value in values:
        with pytest.raises(ValueError, match=f"^{name}={value}"):
            from_dict(TrainConfig, {name: value})


@pytest.mark.parametrize("args, named", [
    (["--bathc_size=3"], "--batch_size"), (["--batch_size=three"], "batch_size=three"),
    (["--batch_size=0"], "batch_size=0"), (["--n_head=3"], "n_head=3"),
    (["--mem_slots=17"], "mem_slots=17"), (["--mem_write=aligned"], "block_size=8"),
    (["--vocab_size=5"], "vocab_size=5"), (["--tokenizer=words"], "tokenizer=words"),
    (["--tokenizer=bpe", "--vocab_size=99"], "vocab_size=99"),
    (["--dataset=shakespear"], "shakespear"), (["--dataset=empty.txt"], "empty.txt is empty"),
    (["--dataset=latin1.txt"], "not UTF-8"), (["--dataset=short.txt"], "too few"),
    (["--dataset="], "dataset is empty"), (["--corpus= "], "corpus is empty"),
    (["--out_dir="], "out_dir is empty"), (["--device=tpu"], "device=tpu"),
    (["--device=meta"], "device=meta"), (["--dtype=int8"], "dtype=int8"),
    (["--config=no.toml"], "no.toml"), (["--resume"], "no run to resume"),
    (["--learning_rate=-1"], "learning_rate=-1"), (["--momentum=1"], "momentum=1"),
    (["--min_lr=1"], "min_lr=1.0 is above learning_rate=0.025"),
    (["--learning_rate=1e300"], "learning_rate=1e+300"), (["--adam_lr=1e300"], "adam_lr=1e+300"),
    (["--weight_decay=1e300"], "weight_decay=1e+300"), (["--rehearse=1.5"], "rehearse=1.5"),
    (["--num_workers=-1"], "num_workers=-1"),
    (["--num_workers=1000000"], "num_workers=1000000"), (["--seed=-1"], "seed=-1"),
    (["--out_dir=play.txt"], "out_dir=play.txt"),
    (["--out_dir=play.txt/run"], "out_dir=play.txt/run"),
    (["--match_params=out/not-there"], "out/not-there"), (["stray"], "stray"), (["-x"], "-x"),
    (["--n_layer = 2"], "--n_layer"), (["--compile=maybe"], "compile=maybe"),
], ids=str)
def test_bad_input_is_refused_in_one_line(checkout, call, args, named):
    for name, content in (("empty.txt", b""), ("latin1.txt", b"caf\xe9 " * 99),
                          ("short.txt", b"To be.")):
        (checkout.folder / name).write_bytes(content)
    code, _, err = call("train.py", "--dataset=play.txt", "--out_dir=out/bad", *SMALL, *args)
    assert is_one_line(code, err, named)
    assert not (checkout.folder / "out/bad").exists()


@pytest.mark.parametrize("flag", ["--n_embd=1000000", "--n_layer=1000000000", "--mlp_ratio=1e300",
                                  "--n_embd=2147483644", "--batch_size=100000000",
                                  "--eval_iters=2147483647"])
def test_what_no_machine_has_memory_for_is_refused_before_it_is_tried(checkout, call, flag):
    code, _, err = call("train.py", "--dataset=play.txt", "--out_dir=out/bad", *SMALL, flag)
    assert is_one_line(code, err, "memory")
    assert not (checkout.folder / "out/bad").exists()


@pytest.mark.parametrize("message", ["DefaultCPUAllocator: can't allocate memory: you tried",
                                     "CUDA out of memory. Tried to allocate 2 GiB"])
def test_memory_that_runs_out_is_told_in_one_line(call, message):
    with patch("train.checkpoint.make_model", side_effect=[torch.nn.Module(), RuntimeError(message)]
               ), patch("train.run.check_memory"):
        train.checkpoint.make_model(None)
        code, _, err = call("train.py", "--dataset=play.txt", "--out_dir=out/bad", *SMALL)
    assert is_one_line(code, err, "out of memory")


# --- Text and consoles

def test_folders_may_have_any_name(checkout):
    checkout.train("out/two words/\u00fcber \u4e2d", "--max_iters=1")
    assert step_of(checkout.folder / "out/two words/\u00fcber \u4e2d") == 1


def test_a_console_that_lacks_a_character_shows_something_else(checkout):
    (checkout.folder / "russian.txt").write_text("\u0416\u0443\u043a " * 300, encoding="utf-8-sig")
    code, out, err = checkout.run("train.py", "--dataset=russian.txt", "--overwrite",
                                  "--out_dir=out/\u0416", *SMALL, "--max_iters=1",
                                  PYTHONIOENCODING="cp1252", PYTHONUTF8="0")
    assert code == 0 and "writes:" in out and "??" in out, err
    tokenizer = json.loads((checkout.folder / "out/\u0416/tokenizer.json").read_text())
    assert tokenizer["chars"] == " \u0416\u043a\u0443", "without the byte order mark"


# --- Help and presets

def test_help_is_in_groups(call):
    code, out, _ = call("train.py", "--help")
    headings = re.findall(r"^(\w+):$", out, re.M)
    groups = ["data", "model", "memory", "optimization", "evaluation", "machine", "run"]
    assert code == 0 and set(groups) <= set(headings)
    assert all(f"--{name} " in out for name in TrainConfig.__dataclass_fields__)


PRESETS = sorted((REPO / "config").glob("*.toml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.name)
def test_every_preset_loads(preset):
    config, given = parse(TrainConfig, "", [f"--config={preset}"])
    assert {"dataset", "out_dir"} <= given
    assert max(map(len, preset.read_text().splitlines())) <= 100
    assert config.n_layer >= (2 if config.dataset == "pairs" else 4)


def test_the_papers_model_has_its_size():
    config, _ = parse(TrainConfig, "", [f"--config={REPO}/config/lm2_1.7b.toml"])
    for memory, billions in (("none", 1.2), ("lm2", 1.7)):
        with torch.device("meta"):
            model = checkpoint.make_model(replace(config.model_config(), memory=memory))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.03)
        assert model.blocks[0].mlp.w_gate.weight.shape == (8192, 2048)
    llama = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
             "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
             "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
             "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                              "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}
    shape = shape_of(llama, "config.json")  # of Llama-3.2-1B, whose weights it begins with
    assert {name: getattr(config, name) for name in shape} == shape


def test_no_two_programs_or_presets_write_into_the_same_folder():
    folders = [tomllib.loads(path.read_text())["out_dir"] for path in PRESETS]
    folders += [TrainConfig(dataset=name).out_dir for name in ("shakespeare", "babilong")]
    folders += [EvalConfig(["run"]).out_dir]
    assert len(PRESETS) == 8 and all(folders)
    assert [folder for folder, n in Counter(folders).items() if n > 1] == []
    assert SampleConfig().out_dir == TrainConfig().out_dir
