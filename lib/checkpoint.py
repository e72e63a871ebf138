"""
Checkpoints. The folder of a run holds
    ckpt.pt         the last step, with the optimizers: train.py --resume goes on from it
    best.pt         the best weights (the last ones of stories, pairs): what the other programs load
    config.json     how it was trained;  tokenizer.json;  log.csv;  loss.png
    .lock           held by the program that writes the run
All of it loads as tensors or as JSON: opening somebody's checkpoint runs no code.

    model, tokenizer, config = checkpoint.load("out/shakespeare")
"""
import json
import os
import shutil
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch

from baselines.rmt import RMT
from data.files import atomic_open, read_utf8
from data.text import digest
from data.tokenizer import from_json
from lib.device import pick_device
from lm2 import LM2, LM2Config

FILES = ("ckpt.pt", "best.pt", "config.json", "tokenizer.json", "log.csv", "loss.png")
COMPILED = "_orig_mod."  # torch.compile puts it in front of the names of weights


def make_model(config):
    """A new model from an LM2Config."""
    return RMT(config) if config.memory == "rmt" else LM2(config)


def outline(config):
    """
    A model of an LM2Config that has shapes alone and takes no memory, to count its parameters.
    Raises OverflowError where a size has more than 64 bits.
    """
    try:
        with torch.device("meta"):
            return make_model(config)
    except (RuntimeError, TypeError) as e:  # torch has no one type for it
        raise OverflowError(str(e)) from None


@contextmanager
def written(path, model, **more):
    """
    Write a model, its LM2Config and whatever else a checkpoint is to hold; at the end of the block
    it appears under its name. Until the block begins, the old file stays, whatever happens.
    """
    with atomic_open(path) as f:
        torch.save({"model_config": asdict(model.config), "model": model.state_dict(), **more}, f)
        f.flush()
        os.fsync(f.fileno())  # no room is noticed here at the latest
        yield


def save(path, model, **more):
    """`written`, with nothing to do in the block."""
    with written(path, model, **more):
        pass


def load_file(path, keys=None):
    """
    The dict that `save` wrote, on the CPU; model_config an LM2Config. keys: {name: type} of what
    else it must hold. Raises ValueError, one line, where it is missing, damaged, or of another
    program or version.
    """
    keys = keys or {}
    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint {path}: train first, or name the folder of a run")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises a different type for each kind of damage
        raise ValueError(f"{path} is damaged ({type(e).__name__}): copy it again, or train again, "
                         "or name another run") from None
    for key, kind in ({"model_config": dict, "model": dict} | keys).items():
        if not isinstance(found, dict) or not isinstance(found.get(key), kind):
            source = "a best.pt" if key in keys else "the checkpoint of another program"
            raise ValueError(f"{path} has no {key!r}: it looks like {source}, name another file")
    try:
        found["model_config"] = LM2Config(**found["model_config"])
    except (TypeError, ValueError) as e:
        raise ValueError(unfit(path, e)) from None
    found["model"] = {str(name).replace(COMPILED, ""): p for name, p in found["model"].items()}
    return found


def unfit(path, error):
    """What to say of a checkpoint that this version of the model cannot take."""
    return (f"{path} does not fit this version of the model ({one_line(error)}): "
            "use the version that trained it, or train again")


def model_of(found, path):
    """The model of a checkpoint that `load_file` loaded from path. Raises ValueError."""
    try:
        model = make_model(found["model_config"])
        model.load_state_dict(found["model"])
    except (TypeError, ValueError, RuntimeError, AttributeError) as e:
        raise ValueError(unfit(path, e)) from None
    return model


def load_json(path):
    """A JSON object of a run. Raises ValueError where it is missing or damaged."""
    if not path.exists():
        raise ValueError(f"{path} is missing: name the folder of a run, or copy all of it again")
    try:
        found = json.loads(read_utf8(path))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: copy the whole folder again")
    return found


def load_config(out_dir):
    """config.json of a run: a dict with `train`, `data`, `parameters`. Raises ValueError."""
    config = load_json(Path(out_dir) / "config.json")
    if "model_type" in config:
        raise ValueError(f"{out_dir} is a model of Hugging Face, not a run: make it one with "
                         f"python pretrained.py {out_dir}")
    for key, kind in (("train", dict), ("data", dict), ("parameters", int)):
        if not isinstance(config.get(key), kind):
            raise ValueError(f"{out_dir}/config.json is damaged, it has no {key!r}: "
                             "copy the whole folder again")
    return config


def load_tokenizer(out_dir):
    """The tokenizer of a run. Raises ValueError."""
    path = Path(out_dir) / "tokenizer.json"
    value = load_json(path)
    try:
        return from_json(value)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def load(out_dir, device="auto"):
    """
    The best model of a run in eval mode on a device, its tokenizer, and its config.json, a dict.
    Raises ValueError, one line, where something is missing, damaged, or of different runs.
    """
    path, device = Path(out_dir) / "best.pt", pick_device(device)
    if not path.exists() and (path.parent / "config.json").exists():
        load_config(out_dir)  # tells what to do with a model of Hugging Face
    found = load_file(path)
    tokenizer, config = load_tokenizer(out_dir), load_config(out_dir)
    check_same_run(path, found, config["train"], tokenizer)
    return model_of(found, path).to(device).eval(), tokenizer, config


def check_same_run(path, found, train_config, tokenizer):
    """
    Raises ValueError where the checkpoint found in path is of another run than config.json and
    tokenizer.json. train_config: a dict.
    """
    for name, value in vars(found["model_config"]).items():
        if train_config.get(name, value) != value:
            raise ValueError(f"{path} has {name}={value}, but config.json beside it "
                             f"{name}={train_config[name]}: they are from different runs")
    sha256, n_vocab = digest(tokenizer), found["model_config"].vocab_size
    if tokenizer.n_vocab != n_vocab or found.get("tokenizer_sha256", sha256) != sha256:
        raise ValueError(f"{path} was trained with another tokenizer than tokenizer.json beside "
                         "it: they are from different runs")


def one_line(error):
    """What an error says, in one line."""
    return " ".join(str(error).split())[:200]


def make_folder(out_dir, n_bytes=0, flag="out_dir"):
    """
    Create the folder that a program writes into. Raises ValueError where it cannot be written to,
    or where its disk has less than n_bytes left. flag: the one that names it.
    """
    with suppress(OSError):
        Path(out_dir).mkdir(parents=True, exist_ok=True)
    if not (Path(out_dir).is_dir() and os.access(out_dir, os.W_OK)):
        raise ValueError(f"{flag}={out_dir} is not a folder that can be written to: "
                         f"use another --{flag}")
    free = shutil.disk_usage(out_dir).free
    if free < n_bytes:
        raise ValueError(f"{flag}={out_dir} has {free / 1e6:,.0f} MB of room left, this needs "
                         f"{n_bytes / 1e6:,.0f} MB: make room, or use another --{flag}")
