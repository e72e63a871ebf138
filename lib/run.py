"""What surrounds the training loop: processes, the start of a run from another one, its stop."""
import math
import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint as recomputed

from data.babilong import parse_tasks
from data.corpus import open_corpus
from data.curriculum import curriculum_of, open_stories
from data.files import lock_file
from data.pairs import open_pairs, parse_numbers
from data.text import check_length, is_corpus, open_text
from lib import checkpoint
from lib.config import from_dict
from lib.device import memory_of
from lm2 import LM2Config

# of a model: what its weights must fit
SHAPE = {f.name for f in fields(LM2Config)} - {"dropout", "window_dropout"}
RESUMABLE = {"max_iters", "lr_decay_iters", "eval_interval", "eval_iters", "device", "dtype",
             "num_workers", "compile", "checkpoint_activations", "out_dir", "resume", "overwrite"}


def processes():
    """
    Rank of this process and number of processes, as torchrun sets them. Raises ValueError where
    the environment says half of it.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return 0, 1
    remedy = "start several processes with torchrun, or unset RANK and WORLD_SIZE"
    numbers = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if numbers["WORLD_SIZE"] == "1":
        numbers["LOCAL_RANK"] = "0"  # nothing is shared out
    for name, value in numbers.items():
        if not value.isdecimal():
            raise ValueError(f"the environment has {name}={value or '(unset)'}: {remedy}")
    rank, world = int(numbers["RANK"]), int(numbers["WORLD_SIZE"])
    if rank >= world:
        raise ValueError(f"RANK={rank} is not below WORLD_SIZE={world}: {remedy}")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if world > 1 and not os.environ.get(name):
            raise ValueError(f"the environment has {name}=(unset): {remedy}")
    return rank, world


def join_processes(device, dtype):
    """
    Join the other processes -> the device of this one, and the dtype that rank 0 brings, so that
    all have the same. Raises ValueError.
    """
    if device.type == "mps":
        raise ValueError("device=mps is not for several processes: use --device=cpu, or start one")
    if device.type == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise ValueError(f"LOCAL_RANK={local} has no GPU, there are {there}: use "
                             f"--nproc_per_node={there}, or --device=cpu")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    try:
        store, rank, world = next(dist.rendezvous("env://"))
        key = "rank 0 has the data"  # for a large corpus only after hours
        if rank:
            store.wait([key], timedelta(days=1))
        else:
            store.set(key, "")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store,
                                rank=rank, world_size=world)
    except dist.DistError as e:
        raise ValueError(f"the processes do not find each other ({checkpoint.one_line(e)}): "
                         "start them with torchrun") from None
    return device, of_rank_0(dtype, device)


def of_rank_0(value, device):
    """What rank 0 has, in each process. All processes must call this together."""
    found = [value]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(found, device=device)
    return found[0]


@contextmanager
def beside_others():
    """Where another process of the run is gone, end this one with one line that says so."""
    try:
        yield
    except RuntimeError as e:  # NCCL has a class of its own for this, gloo has none
        if not isinstance(e, dist.DistError) and "gloo" not in str(e):
            raise
        sys.exit(f"error: another process of this run is gone ({checkpoint.one_line(e)}): see what "
                 "it said, and start all of them again, with --resume where the run has begun")


def leave(lock, world):
    """The end of a run: others may write into its folder (`claim`), this process leaves them."""
    if lock:
        lock.close()
    if world > 1:
        dist.destroy_process_group()


def check_curriculum(config):
    """Raises ValueError where the tasks and lengths, or the pairs, of a config cannot be."""
    if config.dataset == "babilong":
        parse_tasks(config.tasks)
        curriculum_of(config)
    if config.dataset == "pairs":
        parse_numbers(config.pairs)


def check_vocab_size(config, given, tokenizer):
    """Raises ValueError where the user gave a vocab_size that is not the tokenizer's."""
    bound = config.dataset == "pairs" or config.init_from  # to one tokenizer
    other = "" if bound else ", or use --tokenizer=bpe"
    if "vocab_size" in given and config.vocab_size != tokenizer.n_vocab:
        raise ValueError(f"vocab_size={config.vocab_size} does not fit tokenizer "
                         f"{config.tokenizer}, which has {tokenizer.n_vocab} tokens for this text: "
                         f"leave it out{other}")


def check_free(out_dir):
    """Raises ValueError where a folder has a run."""
    if any(Path(out_dir, name).exists() for name in checkpoint.FILES):
        trained = Path(out_dir, "ckpt.pt").exists()  # not so in a run of pretrained.py
        resume = "train.py --resume goes on with it, " if trained else ""
        raise ValueError(f"there is a run in {out_dir}: {resume}--overwrite replaces it, --out_dir "
                         "goes elsewhere")


def claim(out_dir, n_bytes, may_exist):
    """
    Make the folder of a run, with room for n_bytes, which one program at a time may write -> its
    lock, a file that is open until the run ends. Raises ValueError, also where a run that may not
    exist has come into the folder meanwhile.
    """
    checkpoint.make_folder(out_dir, n_bytes)
    path = Path(out_dir, ".lock")
    try:
        lock = lock_file(path)
    except OSError as e:
        raise ValueError(f"{path} cannot be written ({e.strerror}): use another "
                         "--out_dir") from None
    if lock is None:
        raise ValueError(f"another program writes the run in {out_dir}: wait for it, or use "
                         "another --out_dir")
    if not may_exist:
        check_free(out_dir)
    return lock


def open_data(config, tokenizer=None):
    """
    The data set of a run (a data.dataset.Dataset), with the tokenizer of a run that goes on.
    Raises ValueError or OSError, one line that says what to do.
    """
    if config.dataset in ("babilong", "pairs"):
        return (open_stories if config.dataset == "babilong" else open_pairs)(config, tokenizer)
    opened = open_corpus if is_corpus(config.dataset) else open_text
    text = opened(config.dataset, config.tokenizer, config.vocab_size, tokenizer)
    check_length(text, config.n_segments * config.block_size)
    return text


class Stop:
    """
    Ctrl-C and SIGTERM ask for a stop, which the loop makes when it has saved; a second one does
    not wait.
    """

    def __init__(self, device, world):
        self.device, self.world, self.signals = device, world, []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    def asked(self):
        """Whether any process was asked to stop. All processes must call this together."""
        asked = float(len(self.signals))
        if self.world > 1:
            total = torch.tensor(asked, device=self.device)
            dist.all_reduce(total)
            asked = total.item()
        return asked > 0


def resumed(config, given, world):
    """
    The configuration of the run in out_dir, with what a resumed run may change. A step keeps its
    batch when the number of processes changes. Raises ValueError on any other change.
    """
    if not Path(config.out_dir, "config.json").exists():
        raise ValueError(f"there is no run to resume in {config.out_dir}: "
                         "name its folder with --out_dir")
    about = checkpoint.load_config(config.out_dir)
    try:
        saved = from_dict(type(config), about["train"])
    except ValueError as e:
        if not Path(config.out_dir, "ckpt.pt").exists():  # pretrained.py makes none
            raise ValueError(f"{config.out_dir} has no ckpt.pt to go on from: begin a run with its "
                             f"weights, --init_from={config.out_dir}") from None
        raise ValueError(f"{config.out_dir}/config.json is damaged or of another version ({e}): "
                         "copy it again, or train a new run") from None
    for name in given - RESUMABLE:
        if getattr(config, name) != getattr(saved, name):
            raise ValueError(f"{name}={getattr(config, name)} cannot change on --resume: this run "
                             f"has {getattr(saved, name)}")
    before = about.get("processes", 1)
    if not isinstance(before, int) or before < 1:
        raise ValueError(f"{config.out_dir}/config.json is damaged, it has processes={before}: "
                         "copy it again, or train a new run")
    batches, rest = divmod(saved.gradient_accumulation_steps * before, world)
    if rest:
        raise ValueError(f"this run has {before} processes and cannot go on with {world}, its "
                         f"batch would change: use torchrun --nproc_per_node={before}")
    changed = {name: getattr(config, name) for name in given & RESUMABLE | {"out_dir"}}
    return replace(saved, **changed, gradient_accumulation_steps=batches)


def restore(config, data, model, optimizers):
    """
    Put model, optimizers and data where the run in out_dir stopped -> its step, its best
    validation loss. Raises ValueError.
    """
    path, best = (Path(config.out_dir) / name for name in ("ckpt.pt", "best.pt"))
    keys = {"optimizers": list, "step": int, "best_val_loss": float, "sha256": str}
    found = checkpoint.load_file(path, keys)
    checkpoint.check_same_run(path, found, vars(config), data.tokenizer)
    if found["sha256"] != data.meta["sha256"]:
        raise ValueError(f"the text of {config.dataset} is not the one this run was trained on: "
                         "train a new run")
    if found["step"] > config.max_iters:
        raise ValueError(f"max_iters={config.max_iters} is behind this run, which has made "
                         f"{found['step']} steps: give more")
    try:
        model.load_state_dict(found["model"])
        for optimizer, state in zip(optimizers, found["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        data.progress = found.get("progress")
        data.position()
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as e:
        raise ValueError(f"{path} does not fit this run ({checkpoint.one_line(e)}): "
                         "copy it again, or train a new run") from None
    if not best.exists():  # then the next evaluation is the best one
        return found["step"], math.inf
    # the end of the run needs it
    checkpoint.check_same_run(best, checkpoint.load_file(best), vars(config), data.tokenizer)
    return found["step"], found["best_val_loss"]


def check_memory(config, device):
    """
    Raises ValueError where a CPU has less memory than model and batch need at the least: the
    system would end the program without a word.
    """
    n_tokens = config.batch_size * config.n_segments * config.block_size
    try:
        # one block without a bank; the others are as large, or larger
        model = checkpoint.outline(replace(config.model_config(), n_layer=1, mem_layers=0))
    except OverflowError:
        needed = math.inf
    else:
        n_parameters = sum(p.numel() for p in model.parameters())
        n_parameters += (config.n_layer - 1) * sum(p.numel() for p in model.blocks.parameters())
        numbers = 25 * config.n_layer * config.n_embd + 2 * config.vocab_size  # kept for a token
        needed = 12 * n_parameters + 4 * numbers * n_tokens  # weight, gradient and momentum
        needed += 24 * config.eval_iters * config.batch_size  # the windows of an evaluation
    there = memory_of(device)
    if needed >= there:
        raise ValueError(f"the model and a batch of {n_tokens:,} tokens need at least "
                         f"{needed / 1e9:,.0f} GB of memory, {device} has {there / 1e9:,.0f}: use "
                         "a smaller n_layer, n_embd, mlp_ratio, block_size, n_segments, "
                         "batch_size or eval_iters")


def leave_group(worker):
    """A process that makes batches is not to get the Ctrl-C that the training loop gets."""
    os.setpgrp()


def matched_mlp_ratio(config, device):
    """
    The mlp_ratio that gives as many parameters as match_params says: a number, or the folder of a
    run that has as many. Raises ValueError where none comes within 2%, or memory lacks.
    """
    said = config.match_params
    wanted = int(said) if said.isdecimal() else checkpoint.load_config(said)["parameters"]
    model = checkpoint.outline(config.model_config())
    hidden = model.blocks[0].mlp.w_up.out_features
    missing = wanted - sum(p.numel() for p in model.parameters())
    # an MLP has three matrices of this width, and their width is a multiple of 8
    more = 8 * round(missing / (3 * config.n_embd * config.n_layer) / 8)
    if more and config.init_from:
        raise ValueError(f"match_params={said} asks for {wanted:,} parameters, init_from="
                         f"{config.init_from} has {wanted - missing:,}: leave one of them out")
    hidden += more
    # it is rounded up to that multiple
    ratio = (hidden - 4) / config.n_embd if more else config.mlp_ratio
    found = 0
    if hidden > 0:
        config = replace(config, mlp_ratio=ratio)
        try:
            check_memory(config, device)
        except ValueError as e:
            raise ValueError(f"match_params={said} is too much: {e}, or a smaller number") from None
        matched = checkpoint.outline(config.model_config())
        found = sum(p.numel() for p in matched.parameters())
    if not found or abs(found - wanted) > 0.02 * wanted:
        raise ValueError(f"match_params={said} asks for {wanted:,} parameters, which no mlp_ratio "
                         "gives here: change n_embd or n_layer")
    return ratio


def begun_from(config, given):
    """
    init_from: the configuration with that run's shape, and its tokenizer. given: names of what the
    user said, which stays. Raises ValueError.
    """
    saved = checkpoint.load_config(config.init_from)["train"]
    tokenizer = checkpoint.load_tokenizer(config.init_from)
    if "tokenizer" in given and config.tokenizer != tokenizer.kind:
        raise ValueError(f"tokenizer={config.tokenizer} is not that of init_from="
                         f"{config.init_from}, {tokenizer.kind}: leave it out")
    taken = {name: saved[name] for name in SHAPE - given if name in saved}
    try:
        config = from_dict(type(config), asdict(config) | taken | {"tokenizer": tokenizer.kind})
    except ValueError as e:
        raise ValueError(f"init_from={config.init_from} does not fit: {e}") from None
    if config.freeze and not config.n_banks:
        raise ValueError(f"freeze={config.freeze} leaves nothing to train, as there is no bank: "
                         "leave it out, or begin with a run that has banks")
    return config, tokenizer


def initial_weights(config):
    """The weights of the run in init_from, a state dict. Raises ValueError for another shape."""
    model, _, _ = checkpoint.load(config.init_from, "cpu")
    for name, value in vars(model.config).items():
        if name in SHAPE and value != getattr(config, name):
            raise ValueError(f"init_from={config.init_from} has {name}={value}, not "
                             f"{getattr(config, name)}: give --{name}={value}")
    return model.state_dict()


def checkpoint_activations(model):
    """Keep of an LM2's blocks their inputs alone: backward computes each block once more."""
    for block in model.blocks:
        block.forward = partial(recomputed, block.forward, use_reentrant=False)


def freeze(model, part):
    """part: "decoder", all but the banks stays as it is; "": nothing does."""
    for name, p in model.named_parameters():
        p.requires_grad_(not part or ".memory." in name)
