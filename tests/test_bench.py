"""bench.py: what it measures and prints. How fast it is, is not tested."""
import csv
from unittest.mock import patch

import pytest
import torch

import bench
from bench import Bench, BenchConfig, rivals
from lib import measure
from lm2 import LM2Config

SIZE = dict(n_layer=2, n_head=2, n_embd=16, block_size=8)


def test_rivals_share_a_size_and_differ_in_memory_alone():
    configs = rivals(SIZE)
    assert [(c.memory, c.attention, c.mem_write, c.mem_slots) for c in configs.values()] == [
        ("none", "window", "attend", 2), ("none", "full", "attend", 2), ("rmt", "window", "attend", 2), ("lm2", "window", "attend", 2),
        ("lm2", "window", "aligned", 8)]
    assert {(c.n_layer, c.n_embd, c.block_size) for c in configs.values()} == {(2, 16, 8)}


@pytest.fixture
def small(monkeypatch):
    """bench.py with a model and an update that take no time."""
    monkeypatch.setitem(bench.SIZES, "cpu", [SIZE])
    monkeypatch.setitem(bench.TOKENS, "cpu", 256)
    monkeypatch.setattr(bench, "N_NEW", 4)
    return Bench(BenchConfig(repeats=1, max_length=1024, device="cpu", dtype="float32"))


def test_training_and_reading_are_measured_for_each_rival(small, monkeypatch):
    monkeypatch.setattr(small, "memory", lambda *_: dict.fromkeys(rivals(SIZE), "1 MiB"))  # new processes are slow
    small.training()
    small.reading()
    assert [row[0] for row in small.rows[::5]] == [f"training, 2 x 16, {n} segments of 8" for n in (1, 4, 16)] + ["reading 1024 tokens"]
    assert [row[1] for row in small.rows] == 4 * list(rivals(SIZE))
    assert "1 MiB, MFU" in small.rows[0][-1]


def test_compiled_are_all_rivals_and_their_memory_is_not_told(small, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    small.config.compile = True
    small.training()
    assert len(compiled) == 3 * len(rivals(SIZE)) and {model.config.memory for model in compiled} == {"lm2", "rmt", "none"}
    assert small.rows[0][-1].startswith("-, MFU")


def test_memory_is_that_of_a_new_process(small):
    with patch.dict(bench.__dict__, rivals=lambda size: {"vanilla": LM2Config(bench.VOCAB, memory="none", **SIZE)}):
        assert small.memory(measure.read, SIZE, (1, 64))["vanilla"].endswith(" MiB")


def test_generation_starts_behind_prompts_and_compares_with_recomputing(small):
    small.generation()
    assert [row[0] for row in small.rows[::6]] == ["generation, 2 x 16, after 64 tokens", "generation, 2 x 16, after 1024 tokens"]
    assert [row[1] for row in small.rows[:6]] == ["vanilla, recomputed", *rivals(SIZE)]
    assert "first token after" in small.rows[0][-1]


NANOGPT = """
from dataclasses import dataclass
import torch
@dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: few")
        self.config, self.wte = config, torch.nn.Embedding(config.vocab_size, config.vocab_size)
    def forward(self, idx, targets=None):
        assert idx.size(1) <= self.config.block_size
        return self.wte(idx)[:, slice(None) if targets is not None else slice(-1, None)], self.wte(idx).square().mean()
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("num decayed parameter tensors: one")
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
"""


def test_nanogpt_takes_part_within_its_context(small, monkeypatch, tmp_path, capsys):
    (tmp_path / "model.py").write_text(NANOGPT)
    monkeypatch.setattr(small, "memory", lambda *_: {})
    small.config.nanogpt = str(tmp_path)
    small.training()
    small.generation()
    assert [row[0] for row in small.rows if row[1] == "nanoGPT"] == [
        "training, 2 x 16, 1 segments of 8", "generation, 2 x 16, after 64 tokens", "generation, 2 x 16, after 1024 tokens"]
    assert all(row[3] > 0 for row in small.rows) and "number of" not in capsys.readouterr().out
    small.profile()
    assert "| 4 tokens of LM2 | nanoGPT |" in capsys.readouterr().out


def test_profile_names_the_parts_of_the_block_and_the_floor(small, capsys):
    small.profile()
    head, _, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.strip().splitlines()]
    rows = {name: [float(ms) for ms in columns] for name, *columns in rows}
    assert head[1:] == ["vanilla, window", "RMT", "LM2 attend", "4 tokens of LM2"]
    assert rows.keys() == {"queries, keys, values", "attention", "read", "output gate", "write", "gates", "MLP", "data", "optimizer", "rest",
                           "all of it", "its matmuls at the matmul peak"}
    assert all(rows["attention"]) and rows["read"][:2] == [0, 0] and rows["data"][3] == 0
    *parts, whole, floor = map(sum, rows.values())
    assert sum(parts) == pytest.approx(whole, rel=0.1) and floor < whole


def test_soak_is_a_million_tokens_of_a_model_whose_memory_is_open(small, monkeypatch):
    calls = []
    monkeypatch.setattr(bench, "soak", lambda model, n_tokens: calls.append((model, n_tokens)))
    small.soak()
    (model, n_tokens), = calls
    assert n_tokens == 1_000_000 and model.head.weight.std() > 0.05 and model.blocks[0].memory.w_v.weight.std() > 0.05


def test_data_path_is_measured_and_written_as_csv(checkout, call):
    code, out, err = call("bench.py", "--parts=data", "--repeats=1", "--corpus=play.txt", "--csv=out/bench.csv", "--plot=out/bench.png",
                          "--device=cpu")
    assert code == 0 and "| haystack, a story in 1,000 tokens |" in out, err
    with open(checkout.folder / "out" / "bench.csv", newline="") as f:
        assert all(float(row["median"]) > 0 for row in csv.DictReader(f))
    assert (checkout.folder / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flag, message", [("--parts=gates", "part gates"), ("--repeats=0", "repeats=0"), ("--corpus=nowhere", "nowhere"),
                                           ("--nanogpt=nowhere", "nowhere has no model.py")])
def test_bad_input_is_refused_in_one_line(call, flag, message):
    code, _, err = call("bench.py", "--parts=data", flag)
    assert code == 2 and message in err and err.count("\n") == 1
