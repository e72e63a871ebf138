"""How bench.py measures: time, peak memory, the hardware's limit, where the time of a job goes."""
import re
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from tqdm import tqdm

from baselines import rmt
from lib.device import autocast
from lib.rivals import as_if_trained
from lm2 import MLP, Attention, MemoryBank, draw_token

MIB = 2 ** 20


# --- Time and the hardware's limit

def timed(function, device):
    """Seconds that a function takes, the device's work included."""
    finish_work(device)
    start = time.perf_counter()
    function()
    finish_work(device)
    return time.perf_counter() - start


def finish_work(device):
    """Wait until a GPU has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def matmul_peak(dtype, device):
    """Floating point operations per second in a large matrix product: what the hardware can do."""
    n = 8192 if device.type == "cuda" else 1024
    x = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    seconds = min(timed(lambda: x @ x, device) for _ in range(20))
    return 2 * n ** 3 / seconds


def matmul_flops(job):
    """Floating point operations of all matmuls of a job, those of attention and Muon included."""
    known = "_scaled_dot_product_flash_attention"
    for backward in ("", "_backward"):  # the counter does not know this operation's name on a CPU
        on_cpu = getattr(torch.ops.aten, f"{known}_for_cpu{backward}")
        flop_registry[on_cpu] = flop_registry[getattr(torch.ops.aten, known + backward)]
    with FlopCounterMode(display=False) as counter:
        job()
    return counter.get_total_flops()


OF_SLOTS = ("w_k", "w_v", "w_in", "w_forget")  # layers of a bank that its slots go through
NO_MATRICES = ("embed", "wpe", "slot_queries", "memory_tokens")  # nothing is multiplied by them
TWICE = ("w_q", "w_k", "w_v")  # layers that `aligned` goes through again, since it reads to write


def training_flops(model, length):
    """
    Floating point operations of training on one token of a sequence: 6 a parameter that it goes
    through, and those of attention to all of it, or to a window of block_size tokens (PaLM,
    appendix B). A bank's slots, mem_slots a segment, go through some parameters instead; tokens
    attend to them, and they to tokens. RMT's memory tokens, twice mem_slots a segment, count too.
    """
    c = model.config
    sees_all = getattr(c, "attention", "full") == "full"  # nanoGPT has no other
    seen = length if sees_all else min(length, c.block_size)
    found = 12 * c.n_layer * c.n_embd * seen
    memory, slots = getattr(c, "memory", "none"), getattr(c, "mem_slots", 0)
    for name, p in model.named_parameters():
        layer = name.split(".")[-2:][0]  # of blocks.0.memory.w_q.weight: w_q
        times = slots / c.block_size if layer in OF_SLOTS else 1
        times *= 2 if layer in TWICE and c.mem_write == "aligned" else 1
        if not any(vectors in name for vectors in NO_MATRICES):
            found += 6 * p.numel() * times
    if memory == "lm2":
        found += 24 * c.n_banks * c.n_embd * slots
    return found * (1 + 2 * slots / c.block_size if memory == "rmt" else 1)


# --- Peak memory

def resident(key="VmRSS"):
    """
    MiB that this process holds now (VmRSS) or held at its peak (VmHWM), by Linux's count; None
    where the system does not tell, as on macOS.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"{key}:\s+(\d+) kB", status)
    return int(found[1]) / 2 ** 10 if found else None


def peak_memory(job, device):
    """
    MiB that a job takes at its peak, or None where nothing tells. On a CPU it is what becomes
    resident, so that the job needs a process of its own.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        job()
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    except OSError:
        return None
    before = resident()
    job()
    peak = resident("VmHWM")
    return None if before is None or peak is None else peak - before


def peak_memory_of(make_job, config, dtype, device, shape):
    """`peak_memory` of a job of a new model, on random tokens of a shape (B, L)."""
    model = as_if_trained(config, device)
    idx = torch.randint(config.vocab_size, shape, device=device)
    return peak_memory(make_job(model, autocast(dtype, device), idx), device)


def peak_memories(make_job, configs, dtype, device, shape):
    """`peak_memory_of` for each LM2Config, a list; on a CPU in a new process each."""
    if device.type == "cuda":
        return [peak_memory_of(make_job, config, dtype, device, shape) for config in configs]
    if resident("VmHWM") is None:
        return [None for _ in configs]
    found = []
    for config in configs:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            future = process.submit(peak_memory_of, make_job, config, dtype, device, shape)
            try:
                found.append(future.result())
            except BrokenProcessPool:  # the system ended it, for want of memory
                found.append(None)
    return found


# --- Where the time of a job goes

SCOPES = (
    ("queries, keys, values", Attention, "project"),
    ("attention", Attention, "forward"),
    ("attention", rmt, "attend"),
    ("read", MemoryBank, "keys_values"),
    ("read", MemoryBank, "read"),
    ("output gate", MemoryBank, "output_gate"),
    ("write", MemoryBank, "write_attend"),
    ("write", MemoryBank, "write_aligned"),
    ("gates", MemoryBank, "gates"),
    ("MLP", MLP, "forward"),
)  # the functions that count for a scope; a scope within another counts for itself alone


def scope(name):
    """The context in which time counts for a scope."""
    return record_function(f"scope {name}")


def scoped(name, function):
    """A function whose time counts for a scope."""
    def inside(*args, **kwargs):
        with scope(name):
            return function(*args, **kwargs)
    return inside


def scope_of(event, forward_scopes):
    """
    The scope in which an operation was called, and "rest" outside of all. An operation of the
    backward pass belongs where its forward operation was called: {sequence number: scope}.
    """
    while event:
        if event.name.startswith("scope "):
            return event.name.removeprefix("scope ")
        if event.name.startswith("Optimizer.step"):
            return "optimizer"
        if event.name.startswith("autograd::engine::evaluate_function"):
            return forward_scopes.get(event.sequence_nr, "rest")
        event = event.cpu_parent
    return "rest"


def profiled(job, device):
    """The profiler's events of a job, each within its scope."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with ExitStack() as stack:
        for name, owner, function in SCOPES:
            replacement = scoped(name, getattr(owner, function))
            stack.enter_context(patch.object(owner, function, replacement))
        profiler = stack.enter_context(profile(activities=activities))
        job()
    return profiler.events()


def time_by_scope(job, device):
    """
    Seconds of a job by scope, the backward pass included: {scope: seconds}, the longest first. The
    profiler's own work is in them, so that what counts is their shares.
    """
    events = profiled(job, device)
    forward_scopes = {}
    for event in events:
        if event.sequence_nr >= 0 and not event.name.startswith("autograd::"):
            forward_scopes.setdefault(event.sequence_nr, scope_of(event, forward_scopes))
    seconds = Counter()
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue  # a kernel: the operation that started it has its time
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        seconds[scope_of(event, forward_scopes)] += own / 1e6
    return dict(seconds.most_common())


def print_scopes(title, jobs, repeats, peak, device):
    """
    A table of where the time of jobs goes, a column each: their median time (they take turns, after
    a warm-up), spread over the scopes as the profiler finds it, and what their matmuls would take
    at the hardware's peak: the floor.
    """
    laps = [[timed(job, device) for job in jobs.values()] for _ in range(1 + repeats)]
    totals = np.median(laps[1:], axis=0)
    columns = []
    for job, total in zip(jobs.values(), totals):
        found = time_by_scope(job, device)
        share = total / sum(found.values())
        column = {name: seconds * share for name, seconds in found.items()}
        column["all of it"] = total
        column["its matmuls at the matmul peak"] = matmul_flops(job) / peak
        columns.append(column)
    print(f"\n| {title} | {' | '.join(jobs)} |")
    print("| --- |" + " ---: |" * len(jobs))
    for name in max(columns, key=len):
        milliseconds = [f"{1000 * column.get(name, 0):,.1f}" for column in columns]
        print(f"| {name} | {' | '.join(milliseconds)} |", flush=True)


@torch.no_grad()
def soak(model, n_tokens):
    """
    Generate on and on. At each power of ten print how many MiB are in use, and by how much the
    logits differ from those of the whole text, read once more.
    """
    device = model.head.weight.device
    seen = torch.zeros(1, n_tokens + 1, dtype=torch.long, device=device)
    state, milestone = None, 10
    print("\n| tokens | MiB in use | largest difference of a logit |\n| ---: | ---: | ---: |")
    for n in tqdm(range(1, n_tokens + 1), leave=False):
        x, state = model.features(seen[:, n - 1:n], state)
        logits = model.head(x[:, -1])
        seen[:, n] = draw_token(logits)
        if n == milestone:
            difference = (last_logits(model, seen[:, :n]) - logits).abs().max()
            used = in_use(device)
            used = "-" if used is None else f"{used:,.0f}"
            print(f"| {n:,} | {used} | {difference:.1e} |", flush=True)
            milestone *= 10


def last_logits(model, idx):
    """The logits behind a long text, which is read in pieces."""
    state = None
    for chunk in idx.split(16 * model.config.block_size, dim=1):
        x, state = model.features(chunk, state)
    return model.head(x[:, -1])


def in_use(device):
    """MiB that this process holds now, on a GPU those of its tensors; None where nothing tells."""
    return torch.cuda.memory_allocated(device) / MIB if device.type == "cuda" else resident()
