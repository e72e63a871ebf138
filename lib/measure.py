"""How bench.py measures: time, memory and the hardware's peak; the jobs; tables, plots, and where the time of an update goes."""
import csv
import math
import re
import time
from collections import Counter
from contextlib import ExitStack, redirect_stdout
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from tqdm import tqdm

from baselines import rmt
from data.files import atomic_open
from lib import checkpoint
from lib.device import autocast
from lm2 import MLP, Attention, MemoryBank, sample

PARTS = (("queries, keys, values", Attention, "project"), ("attention", Attention, "forward"), ("read", MemoryBank, "keys_values"),
         ("read", MemoryBank, "read"), ("output gate", MemoryBank, "output_gate"), ("write", MemoryBank, "write"),
         ("gates", MemoryBank, "gates"), ("MLP", MLP, "forward"), ("attention", rmt, "attend"))  # a part within another counts alone


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


def matmul_flops(job):
    """Floating point operations of all matmuls of a job, those of attention and of Muon included."""
    attention = "_scaled_dot_product_flash_attention"
    for suffix in ("", "_backward"):  # PyTorch's counter does not know this operation by its name on a CPU
        flop_registry[getattr(torch.ops.aten, f"{attention}_for_cpu{suffix}")] = flop_registry[getattr(torch.ops.aten, attention + suffix)]
    with FlopCounterMode(display=False) as counter:
        job()
    return counter.get_total_flops()


def training_flops(model):
    """Floating point operations of training on one token: 6 a parameter, and attention to block_size tokens (PaLM, appendix B)."""
    c = model.config
    return 6 * sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embedding")) + 12 * c.n_layer * c.n_embd * c.block_size


def resident(key="VmRSS"):
    """MiB of memory that this process has now (VmRSS) or had at its peak (VmHWM), by Linux's count."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2 ** 10


def peak_memory(job, device):
    """MiB that a job takes at its peak. On a CPU: what becomes resident, so it needs a process of its own."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        job()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident()
    job()
    return resident("VmHWM") - before


def as_if_trained(config, device):
    """
    A new model of an LM2Config, as far from its start as if it were trained. At the start its head is zero and its memory is shut: a bank
    that nothing enters falls to denormal numbers, which a CPU multiplies at a fraction of its speed.
    """
    model = checkpoint.make_model(config).to(device).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def memory_of(make_job, config, dtype, device, shape):
    """Peak memory in MiB of a job of a new model, on random tokens of a shape (B, L)."""
    model = as_if_trained(config, device)
    return peak_memory(make_job(model, autocast(dtype, device), torch.randint(config.vocab_size, shape, device=device)), device)


def peak_memories(make_job, configs, dtype, device, shape):
    """`memory_of` for each LM2Config, on a CPU in a new process each."""
    jobs = [(make_job, config, dtype, device, shape) for config in configs]
    if device.type == "cuda":
        return [memory_of(*job) for job in jobs]
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.starmap(memory_of, jobs, chunksize=1)


# --- Jobs to measure

def update(model, context, idx):
    """A function that makes a whole update: forward, backward and optimizers."""
    optimizers = model.train().configure_optimizers(0.02, 2e-3, 0.0, idx.device.type)

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


def nanogpt(folder, config):
    """
    nanoGPT's GPT of the size of an LM2Config, made by the model.py in a folder. It trains with its own optimizer and generates as it
    does, behind the names that LM2 has: `configure_optimizers`, `stream`.
    """
    spec = spec_from_file_location("nanogpt", Path(folder) / "model.py")
    module = module_from_spec(spec)
    with redirect_stdout(StringIO()):  # it reports on itself
        spec.loader.exec_module(module)
        model = module.GPT(module.GPTConfig(block_size=config.block_size, vocab_size=config.vocab_size, n_layer=config.n_layer,
                                            n_head=config.n_head, n_embd=config.n_embd, dropout=0.0, bias=False))

    its_optimizer = model.configure_optimizers

    def configure_optimizers(learning_rate, adam_lr, weight_decay, device_type):
        with redirect_stdout(StringIO()):
            return [its_optimizer(weight_decay, adam_lr, (0.9, 0.99), device_type)]
    model.configure_optimizers, model.stream = configure_optimizers, partial(recompute, model)
    return model


def recompute(model, idx, max_new_tokens):
    """`stream` as nanoGPT generates: without a cache, each token reads the last block_size tokens again."""
    for _ in range(max_new_tokens):
        token = sample(model(idx[:, -model.config.block_size:])[0][:, -1])
        yield token
        idx = torch.cat((idx, token[:, None]), dim=1)


# --- Results

def scope(name):
    """The context in which time counts as that of a part."""
    return record_function(f"part {name}")


def time_by_part(job, device):
    """
    Seconds of a job by part of the block, an update's backward pass included: {part: seconds}, the longest first. The profiler's
    own work is in them, so what counts is their shares.
    """
    def scoped(name, function):
        def inside(*args, **kwargs):
            with scope(name):
                return function(*args, **kwargs)
        return inside

    def part(event):
        """The part in which an operation was called; in the backward pass that of its forward operation."""
        while event:
            if event.name.startswith("part "):
                return event.name[5:]
            if event.name.startswith("Optimizer.step"):
                return "optimizer"
            if event.name.startswith("autograd::engine::evaluate_function"):
                return forward.get(event.sequence_nr, "rest")
            event = event.cpu_parent
        return "rest"

    cuda = device.type == "cuda"
    with ExitStack() as stack:
        for name, owner, function in PARTS:
            stack.enter_context(patch.object(owner, function, scoped(name, getattr(owner, function))))
        profiler = stack.enter_context(profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda))
        job()
    forward, seconds = {}, Counter()
    for event in profiler.events():
        if event.sequence_nr >= 0 and not event.name.startswith("autograd::"):
            forward.setdefault(event.sequence_nr, part(event))
    for event in profiler.events():
        seconds[part(event)] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
    return dict(seconds.most_common())


def print_parts(title, jobs, repeats, peak, device):
    """
    A table of where the time of jobs goes, a column each: their median time (they take turns, after a warm-up), spread over the parts
    as the profiler finds it, and what their matmuls would take at the hardware's peak: the floor.
    """
    laps, columns = [[timed(job, device) for job in jobs.values()] for _ in range(repeats + 1)], []
    for job, total in zip(jobs.values(), np.median(laps[1:], axis=0)):
        parts = time_by_part(job, device)
        columns.append({name: seconds / sum(parts.values()) * total for name, seconds in parts.items()})
        columns[-1] |= {"all of it": total, "its matmuls at the matmul peak": matmul_flops(job) / peak}
    print(f"\n| {title} | {' | '.join(jobs)} |\n| --- |{' ---: |' * len(jobs)}")
    for name in max(columns, key=len):
        print(f"| {name} | {' | '.join(f'{1000 * column.get(name, 0):,.1f}' for column in columns)} |", flush=True)


@torch.no_grad()
def soak(model, n_tokens):
    """
    Generate on and on; at each power of ten print how much memory is in use, and what the logits differ by when the whole text is
    read again.
    """
    device, milestones = model.head.weight.device, {10 ** k for k in range(1, 7)}
    state, seen = None, torch.zeros(1, n_tokens + 1, dtype=torch.long, device=device)
    print("| tokens | MiB in use | largest difference of a logit |\n| ---: | ---: | ---: |")
    for i in tqdm(range(n_tokens), leave=False):
        x, state = model.features(seen[:, i:i + 1], state)
        logits = model.head(x[:, -1])
        seen[:, i + 1] = sample(logits)
        if i + 1 in milestones:
            again = None
            for chunk in seen[:, :i + 1].split(16 * model.config.block_size, dim=1):
                x, again = model.features(chunk, again)
            used = torch.cuda.memory_allocated() / 2 ** 20 if device.type == "cuda" else resident()
            print(f"| {i + 1:,} | {used:,.0f} | {(model.head(x[:, -1]) - logits).abs().max():.1e} |", flush=True)


class Table:
    """Figures of rivals that take turns, printed as they come in."""

    def __init__(self, repeats):
        self.repeats, self.rows = repeats, []

    def compare(self, what, unit, jobs, note=lambda name, figure: ""):
        """jobs {rival: function -> figure}, in turns after a warm-up: a row for each rival, with its ratio to the first one."""
        laps = [[job() for job in jobs.values()] for _ in tqdm(range(self.repeats + 1), desc=what, leave=False)]
        quartiles = np.quantile(laps[1:], (0.25, 0.5, 0.75), axis=0).T
        for name, (low, middle, high) in zip(jobs, quartiles):
            self.rows.append((what, name, unit, middle, low, high, middle / quartiles[0][1], note(name, middle)))
            print("| {0} | {1} | {3:,.0f} {2} | {4:,.0f} to {5:,.0f} | {6:.2f} | {7} |".format(*self.rows[-1]), flush=True)

    def write_csv(self, path):
        with atomic_open(path, "w", newline="") as f:
            csv.writer(f).writerows([("what", "rival", "unit", "median", "quartile1", "quartile3", "ratio", "note"), *self.rows])

    def write_plot(self, path):
        """A panel for each comparison: medians as bars, quartiles as whiskers."""
        comparisons = list(dict.fromkeys(row[0] for row in self.rows))
        height = math.ceil(len(comparisons) / 3)
        figure, axes = plt.subplots(height, 3, squeeze=False, figsize=(15, 2.2 * height), layout="constrained")
        for ax, what in zip(axes.flat, comparisons):
            _, names, units, middle, low, high, *_ = zip(*[row for row in reversed(self.rows) if row[0] == what])
            ax.barh(names, middle, xerr=(np.subtract(middle, low), np.subtract(high, middle)), color="0.6")
            ax.set(title=what, xlabel=units[0])
        for ax in axes.flat[len(comparisons):]:
            ax.remove()
        with atomic_open(path) as f:
            figure.savefig(f, dpi=120, format="png")
        plt.close(figure)
