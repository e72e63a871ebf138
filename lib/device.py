"""Which device and which arithmetic a program runs on."""
import math
import os
import time
from contextlib import nullcontext
from functools import cache

import torch


def pick_device(name):
    """auto: cuda, mps or cpu, the first there is. Raises ValueError where a device is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
        device = torch.device(name)
    except (RuntimeError, AssertionError, ImportError):
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device={name} is not there: use auto, cpu, cuda, cuda:N or mps")
    return device


def pick_dtype(name, device):
    """
    auto: bfloat16 where it is faster than float32 -> "bfloat16" or "float32". A CPU is timed:
    bfloat16 matmuls run several times faster with AMX, yet at half the speed with AVX512_BF16
    alone, and no flag of the CPU tells the whole story. Raises ValueError.
    """
    if name not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype={name} is not known: use auto, float32 or bfloat16")
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if fast else "float32"
    if device.type == "mps":
        return "float32"
    seconds = {dtype: matmul_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return "bfloat16" if seconds[torch.float32] > 1.5 * seconds[torch.bfloat16] else "float32"


@cache
def matmul_seconds(dtype):
    """Seconds of a matrix product on the CPU: the best of twelve, timed once a process."""
    x = torch.ones(512, 512, dtype=dtype)
    laps = []
    # where bfloat16 is emulated one takes 0.3 s: two are enough, the first of which warms up
    while len(laps) < 2 or len(laps) < 12 and sum(laps) < 0.1:
        start = time.perf_counter()
        x @ x
        laps.append(time.perf_counter() - start)
    return min(laps)


def to_device(batch, device):
    """The tensors of a batch on a device; None stays None."""
    return [x if x is None else x.to(device, non_blocking=True) for x in batch]


def autocast(dtype, device):
    """The context a model runs in: bfloat16 autocast, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def memory_of(device):
    """Bytes of memory that a CPU has for certain; inf where a device itself says when it is out."""
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def pick_compile(wanted, device, long=False):
    """
    None: where it pays off, on a GPU or for a long job, if it works -> True or False. Raises
    ValueError.
    """
    if wanted is False or wanted is None and device.type != "cuda" and not long:
        return False
    if can_compile(device):
        return True
    if wanted:
        raise ValueError("compile=True needs a C++ compiler, and there is none that works: "
                         "install g++ or clang, or use --compile=False")
    return False


def can_compile(device):
    """Whether torch.compile works here: it needs a C++ compiler. Tries it."""
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(8, device=device))
        torch.compiler.reset()
        return True
    except Exception:  # the compiler's errors are of many types
        return False
