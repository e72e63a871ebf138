"""bench.py: what it measures, prints and writes. How fast it is, is not tested."""
import csv
from itertools import count

import pytest
import torch

import bench
from bench import Bench, BenchConfig, up_to
from lib.measure import resident, training_flops
from lib.origin import hardware
from lib.rivals import as_if_trained, reading, rivals
from lm2 import LM2Config

SIZE = dict(n_layer=2, n_head=2, n_embd=16, block_size=8)


@pytest.fixture
def small(monkeypatch):
    """A Bench with a model and a step that take no time."""
    monkeypatch.setitem(bench.SIZES, "cpu", [SIZE])
    monkeypatch.setitem(bench.STEP_TOKENS, "cpu", 256)
    monkeypatch.setattr(bench, "N_NEW", 4)
    return Bench(BenchConfig(repeats=1, max_length=1024, device="cpu", dtype="float32"))


@pytest.fixture
def without_peak_memory(small, monkeypatch):
    """It needs new processes, which are slow."""
    monkeypatch.setattr(small, "peak_memory", lambda *_: dict.fromkeys(rivals(SIZE), 1.0))


# --- The benchmarks

def test_training_and_reading_are_measured_for_each_rival(small, without_peak_memory, capsys):
    small.training()
    small.reading()
    training = [f"training, 2 x 16, {n} segments of 8" for n in (1, 4, 16)]
    assert [row.what for row in small.rows[::5]] == [*training, "reading 1,024 tokens"]
    assert [row.model for row in small.rows] == 4 * list(rivals(SIZE))
    assert all(row.tokens_per_s > 0 and row.peak_memory_mib == 1 for row in small.rows)
    assert all(row.mfu_percent > 0 for row in small.rows if row.part == "training")
    out = capsys.readouterr().out
    assert "| 1 MiB, " in out
    for part in ("training", "reading"):  # a table each
        assert out.count(f"| {part} float32 | rival |") == 1


def test_figures_are_what_was_timed(small, without_peak_memory, monkeypatch):
    n_streams, first_tokens = len(rivals(SIZE)) + 1, count()

    def half_a_second(job, device):
        job()
        if getattr(job, "func", None) is not next:
            return 0.5
        return 9.0 if next(first_tokens) < n_streams else 0.25  # first each stream warms up

    monkeypatch.setattr(bench, "timed", half_a_second)
    small.peak = 1e9
    small.training()
    for row in small.rows:
        length = 8 * int(row.what.split()[4])
        model = as_if_trained(rivals(SIZE)[row.model], small.device)
        assert row.tokens_per_s == 256 / 0.5
        assert row.mfu_percent == pytest.approx(100 * 512 * training_flops(model, length) / 1e9)
    small.rows.clear()
    small.config.max_length = 16
    small.generation()
    alone, together = small.rows[:n_streams], small.rows[n_streams:]
    assert {row.tokens_per_s for row in alone} == {4 / 0.5}
    assert {row.tokens_per_s for row in together} == {16 * 4 / 0.5}
    assert {row.first_token_ms for row in alone} == {250}, "the warm-up does not count"
    assert {row.what.split(", ")[-1] for row in small.rows} == {"after 16 tokens"}


def test_compiled_are_all_rivals_and_their_peak_memory_is_not_told(small, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    small.config.compile = True
    small.training()
    assert len(compiled) == 3 * len(rivals(SIZE))
    assert {model.config.memory for model in compiled} == {"lm2", "rmt", "none"}
    assert {row.peak_memory_mib for row in small.rows} == {None}


@pytest.mark.skipif(resident("VmHWM") is None, reason="the system does not tell it")
def test_peak_memory_is_that_of_a_new_process(small, monkeypatch):
    config = LM2Config(bench.VOCAB, memory="none", **SIZE)
    monkeypatch.setattr(bench, "rivals", lambda size: {"vanilla": config})
    assert small.peak_memory(reading, SIZE, (1, 64))["vanilla"] > 0


def test_generation_starts_behind_prompts_and_compares_with_recomputing(small):
    small.generation()
    whats = [f"generation, 2 x 16, {rows} at once, after {n:,} tokens"
             for rows, n in ((1, 64), (1, 1024), (16, 64))]
    assert [row.what for row in small.rows[::6]] == whats
    assert [row.model for row in small.rows[:6]] == ["window, recomputed", *rivals(SIZE)]
    assert all(row.tokens_per_s > 0 and row.first_token_ms > 0 for row in small.rows)
    assert {row.dtype for row in small.rows} == {"float32"}  # whatever --dtype says


def test_a_short_max_length_is_measured_itself():
    assert up_to(1000, (64, 1024)) == [64] and up_to(1024, (64, 1024)) == [64, 1024]
    assert up_to(1, (64, 1024)) == [1]


NANOGPT = """
from dataclasses import dataclass
import torch
@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: few")
        self.config = config
        self.wte = torch.nn.Embedding(config.vocab_size, config.vocab_size)
    def forward(self, idx, targets=None):
        assert idx.size(1) <= self.config.block_size
        logits = self.wte(idx)
        return logits if targets is not None else logits[:, -1:], logits.square().mean()
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("num decayed parameter tensors: one")
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas)
"""


def test_nanogpt_takes_part_within_its_context(small, without_peak_memory, tmp_path, capsys):
    (tmp_path / "model.py").write_text(NANOGPT)
    small.config.nanogpt = str(tmp_path)
    small.check()
    small.training()
    small.generation()
    assert [row.what for row in small.rows if row.model == "nanoGPT"] == [
        "training, 2 x 16, 1 segments of 8", "generation, 2 x 16, 1 at once, after 64 tokens",
        "generation, 2 x 16, 1 at once, after 1,024 tokens",
        "generation, 2 x 16, 16 at once, after 64 tokens"]
    assert all(row.tokens_per_s > 0 for row in small.rows)
    small.profile()
    out = capsys.readouterr().out
    assert "| 4 tokens of LM2 | nanoGPT |" in out
    assert "number of" not in out and "num decayed" not in out


def test_the_llama_of_hugging_face_takes_part_in_training(small, without_peak_memory, monkeypatch):
    asked = []

    def stand_in(config):
        asked.append((config.n_layer, config.n_embd))
        return as_if_trained(config, torch.device("cpu"))

    monkeypatch.setattr(bench, "HuggingFaceLlama", stand_in)
    monkeypatch.setattr(bench, "OursAsLlama", stand_in)
    small.config.transformers = True
    small.check()
    small.training()
    for name in ("Hugging Face's Llama", "full attention as a Llama"):
        found = [row.what for row in small.rows if row.model == name]
        assert found == [f"training, 2 x 16, {n} segments of 8" for n in (1, 4, 16)]
    assert asked == 7 * [(2, 16)]  # the first says whether it is there


def test_profile_names_the_parts_of_the_block_and_the_floor(small, capsys):
    small.profile()
    lines = capsys.readouterr().out.strip().splitlines()
    head, _, *rows = [line.strip("| ").split(" | ") for line in lines]
    rows = {name: [float(ms) for ms in columns] for name, *columns in rows}
    assert head == ["ms, 2 x 16", "window", "RMT", "LM2 attend", "4 tokens of LM2"]
    assert rows.keys() == {
        "queries, keys, values", "attention", "read", "output gate", "write", "gates", "MLP",
        "data", "optimizer", "rest", "all of it", "its matmuls at the matmul peak"}
    assert all(rows["attention"])
    assert rows["read"][:2] == [0, 0]  # without memory, and RMT
    assert rows["data"][3] == 0        # of a generation


def test_soak_is_a_million_tokens_of_a_model_whose_memory_is_open(small, monkeypatch):
    calls = []
    monkeypatch.setattr(bench, "soak", lambda model, n_tokens: calls.append((model, n_tokens)))
    small.soak()
    (model, n_tokens), = calls
    assert n_tokens == 1_000_000
    assert model.head.weight.std() > 0.05 and model.blocks[0].memory.w_v.weight.std() > 0.05


# --- The program

DATA = ("--parts=data", "--repeats=1", "--corpus=play.txt", "--device=cpu")


def test_data_path_is_measured_and_written_with_its_command(checkout, call):
    files = ("--csv=out/bench.csv", "--plot=out/bench.png")
    code, out, err = call("bench.py", *DATA, *files)
    assert code == 0, err
    assert "| haystack, a story in 1,000 tokens |" in out
    with open(checkout.folder / "out" / "bench.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["model"] for row in rows] == ["text", "haystack, a story in 1,000 tokens",
                                              "training batch, simulation included"]
    for row in rows:
        assert float(row["tokens_per_s"]) > 0 and row["peak_memory_mib"] == ""
        assert row["threads"] == str(torch.get_num_threads())
        assert row["command"] == " ".join(("python", "bench.py", *DATA, *files))
        assert (row["device"], row["torch"]) == (hardware(torch.device("cpu")), torch.__version__)
    assert (checkout.folder / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_found_is_kept_when_a_later_benchmark_fails(small, monkeypatch, tmp_path,
                                                              capsys):
    def fail():
        raise KeyboardInterrupt

    small.config.csv = str(tmp_path / "bench.csv")
    small.config.parts = "generation,reading"
    monkeypatch.setattr(small, "reading", fail)
    with pytest.raises(KeyboardInterrupt):
        small.run()
    assert (tmp_path / "bench.csv").read_text().count("\ngeneration,") == 18
    assert "\nSpeed of LM2 attend: " in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    (["--parts=gates"], "part gates in parts=gates is not known: use training, generation"),
    (["--parts="], "parts="),
    (["--parts=,"], "parts=,"),
    (["--parts=data,data"], "data twice"),
    (["--repeats=0"], "repeats=0 must be at least 1"),
    (["--max_length=0"], "max_length=0 must be at least 1"),
    (["--max_length=-5"], "max_length=-5 must be at least 1"),
    (["--corpus=nowhere"], "nowhere"),
    (["--corpus=short.txt"], "corpus=short.txt has"),
    (["--corpus=ones.txt"], "corpus=ones.txt has too few different words"),
    (["--parts=data,training", "--nanogpt=nowhere"], "nanogpt=nowhere"),
    (["--parts=data,training", "--nanogpt=data"], "nanogpt=data"),
    (["--nanogpt=data"], "--nanogpt is for training, generation, profile, not for data: leave"),
    (["--max_length=64"], "--max_length is for generation, reading, not for data"),
    (["--parts=training"], "--corpus is for data, not for training"),
    (["--csv=out"], "csv=out cannot be written (it is a folder)"),
    (["--plot=."], "plot=. cannot be written (it is a folder)"),
    (["--csv=."], "csv=. cannot be written (it is a folder)"),
    (["--csv=play.txt/bench.csv"], "csv=play.txt/bench.csv cannot be written"),
    (["--plot=play.txt/bench.png"], "plot=play.txt/bench.png cannot be written"),
    (["--csv=" + 300 * "a"], "cannot be written (File name too long)"),
    (["--csv=same", "--plot=same"], "one file"),
    (["--csv=a.csv", "--plot=./a.csv"], "one file"),
    (["--csv=play.txt"], "csv=play.txt is there, and not made by bench.py"),
    (["--plot=play.txt"], "plot=play.txt is there, and not made by bench.py"),
    (["--profile", "--compile", "--corpus=shakespeare"],
     "--compile is for training, generation, not for profile"),
    (["--profile", "--nanogpt=nowhere", "--corpus=shakespeare"], "nanogpt=nowhere"),
    (["--profile", "--soak"], "exclude each other"),
    (["--dtype=float32"], "--dtype is for training, reading, profile, not for data: leave it out"),
    (["--soak", "--corpus=shakespeare"], "--repeats is for training, generation, reading, data"),
    (["--transformers"], "--transformers is for training, not for data"),
    (["--soak", "--csv=a.csv", "--corpus=shakespeare", "--repeats=5"], "leave them out"),
])
def test_bad_input_is_refused_in_one_line(checkout, call, flags, message):
    (checkout.folder / "short.txt").write_text((checkout.folder / "play.txt").read_text()[:900])
    (checkout.folder / "ones.txt").write_text("1 " * 2000)
    (checkout.folder / "out").mkdir(exist_ok=True)
    code, out, err = call("bench.py", *DATA, *flags)
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert "|" not in out  # nothing was measured


def test_without_a_compiler_compile_is_refused_in_one_line(call, monkeypatch):
    def no_compiler(*_):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", no_compiler)
    code, out, err = call("bench.py", *DATA, "--parts=data,training", "--compile")
    assert code == 2 and "compiler" in err and err.count("\n") == 1
    assert "|" not in out
