"""
Speed and peak memory, side by side:

    python bench.py                          # all of --parts: training, generation, reading, data
    python bench.py --parts=training,data --repeats=9 --csv=bench.csv --plot=bench.png
    python bench.py --nanogpt=../nanoGPT     # with nanoGPT, from a clone of it, as one more rival
    python bench.py --transformers           # with Hugging Face's Llama
    python bench.py --profile                # where the time goes, what matmuls alone would take
    python bench.py --soak                   # a million tokens: more MiB in use? do logits drift?

Rivals take turns, so that ratios mean something on a noisy machine; a figure is a median.
"""
import random
import secrets
import shlex
import sys
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np
import torch

from data.babi import simulate
from data.babilong import Haystack, encode_line, parse_list
from data.curriculum import tokenizer_text, training_batch
from data.text import get_batch, read_text
from data.tokenizer import make_tokenizer
from lib.config import at_least, parse, user_errors
from lib.device import autocast, pick_compile, pick_device, pick_dtype
from lib.measure import matmul_peak, peak_memories, print_scopes, scope, soak, timed, training_flops
from lib.origin import hardware, origin
from lib.rivals import (
    ATTEND,
    FULL,
    LLAMA,
    NANOGPT,
    PLAIN,
    VOCAB,
    WINDOW,
    HuggingFaceLlama,
    OursAsLlama,
    as_if_trained,
    name_of,
    nanogpt,
    reading,
    recompute,
    rivals,
    training_step,
)
from lib.speed import conclusion, print_rows, take_turns, write_csv, write_plot
from lm2 import LM2, LM2Config

BENCHMARKS = ("training", "generation", "reading", "data")
OF_PARTS = {  # flags, and what they are for
    "max_length": ("generation", "reading"), "nanogpt": ("training", "generation", "profile"),
    "transformers": ("training",), "compile": ("training", "generation"), "corpus": ("data",),
    "dtype": ("training", "reading", "profile"), "repeats": (*BENCHMARKS, "profile")}
SIZES = {
    "cpu": [dict(n_layer=4, n_head=4, n_embd=128, block_size=64),
            dict(n_layer=6, n_head=6, n_embd=192, block_size=128)],
    "cuda": [dict(n_layer=6, n_head=6, n_embd=384, block_size=256),
             dict(n_layer=12, n_head=12, n_embd=768, block_size=512)],
}
STEP_TOKENS = {"cpu": 4096, "cuda": 65536}  # of a training step
N_NEW = 64           # tokens of a generation, behind the first
DATA_BATCH = 12      # rows of a batch of the data path
DATA_LENGTH = 1000   # and their tokens


@dataclass
class BenchConfig:
    # measurements
    parts: str = ",".join(BENCHMARKS)  # what to measure, as in training,data
    repeats: int = 5              # times that each rival is measured
    max_length: int = 131072      # tokens of the longest text to read, and of the longest prompt
    nanogpt: str = ""             # folder of nanoGPT's model.py: a rival in training and generation
    transformers: bool = False    # Hugging Face's Llama, a rival in training
    compile: bool = False         # torch.compile training, and two more rivals in generation
    corpus: str = "shakespeare"   # the text of the data path, as for train.py's corpus
    # measurements instead of these
    profile: bool = False         # the time of a training step and of a generation, by their parts
    soak: bool = False            # a million generated tokens: MiB in use, drift of the logits
    # results
    csv: str = ""                 # file for the figures, as in bench.csv
    plot: str = ""                # file for a plot of the figures, as in bench.png
    # machine
    device: str = "auto"          # auto, cpu, cuda, cuda:N or mps
    dtype: str = "auto"           # auto (the faster), float32 or bfloat16

    def __post_init__(self):
        for name in self.benchmarks:
            if name not in BENCHMARKS:
                raise ValueError(f"part {name} in parts={self.parts} is not known: "
                                 f"use {', '.join(BENCHMARKS)}")
        at_least(self, 1, "repeats", "max_length")
        if self.profile and self.soak:
            raise ValueError("--profile and --soak exclude each other: choose one")
        measured = ["profile"] if self.profile else ["soak"] if self.soak else self.benchmarks
        for name, parts in OF_PARTS.items():
            given = getattr(self, name) != getattr(BenchConfig, name)
            if given and not set(measured) & set(parts):
                raise ValueError(f"--{name} is for {', '.join(parts)}, not for "
                                 f"{', '.join(measured)}: leave it out")
        if self.csv and self.plot and Path(self.csv).resolve() == Path(self.plot).resolve():
            raise ValueError(f"csv={self.csv} and plot={self.plot} are one file: name two")
        if (self.profile or self.soak) and (self.csv or self.plot):
            raise ValueError("--csv and --plot are for the figures of --parts: "
                             "leave them out with --profile and --soak")

    @property
    def benchmarks(self):
        return parse_list("parts", self.parts)


def up_to(longest, lengths):
    """Those of some lengths that are not too long; the longest itself where all are."""
    return [length for length in lengths if length <= longest] or [longest]


def check_writable(config):
    """
    Raises OSError where the file for the figures or their plot cannot be written, ValueError where
    something else lies there.
    """
    for name, begins in (("csv", b"part,what,model,"), ("plot", b"\x89PNG")):
        if not getattr(config, name):  # not wanted
            continue
        path = Path(getattr(config, name))
        try:
            if path.is_file():
                with open(path, "rb") as f:
                    if f.read(len(begins)) != begins:
                        raise ValueError(f"{name}={path} is there, and not made by bench.py: "
                                         "name another file")
            if path.is_dir():
                raise IsADirectoryError
            path.parent.mkdir(parents=True, exist_ok=True)
            probe = path.with_name(f".{path.name}.{secrets.token_hex(12)}.tmp")
            probe.touch()
            probe.unlink()
        except OSError as e:
            raise OSError(f"{name}={path} cannot be written ({e.strerror or 'it is a folder'}): "
                          "name a file in a folder of yours") from None


def open_haystack(corpus):
    """The beginning of a text as a Haystack, and its tokenizer. Raises ValueError, OSError."""
    text = read_text(corpus, "corpus").text[:200_000]
    try:
        tokenizer = make_tokenizer("bpe", tokenizer_text(text), VOCAB)
    except ValueError:
        raise ValueError(f"corpus={corpus} has too few different words for {VOCAB} tokens: "
                         "name a longer text") from None
    haystack = Haystack(text, tokenizer)
    if len(haystack.ids) <= DATA_LENGTH:
        raise ValueError(f"corpus={corpus} has {len(haystack.ids)} tokens: "
                         f"name a text of more than {DATA_LENGTH}")
    return haystack, tokenizer


# --- The benchmarks

class Bench:
    """Each of BENCHMARKS is a method that adds rows."""

    def __init__(self, config):
        self.config = config
        self.rows = []
        self.device = pick_device(config.device)
        self.dtype = pick_dtype("float32" if config.soak else config.dtype, self.device)
        self.context = autocast(self.dtype, self.device)
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        self.sizes, self.step_tokens = SIZES[kind], STEP_TOKENS[kind]

    @cached_property
    def peak(self):
        """Floating point operations per second that the hardware can do: MFU is a share of it."""
        return matmul_peak(self.dtype, self.device)

    def check(self):
        """What can go wrong goes wrong before hours of work. Raises ValueError, OSError."""
        check_writable(self.config)
        if self.config.nanogpt:
            nanogpt(self.config.nanogpt, LM2Config(VOCAB, n_layer=1, block_size=8))
        if self.config.transformers:
            HuggingFaceLlama(rivals(self.sizes[0])[FULL])
        pick_compile(self.config.compile, self.device)
        if "data" in self.config.benchmarks and not self.config.profile and not self.config.soak:
            open_haystack(self.config.corpus)

    def run(self):
        """Measure and print, and write what was found so far after each benchmark."""
        about = {"repeats": self.config.repeats, "command": f"python {shlex.join(sys.argv)}",
                 **origin(self.device), "device": hardware(self.device),
                 "threads": torch.get_num_threads()}
        for name in self.config.benchmarks:
            getattr(self, name)()
            print(f"\n{conclusion(self.rows, name)}", flush=True)
            if self.config.csv:
                write_csv(self.config.csv, self.rows, about)
            if self.config.plot:
                write_plot(self.config.plot, self.rows)

    def models(self, size, others=()):
        """{rival: model}; others: those that are not ours and can take part, if they are wanted."""
        models = {name: as_if_trained(config, self.device)
                  for name, config in rivals(size).items()}
        if NANOGPT in others and self.config.nanogpt:
            model = nanogpt(self.config.nanogpt, LM2Config(VOCAB, **size))
            models[NANOGPT] = model.to(self.device).eval()
        if LLAMA in others and self.config.transformers:
            models[PLAIN] = OursAsLlama(rivals(size)[FULL]).to(self.device)
            models[LLAMA] = HuggingFaceLlama(rivals(size)[FULL]).to(self.device)
        return models

    def add(self, rows):
        """Keep and print the rows of one comparison."""
        is_new = not any(row.part == rows[0].part for row in self.rows)
        self.rows += rows
        print_rows(rows, with_head=is_new)

    def random_tokens(self, *shape):
        return torch.randint(VOCAB, shape, device=self.device)

    def peak_memory(self, make_job, size, shape):
        """{rival: MiB that a job takes at its peak on tokens of a shape, or None}"""
        configs = rivals(size)
        found = peak_memories(make_job, configs.values(), self.dtype, self.device, shape)
        return dict(zip(configs, found))

    def rate(self, job, n_tokens, device=None):
        """A function that does a job on so many tokens once -> tokens per second."""
        def measure():
            return n_tokens / timed(job, device or self.device)
        return measure

    def training(self):
        """Whole steps, their peak memory, and their share of the hardware's matmul peak (MFU)."""
        for size, segments in product(self.sizes, (1, 4, 16)):
            length = segments * size["block_size"]
            idx = self.random_tokens(max(1, self.step_tokens // length), length)
            torch.compiler.reset()  # it compiles a function for eight shapes, no more
            models = self.models(size, others=(LLAMA, NANOGPT) if segments == 1 else (LLAMA,))
            jobs, flops = {}, {}
            for name, model in models.items():
                step = training_step(model, self.context, idx, self.config.compile)
                jobs[name] = self.rate(step, idx.numel())
                flops[name] = training_flops(model, length)
            peaks = {}
            if not self.config.compile:
                peaks = self.peak_memory(training_step, size, idx.shape)
            what = f"training, {name_of(size)}, {segments} segments of {size['block_size']}"
            found = take_turns("training", what, jobs, self.config.repeats)
            self.add([row._replace(peak_memory_mib=peaks.get(name), dtype=self.dtype,
                                   mfu_percent=100 * row.tokens_per_s * flops[name] / self.peak)
                      for name, row in found.items()])

    @torch.no_grad()
    def generation(self):
        """Token by token, in float32 as sample.py does, and the time to the first one."""
        shapes = [(1, n) for n in up_to(self.config.max_length, (64, 1024, 16384))]
        shapes.append((16, min(64, self.config.max_length)))
        for size, (rows, length) in product(self.sizes, shapes):
            idx = self.random_tokens(rows, length)
            models = self.models(size, others=(NANOGPT,))
            streams = {f"{WINDOW}, recomputed": partial(recompute, models[WINDOW])}
            for name, model in models.items():
                is_ours = isinstance(model, LM2)
                streams[name] = model.stream if is_ours else partial(recompute, model)
            if self.config.compile:
                torch.compiler.reset()
                for name in (WINDOW, ATTEND):
                    streams[f"{name}, compiled"] = partial(models[name].stream, compiled=True)
            first_tokens = {name: [] for name in streams}  # seconds
            jobs = {name: self.generation_rate(stream, idx, first_tokens[name])
                    for name, stream in streams.items()}
            what = f"generation, {name_of(size)}, {rows} at once, after {length:,} tokens"
            found = take_turns("generation", what, jobs, self.config.repeats)
            milliseconds = {name: 1000 * median(seconds[1:])  # without the warm-up
                            for name, seconds in first_tokens.items()}
            self.add([row._replace(first_token_ms=milliseconds[name], dtype="float32")
                      for name, row in found.items()])

    def generation_rate(self, stream, idx, first_tokens):
        """A function that generates once -> tokens per second behind the first, which it times."""
        def measure():
            tokens = stream(idx, 1 + N_NEW)
            first_tokens.append(timed(partial(next, tokens), self.device))
            return len(idx) * N_NEW / timed(partial(list, tokens), self.device)
        return measure

    def reading(self):
        """A long text, batch 1."""
        size = self.sizes[0]
        for length in up_to(self.config.max_length, (1024, 4096, 16384, 65536, 131072)):
            idx = self.random_tokens(1, length)
            peaks = self.peak_memory(reading, size, idx.shape)
            jobs = {name: self.rate(reading(model, self.context, idx), length)
                    for name, model in self.models(size).items()}
            what = f"reading {length:,} tokens"
            found = take_turns("reading", what, jobs, self.config.repeats)
            self.add([row._replace(peak_memory_mib=peaks[name], dtype=self.dtype)
                      for name, row in found.items()])

    def data(self):
        """The data path, on one core: batches of text, stories in a haystack."""
        haystack, tokenizer = open_haystack(self.config.corpus)
        rng = np.random.default_rng(0)
        story = simulate("qa2", random.Random(0))
        pieces = [encode_line(line, tokenizer)[0] for line in story]

        def text():
            get_batch(haystack.ids, DATA_LENGTH, DATA_BATCH, seed=0, step=0)

        def hide_stories():
            for _ in range(DATA_BATCH):
                haystack.mix(pieces, DATA_LENGTH, rng)

        def simulate_stories():
            training_batch(["qa1", "qa2"], DATA_LENGTH, haystack, tokenizer, DATA_BATCH, 0, 0)

        jobs = {"text": text, "haystack, a story in 1,000 tokens": hide_stories,
                "training batch, simulation included": simulate_stories}
        rates = {name: self.rate(job, DATA_BATCH * DATA_LENGTH, torch.device("cpu"))
                 for name, job in jobs.items()}
        what = "data, batches of 12 x 1,000 tokens"
        self.add(list(take_turns("data", what, rates, self.config.repeats).values()))

    def profile(self):
        """Where the time of a training step (16 segments a sequence) and of a generation goes."""
        for size in self.sizes:
            length = 16 * size["block_size"]
            idx = self.random_tokens(max(1, self.step_tokens // length), length)
            models = self.models(size, others=(NANOGPT,))
            generator = as_if_trained(rivals(size)[ATTEND], self.device)
            jobs = {name: self.step_with_data(models[name], idx)
                    for name in (WINDOW, "RMT", ATTEND)}
            jobs[f"{N_NEW} tokens of LM2"] = lambda: list(generator.stream(idx[:1, :1], N_NEW))
            if NANOGPT in models:  # as many tokens, a segment at a time
                segments = idx.view(-1, size["block_size"])
                jobs[NANOGPT] = self.step_with_data(models[NANOGPT], segments)
            title, repeats = f"ms, {name_of(size)}", self.config.repeats
            print_scopes(title, jobs, repeats, self.peak, self.device)

    def step_with_data(self, model, idx):
        """A function that draws a batch of the shape of idx and makes a training step."""
        ids = np.random.default_rng(0).integers(VOCAB, size=1 << 20)
        step = training_step(model, self.context, idx)

        def job():
            with scope("data"):
                x, _ = get_batch(ids, idx.size(1), len(idx), seed=0, step=0)
                idx.copy_(x)
            step()
        return job

    def soak(self):
        """Generate a million tokens."""
        soak(as_if_trained(rivals(self.sizes[0])[ATTEND], self.device), 1_000_000)


def main():
    config, _ = parse(BenchConfig, __doc__)
    with user_errors():
        bench = Bench(config)
        bench.check()
        print(f"{hardware(bench.device)} in {bench.dtype}, threads: {torch.get_num_threads()}, "
              f"matmul peak {bench.peak / 1e9:,.0f} GF/s (MFU is a share of it), "
              f"torch {torch.__version__}, median and quartiles of {config.repeats}", flush=True)
        if config.profile:
            bench.profile()
        elif config.soak:
            bench.soak()
        else:
            bench.run()


if __name__ == "__main__":
    main()
