"""bench.py: what it measures and prints. How fast it is, is not tested."""
import csv

import pytest
import torch

import bench
from bench import Bench, BenchConfig, peak_memory, rivals, training_flops, update
from lm2 import LM2, LM2Config

SIZE = dict(n_layer=2, n_head=2, n_embd=16, block_size=8)


def test_rivals_share_a_size_and_differ_in_memory_alone():
    configs = rivals(SIZE)
    assert [(c.memory, c.attention, c.mem_write, c.mem_slots) for c in configs.values()] == [
        ("none", "window", "attend", 2), ("none", "full", "attend", 2), ("rmt", "window", "attend", 2), ("lm2", "window", "attend", 2),
        ("lm2", "window", "aligned", 8)]
    assert {(c.n_layer, c.n_embd, c.block_size) for c in configs.values()} == {(2, 16, 8)}


def test_an_update_trains():
    model = LM2(LM2Config(bench.VOCAB, **SIZE))
    before = [p.clone() for p in model.parameters()]
    job = update(model, torch.autocast("cpu", enabled=False), torch.randint(bench.VOCAB, (2, 16)))
    for _ in range(3):
        job()
    assert sum(not torch.equal(p, q) for p, q in zip(model.parameters(), before)) > len(before) / 2


def test_flops_are_six_a_parameter_and_attention():
    model = LM2(LM2Config(bench.VOCAB, memory="none", **SIZE))
    parameters = sum(p.numel() for p in model.parameters()) - bench.VOCAB * 16
    assert training_flops(model) == 6 * parameters + 12 * 2 * 16 * 8


def test_peak_memory_grows_with_the_job():
    config = LM2Config(bench.VOCAB, memory="none", n_layer=2, n_head=2, n_embd=64)
    small, large = (peak_memory(update, config, "float32", torch.device("cpu"), (rows, 512)) for rows in (1, 64))
    assert large > 2 * small > 0


def test_ratios_are_to_the_first_rival(capsys):
    table = Bench(BenchConfig(repeats=3, device="cpu", dtype="float32"))
    figures = iter((9, 9, 1, 4, 3, 6, 2, 5))  # the first of each is the warm-up
    table.compare("what", "tokens/s", {"a": lambda: next(figures), "b": lambda: next(figures)})
    assert [(row[1], row[3], row[6]) for row in table.rows] == [("a", 2, 1.0), ("b", 5, 2.5)]


def test_data_path_is_measured_and_written_as_csv(checkout, call):
    code, out, err = call("bench.py", "--parts=data", "--repeats=1", "--corpus=play.txt", "--csv=out/bench.csv", "--device=cpu")
    assert code == 0 and "| haystack, a story in 1,000 tokens |" in out, err
    with open(checkout.folder / "out" / "bench.csv", newline="") as f:
        assert all(float(row["median"]) > 0 for row in csv.DictReader(f))


@pytest.mark.parametrize("flag, message", [("--parts=gates", "part gates"), ("--repeats=0", "repeats=0"), ("--corpus=nowhere", "nowhere")])
def test_bad_input_is_refused_in_one_line(call, flag, message):
    code, _, err = call("bench.py", "--parts=data", flag)
    assert code == 2 and message in err and err.count("\n") == 1
