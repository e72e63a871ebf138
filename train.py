"""
Train LM2 on text, or on the stories of BABILong:

    python train.py --dataset=shakespeare
    python train.py --dataset=my/notes.txt --tokenizer=bpe --out_dir=out/notes
    python train.py --config=config/babilong_qa1.toml
    torchrun --nproc_per_node=2 train.py --dataset=shakespeare

A run writes ckpt.pt, best.pt, config.json, tokenizer.json, log.csv and loss.png into its folder,
out/DATASET. Ctrl-C stops it, --resume goes on.
"""
import math
import sys
from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from shlex import quote

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.curriculum import right_answers
from data.files import write_json
from data.text import digest
from lib import checkpoint, run
from lib.config import at_least, below, parse, user_errors
from lib.device import autocast, pick_compile, pick_device, pick_dtype, to_device
from lib.log import Log, plot_losses
from lib.optim import make_optimizers
from lm2 import LM2Config


@dataclass
class TrainConfig(LM2Config):
    # data
    dataset: str = "shakespeare"  # shakespeare, babilong, pairs, or .txt, .jsonl, .parquet file(s)
    tokenizer: str = "char"       # char, bpe or gpt2
    vocab_size: int = 1024        # tokens of the bpe tokenizer; char and gpt2 bring their own
    tasks: str = "qa1"            # babilong: each story is of one, drawn at random, as in qa1,qa2
    lengths: str = "0k,256,512"   # babilong: tokens; 0k: bare story; 128k/2k: 2k that count as 128k
    pairs: str = "2,4,8,16,50"    # pairs: numbers of key-value pairs, one after the other
    rehearse: float = 0.3         # babilong, pairs: share of the steps at any stage reached so far
    corpus: str = "shakespeare"   # babilong: the text around the facts: shakespeare, .txt file(s)
    # optimization
    n_segments: int = 4           # segments in a sequence of text: how far gradients flow
    batch_size: int = 6           # sequences in a batch; babilong: stories of as many tokens
    gradient_accumulation_steps: int = 1  # batches in a step, in each process
    max_iters: int = 1500         # steps
    learning_rate: float = 0.025  # of Muon, for the hidden matrices
    adam_lr: float = 4.5e-3       # of AdamW, for everything else
    momentum: float = 0.9         # of Muon
    warmup_iters: int = 20        # steps until the learning rates are at their peak
    lr_decay_iters: int = 0       # steps until they are down at min_lr, 0: max_iters
    min_lr: float = 0.0           # last learning rate of Muon; AdamW's falls by the same factor
    weight_decay: float = 0.1     # of the hidden matrices
    grad_clip: float = 1.0        # largest norm of the gradient, 0: any
    seed: int = 1337              # of initialisation, batches and dropout
    # evaluation
    eval_interval: int = 500      # steps between evaluations, each with a checkpoint
    eval_iters: int = 40          # batches in an evaluation of a split
    advance_at: float = 0.95      # babilong, pairs: accuracy that moves on to the next stage
    # machine
    device: str = "auto"          # auto, cpu, cuda, cuda:N or mps
    dtype: str = "auto"           # of the matmuls: auto (the faster), float32 or bfloat16
    num_workers: int = 0          # processes that make batches ahead, where a GPU waits for stories
    compile: bool | None = None   # torch.compile the model; auto: on a GPU
    checkpoint_activations: bool = False  # compute blocks again in the backward pass: less memory
    # run
    out_dir: str = "out/DATASET"  # folder of the run
    init_from: str = ""           # folder of a run whose weights and shape this one begins with
    freeze: str = ""              # decoder: the banks alone are trained
    match_params: str = ""        # a number of parameters, or a run: widen the MLP to match it
    resume: bool = False          # go on where the run in out_dir stopped, as it was configured
    overwrite: bool = False       # replace the run in out_dir

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "n_segments", "batch_size", "gradient_accumulation_steps",
                 "eval_interval", "eval_iters")
        at_least(self, 0, "rehearse", "max_iters", "learning_rate", "adam_lr", "momentum",
                 "warmup_iters", "lr_decay_iters", "min_lr", "weight_decay", "grad_clip", "seed",
                 "advance_at", "num_workers")
        below(self, 1, "momentum", "rehearse")
        below(self, 100, "num_workers")
        below(self, 1e30, "learning_rate", "adam_lr", "weight_decay")  # float32 ends at 3e38
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}: "
                             "give less")
        for name in ("dataset", "corpus"):  # the run may be resumed from another folder
            value = getattr(self, name)
            if not value.strip():
                raise ValueError(f"{name} is empty: name shakespeare or a text file")
            if value not in ("shakespeare", "babilong", "pairs"):
                setattr(self, name, str(Path(value).resolve()))
        if self.freeze and (self.freeze != "decoder" or not (self.init_from or self.resume)):
            raise ValueError(f"freeze={self.freeze} is not known, or there is nothing to keep: "
                             "use decoder, with --init_from")
        if self.checkpoint_activations and self.memory == "rmt":
            raise ValueError("checkpoint_activations=True is not for memory=rmt: leave it out")
        if not self.out_dir.strip():
            raise ValueError("out_dir is empty: name a folder, or leave it out")
        if self.out_dir == "out/DATASET":
            self.out_dir = str(Path("out") / Path(self.dataset).stem)

    def model_config(self):
        """The part that describes the model."""
        return LM2Config(**{f.name: getattr(self, f.name) for f in fields(LM2Config)})


def setup():
    """All that can go wrong before the first step -> configuration, data, device, rank, world."""
    config, given = parse(TrainConfig, __doc__)
    with user_errors():
        rank, world = run.processes()
        out_dir, tokenizer = Path(config.out_dir), None
        if config.resume and config.overwrite:
            raise ValueError("--resume and --overwrite exclude each other: choose one")
        if not (config.resume or config.overwrite):
            run.check_free(out_dir)
        if config.resume:
            config = run.resumed(config, given, world)
            tokenizer = checkpoint.load_tokenizer(out_dir)
        elif config.init_from:
            config, tokenizer = run.begun_from(config, given)
        device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, device)
        # rank 0 prepares the data, and finds what is wrong with it, while the others wait
        data = run.open_data(config, tokenizer) if rank == 0 else None
        if world > 1:
            device, dtype = run.join_processes(device, dtype)
        data = data or run.open_data(config, tokenizer)
        run.check_vocab_size(config, given, data.tokenizer)
        config = replace(config, vocab_size=data.tokenizer.n_vocab, dtype=dtype,
                         compile=pick_compile(config.compile, device))
        run.check_memory(config, device)
        if config.match_params and not config.resume:
            config = replace(config, mlp_ratio=run.matched_mlp_ratio(config, device))
    return config, data, device, rank, world


def learning_rate_factor(step, config):
    """Linear warm-up, from 1 / (warmup_iters + 1), times linear decay from step 0 to min_lr."""
    lowest = config.min_lr / config.learning_rate if config.learning_rate else 0.0
    left = max(0.0, 1 - step / (config.lr_decay_iters or config.max_iters))
    return min(1.0, (step + 1) / (config.warmup_iters + 1)) * (lowest + (1 - lowest) * left)


def batches(data, config, step, rank, world, device):
    """
    The batches of one process from a step up to the next evaluation, where a curriculum may move
    on -> an iterator of what `data.batch` returns, the same whatever num_workers is
    """
    until = min(config.max_iters, step - step % config.eval_interval + config.eval_interval)

    def batch(number):  # the collate_fn below: no data is loaded, the number says which batch
        later, micro = divmod(number, config.gradient_accumulation_steps)
        return data.batch(config, step + later, micro * world + rank)

    ahead = {}
    if config.num_workers:  # a fork has the data as it stands
        ahead = dict(multiprocessing_context="fork", prefetch_factor=8,
                     worker_init_fn=run.leave_group)
    return iter(DataLoader(range((until - step) * config.gradient_accumulation_steps),
                           batch_size=None, collate_fn=batch, num_workers=config.num_workers,
                           pin_memory=device.type == "cuda", **ahead))


@torch.no_grad()
def evaluate(model, data, config, device, stop):
    """
    Mean loss in nats per target for each loss in log.csv, and of stories the share of
    answers that are right to the last token, of all and of each task (eval_babilong.py lets the
    model write instead) -> {column: number}, or None where a stop was asked
    """
    model.eval()
    nats, targets, right, state = Counter(), Counter(), defaultdict(list), None
    for batch in data.evaluation_batches(config):
        if stop.asked():
            return None
        x, y, repeats = to_device((batch.x, batch.y, batch.repeats), device)
        with autocast(config.dtype, device):
            logits, loss, state = model(x, y, state if batch.continues else None, repeats)
        n_targets = int((batch.y != -1).sum())
        nats[batch.column] += loss.item() * n_targets
        targets[batch.column] += n_targets
        if batch.tasks:
            answers = right_answers(logits.argmax(-1).cpu(), batch.y)
            for task, answers_of_row in zip(batch.tasks, answers):
                right[task] += answers_of_row
                if batch.column == "val_loss":
                    right["accuracy"] += answers_of_row
    model.train()
    figures = {column: nats[column] / targets[column] for column in nats}
    return figures | {name: sum(found) / len(found) for name, found in right.items() if found}


@user_errors(OSError)
@run.beside_others()
def main():
    config, data, device, rank, world = setup()
    out_dir, master = Path(config.out_dir), rank == 0

    # the model and its optimizers, new, from another run, or where this run stopped
    torch.manual_seed(config.seed)
    raw_model = checkpoint.make_model(config.model_config()).to(device)
    run.freeze(raw_model, config.freeze)
    if config.checkpoint_activations:
        run.checkpoint_activations(raw_model)
    optimizers = make_optimizers(raw_model, config.learning_rate, config.adam_lr,
                                 config.weight_decay, config.momentum)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    n_parameters = sum(p.numel() for p in raw_model.parameters())
    tokenizer_sha256 = digest(data.tokenizer)
    step, best_val_loss, loader, finished = 0, math.inf, None, False
    replaced = [] if config.resume else [out_dir / name for name in checkpoint.FILES]
    with user_errors():
        if config.init_from and not config.resume:
            raw_model.load_state_dict(run.initial_weights(config))
        lock = master and run.claim(out_dir, 40 * n_parameters + 2_000_000,  # two ckpt.pt, best.pt
                                    may_exist=config.resume or config.overwrite)
        if config.resume:
            step, best_val_loss = run.restore(config, data, raw_model, optimizers)
        log = Log(out_dir / "log.csv", data.columns, step)
    model = torch.compile(raw_model) if config.compile else raw_model
    if world > 1:
        # with one segment, or a short story, nothing reads what was written: no gradient there
        short = config.n_segments == 1 or config.dataset in ("babilong", "pairs")
        model = DistributedDataParallel(
            model, find_unused_parameters=bool(config.n_banks) and short)
    if master:
        print(f"{data.meta['source']} (sha256 {data.meta['sha256'][:12]}), "
              f"{data.meta['tokens']['train']:,} training and {data.meta['tokens']['val']:,} "
              f"validation tokens, {config.tokenizer} vocabulary of {config.vocab_size}")
        print(f"{n_parameters:,} parameters, memory={config.memory}, "
              f"on {world} x {device} in {config.dtype}")

    def check_finite(values):
        if not all(map(math.isfinite, values)):
            sys.exit(f"error: step {step}: the loss is not finite; {out_dir} keeps the last good "
                     "checkpoint, lower --learning_rate or --adam_lr")

    @torch.no_grad()
    def save():
        """Write the run as it stands, but not weights that give no finite loss any more."""
        x, y, repeats = to_device(data.batch(config, step, 0), device)
        with autocast(config.dtype, device):
            check_finite([raw_model(x, y, repeats=repeats)[1].item()])
        if not master:
            return
        about = {"train": asdict(config), "data": data.meta, "parameters": n_parameters,
                 "processes": world}
        with checkpoint.written(out_dir / "ckpt.pt", raw_model, step=step, progress=data.progress,
                                best_val_loss=best_val_loss, sha256=data.meta["sha256"],
                                tokenizer_sha256=tokenizer_sha256,
                                optimizers=[optimizer.state_dict() for optimizer in optimizers]):
            while replaced:  # of a run that is replaced nothing stays
                replaced.pop().unlink(missing_ok=True)
            write_json(out_dir / "config.json", about)
            write_json(out_dir / "tokenizer.json", data.tokenizer.to_json())

    stop = run.Stop(device, world)
    tokens_per_step = (config.batch_size * config.n_segments * config.block_size
                       * config.gradient_accumulation_steps * world)
    bar = tqdm(total=config.max_iters * tokens_per_step, initial=step * tokens_per_step,
               unit="tok", unit_scale=True, disable=not master)
    with bar:
        while True:
            # save, then evaluate: an evaluation may be long, and a stop should lose nothing
            row = {"step": step, **data.position()}
            if step % config.eval_interval == 0 or step == config.max_iters:
                save()
                figures = run.of_rank_0(evaluate(raw_model, data, config, device, stop), device)
                if figures is None:
                    break
                check_finite(figures.values())
                row |= figures
                if data.last_is_best or figures["val_loss"] < best_val_loss:
                    best_val_loss = figures["val_loss"]
                    if master:
                        checkpoint.save(out_dir / "best.pt", raw_model, step=step,
                                        val_loss=best_val_loss, tokenizer_sha256=tokenizer_sha256)
                if master:
                    bar.write(f"step {step}: {data.report(row)}")
                if step == config.max_iters:
                    finished = True
                    break
                data.advance(step, row, config)
                loader = None

            # the learning rate of this step
            factor = learning_rate_factor(step, config)
            for optimizer, peak in zip(optimizers, peaks):
                optimizer.param_groups[0]["lr"] = peak * factor

            # forward and backward, in gradient_accumulation_steps batches
            if loader is None:
                loader = batches(data, config, step, rank, world, device)
            mean_loss = torch.zeros((), device=device)
            for micro in range(config.gradient_accumulation_steps):
                number = (step * config.gradient_accumulation_steps + micro) * world + rank
                torch.manual_seed(config.seed + 1_000_003 * number)  # of this batch's dropout
                x, y, repeats = to_device(next(loader), device)
                last = micro == config.gradient_accumulation_steps - 1
                with nullcontext() if world == 1 or last else model.no_sync():
                    with autocast(config.dtype, device):
                        loss = model(x, y, repeats=repeats)[1] / config.gradient_accumulation_steps
                    loss.backward()
                mean_loss += loss.detach() / world
            if world > 1:
                dist.all_reduce(mean_loss)
            limit = config.grad_clip or math.inf
            norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), limit)
            check_finite((mean_loss.item(), norm.item()))

            # step
            for optimizer in optimizers:
                with autocast(config.dtype, device):  # Muon's matmuls, too, run in dtype
                    optimizer.step()
                optimizer.zero_grad()
            if master:
                log.add(**row, loss=mean_loss.item(), learning_rate=config.learning_rate * factor)
            step += 1
            bar.set_postfix_str(f"step {step}, loss {mean_loss.item():.3f}", refresh=False)
            bar.update(tokens_per_step)
            if step < config.max_iters and stop.asked():
                save()
                break

    if master and not finished:
        print(f"stopped at step {step}, saved in {out_dir}: go on with --resume "
              f"--out_dir={quote(str(out_dir))}")
    elif master:
        save()
        log.add(**row)
        plot_losses(log, out_dir / "loss.png")
        raw_model.load_state_dict(checkpoint.load_file(out_dir / "best.pt")["model"])
        print(f"\nThe {'last' if data.last_is_best else 'best'} model (validation loss "
              f"{best_val_loss:.4f}) writes:\n{data.example(raw_model.eval(), device)}\n\n"
              f"checkpoint {out_dir}/ckpt.pt (last) and {out_dir}/best.pt, log {out_dir}/log.csv, "
              f"loss curve {out_dir}/loss.png\n"
              f"more text: python sample.py --out_dir={quote(str(out_dir))}")
    run.leave(lock, world)


if __name__ == "__main__":
    main()
