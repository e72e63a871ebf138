"""
Speed and memory, side by side:

    python bench.py                                # everything
    python bench.py --parts=training,data --repeats=9 --csv=bench.csv

Rivals take turns within one run, so that their ratios mean something on a noisy machine; a figure is a median, with its quartiles.
"""
import csv
import random
import re
import time
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
from configurator import parse, user_errors
from data.babilong import Haystack, encode_line, simulate, training_batch
from data.curriculum import tokenizer_text
from data.text import get_batch, read_text
from data.tokenizer import atomic_open, build
from lm2 import LM2Config

PARTS = ("training", "reading", "data")
SIZES = {"cpu": [dict(n_layer=4, n_head=4, n_embd=128, block_size=64), dict(n_layer=6, n_head=6, n_embd=192, block_size=128)],
         "cuda": [dict(n_layer=6, n_head=6, n_embd=384, block_size=256), dict(n_layer=12, n_head=12, n_embd=768, block_size=512)]}
TOKENS = {"cpu": 4096, "cuda": 65536}  # of a training update
VOCAB = 512


@dataclass
class BenchConfig:
    parts: str = ",".join(PARTS)  # what to measure, as in training,data
    repeats: int = 5              # times that each rival is measured
    max_length: int = 131072      # tokens of the longest context that is read
    corpus: str = "shakespeare"   # the text of the data path, as for train.py's dataset
    csv: str = ""                 # file for the figures
    device: str = "auto"          # auto, cpu, cuda, cuda:N or mps
    dtype: str = "auto"           # auto (the faster), float32 or bfloat16

    def __post_init__(self):
        for part in self.parts.split(","):
            if part not in PARTS:
                raise ValueError(f"part {part} in parts={self.parts} is not known: use {', '.join(PARTS)}")
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} must be at least 1")


def rivals(size):
    """{name: LM2Config} of a size; memories have a quarter as many slots as the segment has tokens, but for `aligned`."""
    T = size["block_size"]
    kinds = {"vanilla, window": dict(memory="none"), "vanilla, full": dict(memory="none", attention="full"), "RMT": dict(memory="rmt"),
             "LM2 attend": dict(), "LM2 aligned": dict(mem_write="aligned", mem_slots=T)}
    return {name: LM2Config(VOCAB, **size, **{"mem_slots": T // 4} | kind) for name, kind in kinds.items()}


def timed(function, device):
    """Seconds that a function takes, the device's work included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def matmul_peak(dtype, device):
    """Floating point operations per second in a large matrix product: what the hardware can do."""
    n = 8192 if device.type == "cuda" else 1024
    x = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    return 2 * n ** 3 / min(timed(lambda: x @ x, device) for _ in range(20))


def training_flops(model):
    """Floating point operations of training on one token: 6 a parameter, and attention to block_size tokens (PaLM, appendix B)."""
    c = model.config
    return 6 * sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embedding")) + 12 * c.n_layer * c.n_embd * c.block_size


def update(model, context, idx):
    """A function that makes a whole update: forward, backward and optimizers."""
    optimizers = model.configure_optimizers(0.02, 2e-3, 0.0, idx.device.type)

    def job():
        with context:
            loss = model(idx, idx)[1]
        loss.backward()
        for optimizer in optimizers:
            with context:
                optimizer.step()
            optimizer.zero_grad()
    return job


def read(model, context, idx):
    """A function that reads a context to its end and draws the first token behind it."""
    def job():
        with context:
            next(model.stream(idx, 1))
    return job


def peak_memory(make_job, config, dtype, device, shape):
    """MiB that a job takes beyond the model. On a CPU for a process of its own: what becomes resident, by Linux's count."""
    job = make_job(checkpoint.build(config).to(device), checkpoint.autocast(dtype, device), torch.randint(VOCAB, shape, device=device))
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        job()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    resident = lambda key: int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    before = resident("VmRSS")
    job()
    return (resident("VmHWM") - before) / 2 ** 10


class Bench:
    def __init__(self, config):
        self.config, self.rows = config, []
        self.device = checkpoint.pick_device(config.device)
        self.dtype = checkpoint.pick_dtype(config.dtype, self.device)
        self.context, self.peak = checkpoint.autocast(self.dtype, self.device), matmul_peak(self.dtype, self.device)
        self.kind = "cuda" if self.device.type == "cuda" else "cpu"

    def compare(self, what, unit, jobs, note=lambda name, figure: ""):
        """jobs {rival: function -> figure}, in turns after a warm-up: a row for each rival, with its ratio to the first one."""
        laps = [[job() for job in jobs.values()] for _ in tqdm(range(self.config.repeats + 1), desc=what, leave=False)]
        quartiles = np.quantile(laps[1:], (0.25, 0.5, 0.75), axis=0).T
        for name, (low, middle, high) in zip(jobs, quartiles):
            self.rows.append((what, name, unit, middle, low, high, middle / quartiles[0][1], note(name, middle)))
            print("| {0} | {1} | {3:,.0f} {2} | {4:,.0f} to {5:,.0f} | {6:.2f} | {7} |".format(*self.rows[-1]), flush=True)

    def models(self, size):
        return {name: checkpoint.build(config).to(self.device) for name, config in rivals(size).items()}

    def memory(self, make_job, size, shape):
        """{rival: peak memory of a job, in words}"""
        with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # a new process for each
            return {name: f"{pool.apply(peak_memory, (make_job, config, self.dtype, self.device, shape)):,.0f} MiB"
                    for name, config in rivals(size).items()}

    def rate(self, make_job, model, idx):
        """Tokens per second of a job: a function that runs it once."""
        job = make_job(model, self.context, idx)
        return lambda: idx.numel() / timed(job, self.device)

    def training(self):
        """Whole updates, their peak memory, and the share of the hardware's matmul peak (MFU)."""
        for size, segments in product(SIZES[self.kind], (1, 4, 16)):
            length = segments * size["block_size"]
            shape = (max(1, TOKENS[self.kind] // length), length)
            idx, models, memory = torch.randint(VOCAB, shape, device=self.device), self.models(size), self.memory(update, size, shape)
            self.compare(f"training, {size['n_layer']} x {size['n_embd']}, {segments} segments of {size['block_size']}", "tokens/s",
                         {name: self.rate(update, model, idx) for name, model in models.items()},
                         lambda name, rate: f"{memory[name]}, MFU {rate * training_flops(models[name]) / self.peak:.0%}")

    def reading(self):
        """A long context, batch 1."""
        for length in (n for n in (1024, 4096, 16384, 65536, 131072) if n <= self.config.max_length):
            size, idx = SIZES[self.kind][0], torch.randint(VOCAB, (1, length), device=self.device)
            memory = self.memory(read, size, (1, length))
            self.compare(f"reading {length} tokens", "tokens/s", {name: self.rate(read, model, idx) for name, model in self.models(size).items()},
                         lambda name, rate: memory[name])

    def data(self):
        """The data path, on one core: text batches, stories in a haystack."""
        text, rng = read_text(self.config.corpus)[0][:200_000], np.random.default_rng(0)
        tokenizer = build("bpe", tokenizer_text(text), VOCAB)
        haystack = Haystack(text, tokenizer)
        pieces = [encode_line(line, tokenizer)[0] for line in simulate("qa2", random.Random(0))]
        rate = lambda tokens, job: tokens / timed(job, torch.device("cpu"))
        self.compare("data, batches of 12 x 1,000 tokens", "tokens/s", {
            "text": lambda: rate(12_000, lambda: get_batch(haystack.ids, 1000, 12, 0, 0)),
            "haystack, a story in 1,000 tokens": lambda: rate(12_000, lambda: [haystack.mix(pieces, 1000, rng) for _ in range(12)]),
            "training batch, simulation included": lambda: rate(12_000, lambda: training_batch(["qa1", "qa2"], 1000, haystack, tokenizer, 12, 0, 0))})


def main():
    config, _ = parse(BenchConfig, __doc__)
    with user_errors():
        bench = Bench(config)
        print(f"{bench.device} in {bench.dtype}, {torch.get_num_threads()} threads, matmul peak {bench.peak / 1e9:,.0f} GF/s, "
              f"torch {torch.__version__}, median and quartiles of {config.repeats}\n")
        print("| what | rival | median | quartiles | ratio | peak memory, share of matmul peak |\n| --- | --- | ---: | --- | ---: | --- |")
        for part in config.parts.split(","):
            getattr(bench, part)()
        if config.csv:
            with atomic_open(config.csv, "w", newline="") as f:
                csv.writer(f).writerows([("what", "rival", "unit", "median", "quartile1", "quartile3", "ratio", "note"), *bench.rows])


if __name__ == "__main__":
    main()
