"""
See what the memory does: where an answer comes from, what is written and kept, who reads what.

    python look.py out/qa1 --task=qa1 --length=4k --seed=1   # a story hidden in text, a question
    python look.py out/shakespeare --text=play.txt           # what a text's last token reads
    python look.py out/qa1 --length=4k --n_samples=100       # what do answers come from?

Prints the sentences that the answer came from, with their shares in what the memory gave, and
writes look.png and look.html; with --n_samples a count over as many stories, and look.csv. From
Python:

    from look import shares, trace    # lib/trace.py says what they give
"""
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data.babi import LABELS, simulate
from data.babilong import encode_text, is_correct, parse_length, parse_tasks
from data.files import atomic_open, exclusive, read_utf8
from data.tokenizer import prompt_ids
from eval_babilong import EvalConfig, Run, answer_to, load_run
from lib import checkpoint
from lib.config import at_least, parse, user_errors
from lib.device import pick_device
from lib.measured import read_results, write_results
from lib.origin import origin
from lib.trace import BankTrace, contributions, read_weights, shares, token_shares, trace
from lib.trace_figure import draw
from lib.trace_page import page
from lib.view import Mark, count_table, first_tells, kind_of, make_view
from lm2 import require

__all__ = ["BankTrace", "contributions", "read_weights", "shares", "token_shares", "trace"]
MOST_TOKENS = 200_000  # of a text: what is noted of it lies in memory
PRINTED = 5            # places in the text
COLUMNS = ("run", "task", "length", "seed", "question", "right_answer", "answer", "correct",
           "block", "share", "source", "first_tells", "commit", "torch", "device")  # of look.csv


@dataclass
class LookConfig:
    runs: list = field(default_factory=list)  # folder of the run
    # what it reads: a story, or a text
    task: str = "qa1"      # task of BABILong
    length: str = "1k"     # tokens of the story and the text around it, 0k: the bare story
    text: str = ""         # a file
    start: str = ""        # a text
    seed: int = 1337       # of the story
    n_samples: int = 0     # count over so many stories; 0: look at one
    block: int = 0         # whose reads and bank are shown, from 1 on; 0: the one that gave most
    # machine
    device: str = "auto"   # auto, cpu, cuda, cuda:N or mps
    # output
    out_dir: str = ""      # folder of the pictures; "": that of the run

    def __post_init__(self):
        if len(self.runs) != 1:
            raise ValueError(f"runs={self.runs} must be one folder: python look.py out/qa1")
        at_least(self, 0, "seed", "n_samples", "block")
        if len(list(filter(None, (self.text, self.start, self.n_samples)))) > 1:
            raise ValueError("text, start and n_samples exclude each other: choose one")
        of_story = (self.task, self.length) != (LookConfig.task, LookConfig.length)
        if of_story and (self.text or self.start):
            raise ValueError(f"task={self.task} and length={self.length} are of a story: leave "
                             "them out with text or start")
        if len(parse_tasks(self.task)) > 1:
            raise ValueError(f"task={self.task} must be one task, such as qa1")
        if parse_length(self.length) > MOST_TOKENS:
            raise ValueError(f"length={self.length} is too long to keep all that is looked at: "
                             f"use at most {MOST_TOKENS // 1000}k")
        self.out_dir = self.out_dir or self.runs[0]


# --- What is read

class Passage(NamedTuple):
    ids: list
    marks: list     # Marks of a story, lib/view.py
    question: str   # at its end, and the right answer; "" for a text
    answer: str


class Answer(NamedTuple):
    """What a run says behind a Passage, up to its first full stop."""
    text: str
    correct: bool   # by BABILong's rule; False behind a text


def hidden_story(run, task, length, seed):
    """A story of a task and one of its questions, hidden in text -> Passage"""
    rng = random.Random(seed)
    story = simulate(task, rng)
    asked = rng.choice([number for number, line in enumerate(story) if line.answer])
    told = [number for number, line in enumerate(story[:asked]) if not line.answer]
    pieces = [encode_text(story[number].text, run.tokenizer) for number in (*told, asked)]
    ids, starts = run.haystack.mix(pieces, parse_length(length), np.random.default_rng(seed))
    question = story[asked]
    kinds = ["support" if number in question.support else "fact" for number in told]
    marks = [Mark(start, start + len(piece), kind)
             for start, piece, kind in zip(starts.tolist(), pieces, [*kinds, "question"])]
    return Passage(ids.tolist(), marks, question.text, question.answer)


def given_text(tokenizer, config):
    """The Passage of --text or --start. Raises ValueError, OSError."""
    text = read_utf8(config.text) if config.text else config.start
    ids = prompt_ids(tokenizer, text)
    if len(ids) > MOST_TOKENS:
        raise ValueError(f"text={config.text} has {len(ids):,} tokens, too many to keep all that "
                         f"is looked at: use at most {MOST_TOKENS:,}")
    return Passage(ids, [], "", "")


def look_at(run, passage, task, block=0):
    """Read a Passage -> its Trace, its View of a block, the run's Answer. Raises ValueError."""
    ids = torch.tensor(passage.ids, device=run.model.head.weight.device)
    found = trace(run.model, ids)
    text, = answer_to(ids[None], run)
    said = text.split(".")[0].strip()
    title = f"...{run.tokenizer.decode(passage.ids[-20:])[-40:]} -> {said}"
    answer = Answer(said, False)
    if passage.question:
        answer = Answer(said, is_correct(text, passage.answer, passage.question, LABELS[task]))
        verdict = "right" if answer.correct else f"wrong, it is {passage.answer}"
        title = f"Asked: {passage.question} Answered: {said} ({verdict})"
    return found, make_view(run.model, run.tokenizer, found, passage.marks, title, block), answer


# --- The program

def show(view):
    """Print what the answer came from, the largest share first."""
    if not view.reads:
        print(view.why)
        return
    print(f"What the last token read of the memory, in block {view.layer + 1}, by the segment that "
          "wrote it; in [ ] what its slots looked at most:")
    first, others = view.sources[:PRINTED], view.sources[PRINTED:]
    for source in first:
        print(f"{source.share:6.1%}  segment {source.segment}: {source.text}")
    print(f"{sum(source.share for source in others):6.1%}  all other segments")
    print(f"{view.reads[view.layer].identity:6.1%}  what the memory was at the start")


def count(run, config):
    """
    Ask n_samples questions -> rows of look.csv. Left out are those with a supporting fact in the
    last token's segment, or right before it. Attention sees these, and the token behind the fact,
    where attention gathers it, is not yet written. Raises ValueError.
    """
    rows, about = [], origin(pick_device(config.device))
    for seed in tqdm(range(config.seed, config.seed + config.n_samples), leave=False):
        passage = hidden_story(run, config.task, config.length, seed)
        _, view, answer = look_at(run, passage, config.task, config.block)
        if not view.reads:
            raise ValueError(view.why)
        written = (len(passage.ids) - 1) // view.block_size * view.block_size
        if all(mark.end < written for mark in passage.marks if mark.kind == "support"):
            rows.append({"run": config.runs[0], "task": config.task, "length": config.length,
                         "seed": str(seed), "question": passage.question,
                         "right_answer": passage.answer, "answer": answer.text,
                         "correct": "1" if answer.correct else "0",
                         "block": str(view.layer + 1), "share": f"{view.sources[0].share:.3f}",
                         "source": kind_of(view),
                         "first_tells": "1" if first_tells(view) else "0", **about})
    if not rows:
        raise ValueError(f"length={config.length} is too short, memory has not yet written the "
                         "facts when it is asked: use a greater length")
    return rows


def write_count(config, rows):
    """
    Print how many answers came from what, and put the rows into look.csv, in place of those of
    the same stories. Raises ValueError, OSError.
    """
    print(count_table(rows))
    left_out = config.n_samples - len(rows)
    print(f"{left_out} of {config.n_samples} questions are left out: attention sees their fact")
    path = Path(config.out_dir) / "look.csv"
    seeds = range(config.seed, config.seed + config.n_samples)
    with exclusive(config.out_dir):
        kept = [row for row in read_results(path, COLUMNS) if int(row["seed"]) not in seeds or any(
            row[name] != rows[0][name] for name in ("run", "task", "length"))]
        write_results(path, kept + rows, COLUMNS)
    print(path)


def open_run(config):
    """The Run that reads; one that reads a text needs no haystack. Raises ValueError, OSError."""
    folder, device = config.runs[0], pick_device(config.device)
    if config.text or config.start:
        model, tokenizer, _ = checkpoint.load(folder, device)
        return Run(model, tokenizer, tokenizer, None, {})
    dataset = checkpoint.load_config(folder)["train"].get("dataset")
    if dataset != "babilong":
        raise ValueError(f"{folder} was trained on {dataset}, not on stories: give it --text or "
                         "--start")
    return load_run(folder, EvalConfig(config.runs), device)


@user_errors(OSError)
def main():
    config, _ = parse(LookConfig, __doc__)
    with user_errors():
        run = open_run(config)
        n_banks = run.model.config.n_banks  # of none of them `trace` speaks
        require(config.block <= n_banks or not n_banks,
                f"block={config.block} has no bank: use 1 to {n_banks}")
        if config.n_samples:
            checkpoint.make_folder(config.out_dir)
            read_results(Path(config.out_dir) / "look.csv", COLUMNS)  # if damaged, it is told now
            write_count(config, count(run, config))
            return
        passage = (hidden_story(run, config.task, config.length, config.seed) if run.haystack
                   else given_text(run.tokenizer, config))
        found, view, _ = look_at(run, passage, config.task, config.block)
        checkpoint.make_folder(config.out_dir)
    print(f"{view.title}\n{view.subtitle}\n")
    show(view)
    png = draw(run.model, found, view)
    for name, content in (("look.png", png), ("look.html", page(view, png).encode())):
        with atomic_open(Path(config.out_dir) / name) as f:
            f.write(content)
        print(Path(config.out_dir) / name)


if __name__ == "__main__":
    main()
