"""
Train LM2 on text, or on the stories of BABILong:

    python train.py --dataset=shakespeare
    python train.py --dataset=my/notes.txt --tokenizer=bpe --out_dir=out/notes
    python train.py --dataset=babilong --tasks=qa1,qa2 --lengths=0k,256,1k --tokenizer=bpe --vocab_size=512
    torchrun --nproc_per_node=2 train.py --dataset=shakespeare

A run writes ckpt.pt, best.pt, config.json, tokenizer.json, log.csv and loss.png into its folder, out/DATASET.
"""
import csv
import json
import math
import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import curriculum, text
from data.files import atomic_open, write_json
from data.loader import batches
from lib import checkpoint
from lib.config import parse, user_errors
from lib.device import autocast, pick_device, pick_dtype
from lm2 import LM2Config


@dataclass
class TrainConfig(LM2Config):
    vocab_size: int = 1024         # tokens of the bpe tokenizer; char and gpt2 bring their own
    # data
    dataset: str = "shakespeare"   # shakespeare, a text file, a folder of .txt files, or babilong
    tokenizer: str = "char"        # char, bpe or gpt2
    tasks: str = "qa1"             # babilong: the tasks, all in every batch, as in qa1,qa2
    lengths: str = "0k,256,512"    # babilong: the curriculum of lengths in tokens, 0k is the bare story
    rehearse: float = 0.3          # babilong: share of the updates that take any of the lengths reached so far
    corpus: str = "shakespeare"    # babilong: the text around the facts, as for dataset
    out_dir: str = ""              # folder of the run, default out/DATASET
    # optimization
    n_segments: int = 4            # segments of block_size in a training sequence: how far gradients flow through the memory
    batch_size: int = 6            # sequences in a batch, of each process; babilong: as many tokens in stories of any length
    gradient_accumulation_steps: int = 1  # batches in an update, of each process
    max_iters: int = 1500          # updates
    learning_rate: float = 0.025   # of Muon, for the hidden matrices
    adam_lr: float = 4.5e-3        # of AdamW, for everything else
    momentum: float = 0.9          # of Muon
    warmup_iters: int = 20         # updates until the learning rates are at their peak
    lr_decay_iters: int = 0        # updates until they are down at min_lr, 0: max_iters
    min_lr: float = 0.0            # last learning rate of Muon; AdamW's falls by the same factor
    weight_decay: float = 0.1      # of the hidden matrices
    grad_clip: float = 1.0         # largest norm of the gradient, 0: any
    seed: int = 1337               # of initialisation, batches and dropout
    # evaluation
    eval_interval: int = 500       # updates between evaluations, each followed by a checkpoint
    eval_iters: int = 40           # batches in an evaluation
    advance_at: float = 0.95       # babilong: accuracy at a length that moves the curriculum on
    # machine
    device: str = "auto"           # auto, cpu, cuda, cuda:N or mps
    dtype: str = "auto"            # of the matmuls: auto (the faster), float32 or bfloat16; the memory stays float32
    num_workers: int = 0           # processes that make batches ahead, for a GPU that would wait for stories
    compile: bool = False          # torch.compile the model; on by itself with cuda
    match_params: str = ""         # folder of a run: widen the MLP until the model has as many parameters, within 2%
    # a run that exists
    init_from: str = ""            # folder of a run of the same model and tokenizer, whose weights this run begins with
    resume: bool = False           # go on where the run in out_dir stopped, with its configuration
    overwrite: bool = False        # replace the run in out_dir

    def __post_init__(self):
        super().__post_init__()
        positive = ("n_segments", "batch_size", "gradient_accumulation_steps", "eval_interval", "eval_iters")
        for name, value in asdict(self).items():
            if not isinstance(value, str) and value < (name in positive):
                raise ValueError(f"{name}={value} must be at least {int(name in positive)}")
        for name in ("momentum", "rehearse"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be below 1")
        self.out_dir = self.out_dir or str(Path("out") / Path(self.dataset).resolve().stem)


RESUMABLE = {"max_iters", "lr_decay_iters", "eval_interval", "eval_iters", "device", "dtype", "num_workers", "compile", "out_dir", "resume"}


def resumed(config, given):
    """The configuration of the run in out_dir, with what a resumed run may change. Raises ValueError on anything else."""
    path = Path(config.out_dir) / "config.json"
    if not path.exists():
        raise ValueError(f"there is no run to resume in {config.out_dir}: name its folder with --out_dir")
    try:
        saved = TrainConfig(**json.loads(path.read_text())["train"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: copy it again, or train a new run") from None
    for key in given:
        if key not in RESUMABLE and getattr(config, key) != getattr(saved, key):
            raise ValueError(f"{key}={getattr(config, key)} cannot change on --resume: this run has {getattr(saved, key)}")
    return replace(saved, **{key: getattr(config, key) for key in given & RESUMABLE} | {"out_dir": config.out_dir})


def lr_factor(step, config):
    """What both learning rates are multiplied with: linear warm-up, then linear decay to min_lr."""
    last = config.min_lr / config.learning_rate if config.learning_rate else 0.0
    left = max(0.0, 1 - step / (config.lr_decay_iters or config.max_iters))
    return min(1.0, (step + 1) / (config.warmup_iters + 1)) * (last + (1 - last) * left)


def plot_losses(rows, columns, path):
    """loss.png: the loss of each batch and what was evaluated, over the updates."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for column in ("loss", *(c for c in columns if c != "length")):
        points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
        if points:
            style = dict(lw=0.5, color="0.7") if column == "loss" else dict(marker="o")
            axes.plot(*zip(*points), ms=3, label=column, **style)
    axes.set(xlabel="updates", ylabel="nats per token, accuracy", ylim=(0, None))
    axes.legend()
    with atomic_open(path) as f:
        figure.savefig(f, dpi=120, format="png")
    plt.close(figure)


class Log:
    """log.csv: a row per update, with the evaluated losses where there are any. Bit for bit the same when a run is repeated."""

    def __init__(self, path, columns, step):
        """columns: those of an evaluation. Keeps the rows of a resumed run before a step."""
        self.rows = []
        if step:
            with open(path, newline="") as f:
                self.rows = [row for row in csv.DictReader(f) if int(row["step"]) < step]
        self.file = open(path, "w", newline="", buffering=1)
        self.writer = csv.DictWriter(self.file, ("step", "loss", "learning_rate", *columns))
        self.writer.writeheader()
        self.writer.writerows(self.rows)

    def add(self, **row):
        self.rows.append({key: repr(value) for key, value in row.items()})
        self.writer.writerow(self.rows[-1])


def model_config(config):
    """The part of a TrainConfig that describes the model."""
    return LM2Config(**{f.name: getattr(config, f.name) for f in fields(LM2Config)})


def matched_mlp_ratio(config):
    """The mlp_ratio that gives as many parameters as the run in match_params has. Raises ValueError where none comes within 2%."""
    path = Path(config.match_params) / "config.json"
    if not path.exists():
        raise ValueError(f"match_params={config.match_params} is not the folder of a run: there is no {path}")
    wanted = json.loads(path.read_text())["parameters"]
    with torch.device("meta"):
        model = checkpoint.make_model(model_config(config))
        hidden = model.blocks[0].mlp.w_up.out_features
        more = wanted - sum(p.numel() for p in model.parameters())
    hidden += 8 * round(more / (3 * config.n_embd * config.n_layer) / 8)  # the MLPs' hidden width is a multiple of 8
    ratio = (hidden - 4) / config.n_embd                                    # and rounded up to it
    with torch.device("meta"):
        found = sum(p.numel() for p in checkpoint.make_model(model_config(replace(config, mlp_ratio=ratio))).parameters())
    if abs(found - wanted) > 0.02 * wanted:
        raise ValueError(f"match_params={config.match_params} has {wanted:,} parameters, the nearest here is {found:,}: change n_embd or n_layer")
    return ratio


def initial_weights(config, tokenizer):
    """The weights of the run in init_from, a state dict. Raises ValueError where its model or tokenizer is another."""
    model, its_tokenizer, _ = checkpoint.load(config.init_from, "cpu")
    for name, value in asdict(model.config).items():
        if value != getattr(config, name) and "dropout" not in name:
            raise ValueError(f"init_from={config.init_from} has {name}={value}, not {getattr(config, name)}: give --{name}={value}")
    if its_tokenizer.to_json() != tokenizer.to_json():
        raise ValueError(f"init_from={config.init_from} has another tokenizer: train both on the same text with the same --tokenizer")
    return model.state_dict()


def prepare(config):
    """The data of a run, Corpus or Stories. Raises ValueError or OSError, one line that says what to do."""
    if config.dataset == "babilong":
        return curriculum.prepare(config)
    corpus = text.prepare(config.dataset, config.tokenizer, config.vocab_size)
    text.check_length(corpus, config.n_segments * config.block_size)
    return corpus


def setup():
    """Everything that can go wrong before the first update, checked: -> configuration, corpus, device, rank, processes."""
    config, given = parse(TrainConfig, __doc__)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    with user_errors():
        if config.resume and config.overwrite:
            raise ValueError("--resume and --overwrite exclude each other: choose one")
        if config.resume:
            config = resumed(config, given)
        elif (Path(config.out_dir) / "ckpt.pt").exists() and not config.overwrite:
            raise ValueError(f"there is a run in {config.out_dir}: --resume goes on with it, --overwrite replaces it, --out_dir goes elsewhere")
        device = pick_device(config.device)
        if world > 1:
            if device.type == "cuda":
                device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        # rank 0 finds out and prepares, then the others take over what it found
        dtype = [pick_dtype(config.dtype, device)]
        corpus = prepare(config) if rank == 0 else None
        if world > 1:
            dist.broadcast_object_list(dtype, device=device)
        corpus = corpus or prepare(config)
        vocab_size = corpus.tokenizer.n_vocab
        if "vocab_size" in given and config.vocab_size != vocab_size:
            raise ValueError(f"vocab_size={config.vocab_size} does not fit tokenizer {config.tokenizer}, which has {vocab_size} "
                             "tokens for this text: leave it out, or use --tokenizer=bpe")
        compiled = config.compile if "compile" in given else device.type == "cuda"
        config = replace(config, vocab_size=vocab_size, dtype=dtype[0], compile=compiled)
        if config.match_params and not config.resume:
            config = replace(config, mlp_ratio=matched_mlp_ratio(config))
        checkpoint.make_folder(config.out_dir)
    return config, corpus, device, rank, world


def main():
    config, corpus, device, rank, world = setup()
    out_dir, master = Path(config.out_dir), rank == 0
    context = autocast(config.dtype, device)
    torch.manual_seed(config.seed)
    raw_model = checkpoint.make_model(model_config(config)).to(device)
    optimizers = raw_model.configure_optimizers(config.learning_rate, config.adam_lr, config.weight_decay, device.type, config.momentum)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    step, best, loader = 0, math.inf, None
    with user_errors():
        if config.resume:
            ckpt = checkpoint.read(out_dir / "ckpt.pt")
            if ckpt["sha256"] != corpus.meta["sha256"]:
                raise ValueError(f"the text of {config.dataset} is not the one this run was trained on: train a new run")
            step, best, corpus.place = ckpt["step"], ckpt["best_val_loss"], ckpt["place"]
            if step > config.max_iters:
                raise ValueError(f"max_iters={config.max_iters} is behind this run, which has made {step} updates: give more")
            raw_model.load_state_dict(ckpt["model"])
            for optimizer, state in zip(optimizers, ckpt["optimizers"]):
                optimizer.load_state_dict(state)
        elif config.init_from:
            raw_model.load_state_dict(initial_weights(config, corpus.tokenizer))
    model = torch.compile(raw_model) if config.compile else raw_model
    if world > 1:  # with one segment, or a short story, nothing reads what was written, so the write has no gradient
        unused = config.memory == "lm2" and (config.n_segments == 1 or config.dataset == "babilong")
        model = DistributedDataParallel(model, find_unused_parameters=unused)
    parameters = sum(p.numel() for p in raw_model.parameters())
    if master:
        print(f"{corpus.meta['source']} (sha256 {corpus.meta['sha256'][:12]}), {corpus.meta['tokens']['train']:,} training and "
              f"{corpus.meta['tokens']['val']:,} validation tokens, {config.tokenizer} vocabulary of {config.vocab_size}")
        print(f"{parameters:,} parameters, memory={config.memory}, on {world} x {device} in {config.dtype}")

    log = Log(out_dir / "log.csv", corpus.columns, step) if master else None  # from here on files are written

    def save():
        write_json(out_dir / "config.json", {"train": asdict(config), "data": corpus.meta, "parameters": parameters})
        write_json(out_dir / "tokenizer.json", corpus.tokenizer.to_json())
        checkpoint.save(out_dir / "ckpt.pt", raw_model, optimizers=[o.state_dict() for o in optimizers], step=step,
                        best_val_loss=best, place=corpus.place, sha256=corpus.meta["sha256"])

    def check_finite(*values):
        if not all(map(math.isfinite, values)):
            sys.exit(f"error: step {step}: the loss is not finite; {out_dir} keeps the last good checkpoint, lower --learning_rate or --adam_lr")

    stop = []  # signals that asked to stop
    def on_signal(number, frame):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one is not asked to wait
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    per_step = config.batch_size * config.n_segments * config.block_size * config.gradient_accumulation_steps * world
    bar = tqdm(total=config.max_iters * per_step, initial=step * per_step, unit="tok", unit_scale=True, disable=not master)
    while True:
        row = {"step": step}
        if step % config.eval_interval == 0 or step == config.max_iters:
            raw_model.eval()  # in every process, since the curriculum moves on in all of them
            with context:
                row |= corpus.evaluate(raw_model, config, device)
            raw_model.train()
            check_finite(*row.values())
            better = corpus.endless or row["val_loss"] < best
            best = row["val_loss"] if better else best
            if step < config.max_iters:
                corpus.advance(step, row, config)
                loader = None
            if master:
                bar.write(f"step {step}: {corpus.report(row)}")
                if better:
                    checkpoint.save(out_dir / "best.pt", raw_model, step=step, val_loss=best)
                save()
        if step == config.max_iters:
            break

        loader = batches(corpus, config, step, rank, world, device) if loader is None else loader
        factor = lr_factor(step, config)
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * factor
        torch.manual_seed(config.seed + 1_000_003 * (step * world + rank))  # dropout, too, is a function of the step
        status = torch.zeros(2, device=device)  # loss, and how many processes were asked to stop
        for micro in range(config.gradient_accumulation_steps):
            x, y = (ids.to(device, non_blocking=True) for ids in next(loader))
            with nullcontext() if world == 1 or micro == config.gradient_accumulation_steps - 1 else model.no_sync():
                with context:
                    loss = model(x, y)[1] / config.gradient_accumulation_steps
                loss.backward()
            status[0] += loss.detach() / world
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), config.grad_clip or math.inf)
        status[1] = len(stop)
        if world > 1:
            dist.all_reduce(status)
        loss = status[0].item()
        check_finite(loss, norm.item())
        for optimizer in optimizers:
            with context:  # Muon's matmuls, too, run in dtype
                optimizer.step()
            optimizer.zero_grad()
        if master:
            log.add(**row, loss=loss, learning_rate=config.learning_rate * factor)
        step += 1
        bar.set_postfix_str(f"step {step}, loss {loss:.3f}", refresh=False)
        bar.update(per_step)
        if status[1] and step < config.max_iters:
            break
    bar.close()

    if master:
        if step < config.max_iters:
            save()
            print(f"stopped at step {step}, saved in {out_dir}: go on with --resume --out_dir={out_dir}")
        else:
            log.add(**row)
            plot_losses(log.rows, corpus.columns, out_dir / "loss.png")
            raw_model.load_state_dict(checkpoint.read(out_dir / "best.pt")["model"])
            raw_model.eval()
            print(f"\nThe best model (validation loss {best:.4f}) writes:\n{corpus.example(raw_model, device)}")
            print(f"\ncheckpoint {out_dir}/ckpt.pt (last) and {out_dir}/best.pt, log {out_dir}/log.csv, loss curve {out_dir}/loss.png\n"
                  f"more text: python sample.py --out_dir={out_dir}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
