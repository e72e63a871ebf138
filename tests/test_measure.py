"""measure.py: what the figures of bench.py mean. How large they are, is not tested."""
import re
import time

import pytest
import torch

import bench
from lib.measure import (
    Table,
    matmul_flops,
    peak_memories,
    recompute,
    soak,
    time_by_part,
    training_flops,
    update,
)
from lm2 import LM2, MLP, LM2Config

VOCAB, CPU = 32, torch.device("cpu")
SIZE = dict(n_layer=2, n_head=2, n_embd=16, block_size=8)
FLOAT32 = torch.autocast("cpu", enabled=False)


def model(**kwargs):
    """A model whose head and memory are at work."""
    model = LM2(LM2Config(VOCAB, **SIZE | kwargs))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.eval()


def idx(*shape):
    return torch.randint(VOCAB, shape)


def test_an_update_trains():
    trained = model()
    before = [p.clone() for p in trained.parameters()]
    update(trained, FLOAT32, idx(2, 16))()
    assert sum(not torch.equal(p, q) for p, q in zip(trained.parameters(), before)) > len(before) / 2


def test_flops_are_six_a_parameter_and_attention():
    vanilla = model(memory="none")
    parameters = sum(p.numel() for p in vanilla.parameters()) - VOCAB * 16
    assert training_flops(vanilla) == 6 * parameters + 12 * 2 * 16 * 8


def test_peak_memory_grows_with_the_job():
    config = LM2Config(bench.VOCAB, memory="none", **SIZE | {"n_embd": 64})
    (small,), (large,) = (peak_memories(update, [config], "float32", CPU, (rows, 512)) for rows in (1, 64))
    assert large > 2 * small > 0


def test_recomputing_generates_what_the_cache_does():
    """... as long as the window holds the whole text."""
    vanilla, prompt = model(memory="none", block_size=32), idx(1, 8)
    torch.manual_seed(0)
    cached = list(vanilla.stream(prompt, 16))
    torch.manual_seed(0)
    assert list(recompute(vanilla, prompt, 16)) == cached


@pytest.mark.parametrize("backward", [False, True])
def test_matmul_flops_of_a_matrix_product_and_of_attention(backward):
    x = torch.randn(2, 3, 8, 4, requires_grad=backward)  # batch, heads, tokens, width

    def job():
        y = torch.nn.functional.scaled_dot_product_attention(x, x, x) @ x.mT
        if backward:
            y.sum().backward()
    attention, product = 2 * (2 * 2 * 3 * 8 * 8 * 4), 2 * 2 * 3 * 8 * 8 * 4
    assert matmul_flops(job) == (attention * 3.5 + product * 3 if backward else attention + product)  # attention computes its scores again


def test_time_goes_to_the_part_that_spends_it(monkeypatch):
    lm2 = model()
    monkeypatch.setattr(lm2.blocks[0].memory, "gates", lambda *args, gates=lm2.blocks[0].memory.gates: (time.sleep(0.5), gates(*args))[1])
    seconds = time_by_part(update(lm2, FLOAT32, idx(2, 32)), CPU)
    assert seconds.keys() >= {"queries, keys, values", "attention", "read", "output gate", "write", "gates", "MLP", "optimizer"}
    assert max(seconds, key=seconds.get) == "write"  # it calls gates, which slept before its own time began


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(0.5)
        return grad


def test_backward_pass_counts_for_its_part(monkeypatch):
    monkeypatch.setattr(MLP, "forward", lambda self, x, forward=MLP.forward: SlowBackward.apply(forward(self, x)))
    seconds = time_by_part(update(model(), FLOAT32, idx(2, 32)), CPU)
    assert max(seconds, key=seconds.get) == "MLP"


def test_soak_finds_no_drift_and_would_see_one(capsys, monkeypatch):
    lm2 = model()
    soak(lm2, 100)
    monkeypatch.setattr(lm2, "features", lambda ids, state=None, features=lm2.features: features(ids, state if ids.size(1) == 1 else None))
    soak(lm2, 1000)
    drift = [float(d) for d in re.findall(r"(\S+) \|$", capsys.readouterr().out, re.M) if d[0].isdigit()]
    assert max(drift[:2]) < 1e-4 < drift[-1]  # 10 and 100 tokens; 1,000 of which the last chunk alone was read again


def test_ratios_are_to_the_first_rival():
    table, figures = Table(repeats=3), iter((9, 9, 1, 4, 3, 6, 2, 5))  # the first of each is the warm-up
    table.compare("what", "tokens/s", {"a": lambda: next(figures), "b": lambda: next(figures)})
    assert [(row[1], row[3], row[6]) for row in table.rows] == [("a", 2, 1.0), ("b", 5, 2.5)]


@pytest.mark.parametrize("n", [1, 4])
def test_plot_has_a_panel_for_each_comparison(tmp_path, n):
    table = Table(repeats=1)
    for i in range(n):
        table.compare(f"what {i}", "tokens/s", {"a": lambda: 1.0, "b": lambda: 2.0})
    table.write_plot(tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
