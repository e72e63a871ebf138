"""Which device and which arithmetic a program runs on."""
import time
from contextlib import nullcontext

import torch


def pick_device(name):
    """auto: cuda, mps or cpu, the first there is. Raises ValueError on a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device={name} is not there: use auto, cpu, cuda, cuda:N or mps") from None


def pick_dtype(name, device):
    """
    auto: bfloat16 where it is faster than float32, else float32 -> "bfloat16" or "float32". A CPU is timed: bfloat16 matmuls run
    several times faster with AMX, yet at half the speed with AVX512_BF16 alone, and no flag tells the whole story.
    """
    if name not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype={name} is not known: use auto, float32 or bfloat16")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "mps":
        return "float32"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(512, 512, dtype=dtype)
        laps = []
        for _ in range(12):
            start = time.perf_counter()
            x @ x
            laps.append(time.perf_counter() - start)
        seconds[dtype] = min(laps)
    return "bfloat16" if seconds[torch.float32] > 1.5 * seconds[torch.bfloat16] else "float32"


def autocast(dtype, device):
    """The context a model runs in: bfloat16 autocast, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()
