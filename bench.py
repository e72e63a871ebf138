"""
Speed and memory, side by side:

    python bench.py                                # everything
    python bench.py --parts=training,data --repeats=9 --csv=bench.csv --plot=bench.png
    python bench.py --nanogpt=../nanoGPT           # with nanoGPT, from a clone of its repository, as one more rival
    python bench.py --profile                      # where the time goes, by part of the block, and what matmuls alone would need
    python bench.py --soak                         # a million generated tokens: does memory grow, do the logits drift?

Rivals take turns within one run, so that their ratios mean something on a noisy machine; a figure is a median, with its quartiles.
"""
import random
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path
from statistics import median

import numpy as np
import torch

from data.babi import simulate
from data.babilong import Haystack, encode_line
from data.curriculum import tokenizer_text, training_batch
from data.text import get_batch, read_text
from data.tokenizer import build
from lib.config import parse, user_errors
from lib.device import autocast, pick_device, pick_dtype
from lib.measure import (
    Table,
    as_if_trained,
    matmul_peak,
    nanogpt,
    peak_memories,
    print_parts,
    read,
    recompute,
    scope,
    soak,
    timed,
    training_flops,
    update,
)
from lm2 import LM2Config

PARTS = ("training", "generation", "reading", "data")
SIZES = {"cpu": [dict(n_layer=4, n_head=4, n_embd=128, block_size=64), dict(n_layer=6, n_head=6, n_embd=192, block_size=128)],
         "cuda": [dict(n_layer=6, n_head=6, n_embd=384, block_size=256), dict(n_layer=12, n_head=12, n_embd=768, block_size=512)]}
TOKENS = {"cpu": 4096, "cuda": 65536}  # of a training update
VOCAB = 512
N_NEW = 64  # tokens of a generation


@dataclass
class BenchConfig:
    parts: str = ",".join(PARTS)  # what to measure, as in training,data
    repeats: int = 5              # times that each rival is measured
    max_length: int = 131072      # tokens of the longest context
    nanogpt: str = ""             # folder with nanoGPT's model.py, a rival in training (one segment, its context) and generation
    compile: bool = False         # torch.compile all models for training; without figures for memory
    corpus: str = "shakespeare"   # the text of the data path, as for train.py's dataset
    csv: str = ""                 # file for the figures
    plot: str = ""                # file for a plot of the figures, as in bench.png
    profile: bool = False         # instead: the time of an update and of a generation by part of the block
    soak: bool = False            # instead: a million generated tokens, with memory and drift of the logits on the way
    device: str = "auto"          # auto, cpu, cuda, cuda:N or mps
    dtype: str = "auto"           # auto (the faster), float32 or bfloat16

    def __post_init__(self):
        if unknown := set(self.parts.split(",")) - set(PARTS):
            raise ValueError(f"part {min(unknown)} in parts={self.parts} is not known: use {', '.join(PARTS)}")
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} must be at least 1")
        if self.nanogpt and not (Path(self.nanogpt) / "model.py").exists():
            raise ValueError(f"nanogpt={self.nanogpt} has no model.py: clone github.com/karpathy/nanoGPT and name its folder")


def rivals(size):
    """{name: LM2Config} of a size; memories have a quarter as many slots as the segment has tokens, but for `aligned`."""
    T = size["block_size"]
    kinds = {"vanilla, window": dict(memory="none"), "vanilla, full": dict(memory="none", attention="full"), "RMT": dict(memory="rmt"),
             "LM2 attend": dict(), "LM2 aligned": dict(mem_write="aligned", mem_slots=T)}
    return {name: LM2Config(VOCAB, **size, **{"mem_slots": T // 4} | kind) for name, kind in kinds.items()}


class Bench(Table):
    def __init__(self, config):
        super().__init__(config.repeats)
        self.config, self.device = config, pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, self.device)
        self.context, self.peak = autocast(self.dtype, self.device), matmul_peak(self.dtype, self.device)
        self.kind = "cuda" if self.device.type == "cuda" else "cpu"

    def models(self, size, peer=False):
        """{rival: model}, with nanoGPT where it can take part and is wanted."""
        models = {name: as_if_trained(config, self.device) for name, config in rivals(size).items()}
        if peer and self.config.nanogpt:
            models["nanoGPT"] = nanogpt(self.config.nanogpt, LM2Config(VOCAB, **size)).to(self.device).eval()
        return models

    def random(self, *shape):
        return torch.randint(VOCAB, shape, device=self.device)

    def memory(self, make_job, size, shape):
        """{rival: peak memory of a job, in words}"""
        found = peak_memories(make_job, rivals(size).values(), self.dtype, self.device, shape)
        return {name: f"{mib:,.0f} MiB" for name, mib in zip(rivals(size), found)}

    def rate(self, make_job, model, idx):
        """Tokens per second of a job: a function that runs it once."""
        job = make_job(model, self.context, idx)
        return lambda: idx.numel() / timed(job, self.device)

    def training(self):
        """Whole updates, their peak memory, and the share of the hardware's matmul peak (MFU)."""
        for size, segments in product(SIZES[self.kind], (1, 4, 16)):
            length = segments * size["block_size"]
            idx = self.random(max(1, TOKENS[self.kind] // length), length)
            torch.compiler.reset()  # it compiles a function for eight shapes, no more
            models, memory = self.models(size, peer=segments == 1), {} if self.config.compile else self.memory(update, size, idx.shape)
            self.compare(f"training, {size['n_layer']} x {size['n_embd']}, {segments} segments of {size['block_size']}", "tokens/s",
                         {name: self.rate(update, torch.compile(model) if self.config.compile else model, idx) for name, model in models.items()},
                         lambda name, rate: f"{memory.get(name, '-')}, MFU {rate * training_flops(models[name]) / self.peak:.0%}")

    @torch.no_grad()
    def generation(self):
        """Token by token, batch 1, in float32 as sample.py does, and the seconds until the first one."""
        def rate(name, tokens):
            def job():
                stream = tokens()
                latency.setdefault(name, []).append(timed(lambda: next(stream), self.device))
                return N_NEW / timed(lambda: list(islice(stream, N_NEW)), self.device)
            return job

        for size, length in product(SIZES[self.kind], (n for n in (64, 1024, 16384) if n <= self.config.max_length)):
            latency, idx, models = {}, self.random(1, length), self.models(size, peer=True)
            tokens = {"vanilla, recomputed": partial(recompute, models["vanilla, window"], idx, N_NEW + 1)}
            tokens |= {name: partial(model.stream, idx, N_NEW + 1) for name, model in models.items()}
            self.compare(f"generation, {size['n_layer']} x {size['n_embd']}, after {length} tokens", "tokens/s",
                         {name: rate(name, start) for name, start in tokens.items()},
                         lambda name, _: f"first token after {1000 * median(latency[name]):,.0f} ms")

    def reading(self):
        """A long context, batch 1."""
        for length in (n for n in (1024, 4096, 16384, 65536, 131072) if n <= self.config.max_length):
            size, idx = SIZES[self.kind][0], self.random(1, length)
            memory = self.memory(read, size, (1, length))
            self.compare(f"reading {length} tokens", "tokens/s", {name: self.rate(read, model, idx) for name, model in self.models(size).items()},
                         lambda name, _: memory[name])

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

    def profile(self):
        """Where the time of an update, 16 segments to a sequence, and of a generation goes."""
        ids = np.random.default_rng(0).integers(VOCAB, size=1 << 20)

        def with_data(job, idx):
            with scope("data"):
                idx.copy_(get_batch(ids, idx.size(1), len(idx), 0, 0)[0])
            job()

        for size in SIZES[self.kind]:
            length, models = 16 * size["block_size"], self.models(size, peer=True)
            idx = self.random(max(1, TOKENS[self.kind] // length), length)
            jobs = {name: partial(with_data, update(models[name], self.context, idx), idx) for name in ("vanilla, window", "RMT", "LM2 attend")}
            generator = as_if_trained(rivals(size)["LM2 attend"], self.device)
            jobs[f"{N_NEW} tokens of LM2"] = lambda: list(generator.stream(idx[:1, :1], N_NEW))
            if "nanoGPT" in models:  # as many tokens, one segment at a time
                segments = idx.view(-1, size["block_size"])
                jobs["nanoGPT"] = partial(with_data, update(models["nanoGPT"], self.context, segments), segments)
            print_parts(f"ms, {size['n_layer']} x {size['n_embd']}", jobs, self.repeats, self.peak, self.device)

    def soak(self):
        """Generate a million tokens."""
        soak(as_if_trained(rivals(SIZES[self.kind][0])["LM2 attend"], self.device), 1_000_000)


def main():
    config, _ = parse(BenchConfig, __doc__)
    with user_errors():
        bench = Bench(config)
        print(f"{bench.device} in {bench.dtype}, {torch.get_num_threads()} threads, matmul peak {bench.peak / 1e9:,.0f} GF/s, "
              f"torch {torch.__version__}, median and quartiles of {config.repeats}\n")
        if config.profile or config.soak:
            return bench.profile() if config.profile else bench.soak()
        print("| what | rival | median | quartiles | ratio | peak memory, share of matmul peak |\n| --- | --- | ---: | --- | ---: | --- |")
        for part in config.parts.split(","):
            getattr(bench, part)()
        if config.csv:
            bench.write_csv(config.csv)
        if config.plot:
            bench.write_plot(config.plot)


if __name__ == "__main__":
    main()
