"""Training from the command line: what a run leaves, that it goes on where it stopped, and that bad input costs nothing."""
import csv
import json
import re
import signal
import time

import pytest
import torch
from conftest import SMALL

from train import TrainConfig, lr_factor

FILES = {"ckpt.pt", "best.pt", "config.json", "tokenizer.json", "log.csv", "loss.png"}


@pytest.fixture(scope="module")
def run(checkout):
    """A finished run of 8 updates -> what it printed."""
    return checkout.train("out/whole", "--max_iters=8", "--eval_interval=4", "--dropout=0.1", "--momentum=0.8")


def test_run_leaves_its_files_and_ends_with_text_and_their_paths(checkout, run):
    folder = checkout.folder / "out/whole"
    assert {f.name for f in folder.iterdir()} == FILES
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "play.txt (sha256 " in run and "writes:" in run and "out/whole/loss.png" in run and "out/whole/ckpt.pt" in run
    with open(folder / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [int(row["step"]) for row in rows] == list(range(9))
    assert [row["step"] for row in rows if row["val_loss"]] == ["0", "4", "8"]
    assert all(float(row["loss"]) > 0 for row in rows[:-1])
    saved = json.loads((folder / "config.json").read_text())
    assert saved["train"]["max_iters"] == 8 and saved["data"]["source"] == "play.txt" and len(saved["data"]["sha256"]) == 64


def test_best_and_last_can_be_told_apart(checkout, run):
    last, best = (torch.load(checkout.folder / "out/whole" / name, weights_only=True) for name in ("ckpt.pt", "best.pt"))
    assert last["step"] == 8 and best["val_loss"] == last["best_val_loss"] and "optimizers" in last and "optimizers" not in best


def test_run_begins_with_the_weights_of_another(checkout, run):
    checkout.train("out/more", "--max_iters=0", "--init_from=out/whole")
    first, second = (torch.load(checkout.folder / path / "best.pt", weights_only=True) for path in ("out/whole", "out/more"))
    assert all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())
    assert first["val_loss"] == second["val_loss"] and second["step"] == 0


@pytest.mark.parametrize("args, named", [
    (["--init_from=out/nothing"], "out/nothing/best.pt"), (["--init_from=out/whole", "--n_layer=2"], "give --n_layer=1"),
    (["--init_from=out/whole", "--dataset=letters.txt"], "another tokenizer")], ids=str)
def test_weights_of_another_model_are_refused(checkout, call, run, args, named):
    letters = "".join(sorted(set((checkout.folder / "play.txt").read_text())))
    (checkout.folder / "letters.txt").write_text(letters.replace("a", "\u00e4") * 50)  # as many, but others
    code, out, err = call("train.py", "--dataset=play.txt", "--out_dir=out/odd", *SMALL, *args)
    assert code == 2 and err.startswith("error: ") and named in err and err.count("\n") == 1
    assert not (checkout.folder / "out/odd/ckpt.pt").exists()


def test_muon_heeds_its_flags(checkout, run):
    group = torch.load(checkout.folder / "out/whole/ckpt.pt", weights_only=True)["optimizers"][0]["param_groups"][0]
    assert (group["momentum"], group["weight_decay"]) == (0.8, 0.1)


def test_stopped_by_max_iters_and_resumed_gives_the_same_losses(checkout, run):
    checkout.train("out/halves", "--max_iters=4", "--lr_decay_iters=8", "--eval_interval=4", "--dropout=0.1", "--momentum=0.8")
    code, out, err = checkout.run("train.py", "--resume", "--out_dir=out/halves", "--max_iters=8", "--num_workers=2")  # made ahead, the same batches
    assert code == 0, err
    assert checkout.log("out/halves") == checkout.log("out/whole")


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited too long"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_interrupted_and_resumed_gives_the_same_losses(checkout, number):
    args = ["--max_iters=600", "--eval_interval=50"]
    if not (checkout.folder / "out/unbroken").exists():
        checkout.train("out/unbroken", *args)
    out_dir = f"out/{number.name}"
    process = checkout.start("train.py", "--dataset=play.txt", f"--out_dir={out_dir}", *SMALL, *args)
    log = checkout.folder / out_dir / "log.csv"
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 120)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    if number != signal.SIGKILL:
        assert process.returncode == 0 and "stopped at step" in out and "--resume" in out, err
    step = torch.load(checkout.folder / out_dir / "ckpt.pt", weights_only=True)["step"]
    assert 100 <= step < 600
    code, out, err = checkout.run("train.py", "--resume", f"--out_dir={out_dir}")
    assert code == 0, err
    assert checkout.log(out_dir) == checkout.log("out/unbroken")


def test_two_processes_train_as_one_with_the_same_batch(checkout):
    checkout.train("out/one", "--max_iters=6", "--batch_size=4", "--eval_interval=3")
    code, out, err = checkout.run("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29617", "train.py", "--dataset=play.txt",
                                  "--out_dir=out/two", *SMALL, "--max_iters=6", "--batch_size=2", "--eval_interval=3")
    assert code == 0, err
    accumulated = checkout.train("out/accumulated", "--max_iters=6", "--batch_size=2", "--gradient_accumulation_steps=2", "--eval_interval=3")
    losses = {}
    for name in ("one", "two", "accumulated"):
        losses[name] = [float(row["loss"]) for row in csv.DictReader(checkout.log(f"out/{name}").splitlines()) if row["loss"]]
    assert len(losses["one"]) == 6
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4) and losses["accumulated"] == pytest.approx(losses["one"], rel=1e-4)


def test_learning_rate_warms_up_and_decays():
    config = TrainConfig(max_iters=100, warmup_iters=9, learning_rate=0.02, min_lr=0.002)
    factors = [lr_factor(step, config) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[100] == pytest.approx(0.1)
    assert max(factors) == factors[9] and factors[9:] == sorted(factors[9:], reverse=True)
    assert lr_factor(100, TrainConfig(max_iters=50, lr_decay_iters=200)) == pytest.approx(0.5)


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(checkout, call, run):
    code, out, err = call("train.py", "--dataset=play.txt", "--out_dir=out/nan", *SMALL, "--max_iters=20", "--eval_interval=20",
                          "--adam_lr=1e30", "--grad_clip=0")
    assert re.search(r"step [1-3]: the loss is not finite; out/nan keeps .* lower --learning_rate", code)
    code, out, err = call("sample.py", "--out_dir=out/nan", "--max_new_tokens=5", "--device=cpu")
    assert code == 0, err


@pytest.mark.parametrize("args, named", [
    (["--bathc_size=3"], "--batch_size"), (["--batch_size=three"], "batch_size=three"), (["--batch_size=0"], "batch_size=0"),
    (["--n_head=3"], "n_head=3"), (["--mem_slots=17"], "mem_slots=17"), (["--mem_write=aligned"], "block_size=8"),
    (["--vocab_size=5"], "vocab_size=5"), (["--tokenizer=bpe", "--vocab_size=99"], "vocab_size=99"), (["--tokenizer=words"], "tokenizer=words"),
    (["--dataset=shakespear"], "dataset=shakespear"), (["--dataset=empty.txt"], "empty.txt is empty"), (["--dataset=latin1.txt"], "not UTF-8"),
    (["--dataset=short.txt"], "too few"), (["--device=tpu"], "device=tpu"), (["--dtype=int8"], "dtype=int8"), (["--config=no.toml"], "no.toml"),
    (["--resume"], "no run to resume"), (["--resume", "--overwrite"], "exclude each other"), (["--learning_rate=-1"], "learning_rate=-1"),
    (["--momentum=1"], "momentum=1"), (["--rehearse=1.5"], "rehearse=1.5"), (["--num_workers=-1"], "num_workers=-1"),
    (["--out_dir=play.txt"], "out_dir=play.txt"), (["--out_dir=play.txt/run"], "out_dir=play.txt/run")], ids=str)
def test_bad_input_is_refused_in_one_line(checkout, call, args, named):
    for name, content in (("empty.txt", b""), ("latin1.txt", b"caf\xe9 " * 99), ("short.txt", b"To be.")):
        (checkout.folder / name).write_bytes(content)
    code, out, err = call("train.py", "--dataset=play.txt", "--out_dir=out/bad", *SMALL, *args)
    assert code == 2 and err.startswith("error: ") and named in err and err.count("\n") == 1
    assert not (checkout.folder / "out/bad").exists()


@pytest.mark.parametrize("args, named", [
    ([], "there is a run in out/whole"), (["--resume", "--n_layer=2"], "n_layer=2"), (["--resume", "--batch_size=9"], "batch_size=9"),
    (["--resume", "--max_iters=3"], "max_iters=3")], ids=str)
def test_a_run_is_not_overwritten_or_resumed_as_another(checkout, call, run, args, named):
    before = {f.name: f.read_bytes() for f in (checkout.folder / "out/whole").iterdir()}
    code, out, err = call("train.py", "--out_dir=out/whole", *args)
    assert code == 2 and named in err and err.count("\n") == 1
    assert before == {f.name: f.read_bytes() for f in (checkout.folder / "out/whole").iterdir()}


def test_run_from_before_a_flag_goes_on_as_with_its_default(checkout, call):
    checkout.train("out/old", "--max_iters=2", "--lr_decay_iters=4")
    path = checkout.folder / "out/old/config.json"
    saved = json.loads(path.read_text())
    del saved["train"]["init_from"]
    path.write_text(json.dumps(saved))
    code, _, err = call("train.py", "--resume", "--out_dir=out/old", "--init_from=out/whole")
    assert code == 2 and "init_from=out/whole cannot change" in err and err.count("\n") == 1
    code, _, err = call("train.py", "--resume", "--out_dir=out/old", "--max_iters=3")
    assert code == 0, err


def test_overwrite_replaces_a_run(checkout):
    checkout.train("out/again", "--max_iters=4")
    checkout.train("out/again", "--max_iters=2", "--overwrite", "--seed=2")
    assert torch.load(checkout.folder / "out/again/ckpt.pt", weights_only=True)["step"] == 2


def test_resume_notices_that_the_text_has_changed(checkout, call):
    play = checkout.folder / "changing.txt"
    play.write_text("One text. " * 99)
    assert call("train.py", "--dataset=changing.txt", "--out_dir=out/changing", *SMALL, "--max_iters=2")[0] == 0
    play.write_text("Another text. " * 99)
    code, out, err = call("train.py", "--out_dir=out/changing", "--resume", "--max_iters=4")
    assert code == 2 and "changing.txt" in err
