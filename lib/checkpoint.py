"""
Checkpoints: a run's folder holds ckpt.pt (the last step, with the optimizers: --resume goes on from it), best.pt (the weights
with the best validation loss, or of stories the last ones: what sample.py speaks with), config.json, tokenizer.json, log.csv and loss.png.
All of it loads as tensors or JSON: opening somebody's checkpoint runs no code.
"""
import json
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from baselines.rmt import RMT
from data.files import atomic_open
from data.tokenizer import from_json
from lib.device import pick_device
from lm2 import LM2, LM2Config


def make_model(config):
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
        model = make_model(LM2Config(**ckpt["model_config"]))
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
