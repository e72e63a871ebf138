"""
Checkpoints: a run's folder holds ckpt.pt (the last step, with the optimizers: --resume goes on from it), best.pt (the weights
with the best validation loss, or of stories the last ones: what sample.py speaks with), config.json, tokenizer.json, log.csv and loss.png.
All of it loads as tensors or JSON: opening somebody's checkpoint runs no code.
"""
import json
import os
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

import torch

from data.tokenizer import atomic_open, from_json
from lm2 import LM2, LM2Config
from rmt import RMT


def build(config):
    """A new model from an LM2Config."""
    return RMT(config) if config.memory == "rmt" else LM2(config)


def save(path, model, **more):
    """Write a model, its LM2Config and whatever else a checkpoint is to hold; killed at any moment, the old file stays whole."""
    with atomic_open(path) as f:
        torch.save({"model_config": asdict(model.config), "model": model.state_dict(), **more}, f)


def read(path):
    """The dict that `save` wrote, on the CPU. Raises ValueError where the file is missing or damaged."""
    if not Path(path).exists():
        raise ValueError(f"there is no checkpoint {path}: train first, or name the folder of a run")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises a different type for each kind of damage
        raise ValueError(f"{path} is damaged ({type(e).__name__}): delete it and train again, or name another run") from None


def load(out_dir, device="auto"):
    """
    The best model of a run, its tokenizer and its configuration (a dict): -> model in eval mode on the device, tokenizer, config.
    Raises ValueError, one line, where something is missing or damaged.
    """
    out_dir, device = Path(out_dir), pick_device(device)
    ckpt = read(out_dir / "best.pt")
    try:
        config = json.loads((out_dir / "config.json").read_text())
        tokenizer = from_json(json.loads((out_dir / "tokenizer.json").read_text()))
        model = build(LM2Config(**ckpt["model_config"]))
        model.load_state_dict(ckpt["model"])
    except (OSError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as e:
        raise ValueError(f"the run in {out_dir} is incomplete or damaged ({str(e).partition(chr(10))[0]}): copy the whole folder again") from None
    if tokenizer.n_vocab != model.config.vocab_size:
        raise ValueError(f"tokenizer.json in {out_dir} has {tokenizer.n_vocab} tokens, the checkpoint {model.config.vocab_size}: "
                         "they are from different runs")
    return model.to(device).eval(), tokenizer, config


def make_folder(out_dir):
    """Create the folder that a program writes into. Raises ValueError where it cannot be written to."""
    with suppress(OSError):
        Path(out_dir).mkdir(parents=True, exist_ok=True)
    if not (Path(out_dir).is_dir() and os.access(out_dir, os.W_OK)):
        raise ValueError(f"out_dir={out_dir} is not a folder that can be written to: use another --out_dir")


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
