"""
See what the memory does: where an answer comes from, what is written and kept, who reads what.

    python look.py out/qa1 --task=qa1 --length=4k --seed=1   # a story hidden in text, a question
    python look.py out/shakespeare --text=play.txt           # what a text's last token reads
    python look.py out/shakespeare --start="ROMEO:"          # the same, of a short text
    python look.py out/qa1 --length=4k --n_samples=100       # what do answers come from?

Prints what the answer came from, with its shares in what the memory gave, and writes look.png and
look.html; with --n_samples a count over as many stories, and look.csv. From Python:

    from look import shares, trace    # lib/trace.py says what they give
"""
import csv
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data.babi import simulate
from data.babilong import encode_text, join, parse_length, parse_tasks
from data.files import atomic_open, read_utf8
from data.tokenizer import prompt_ids
from eval_babilong import ANSWER_TOKENS, EvalConfig, load_run
from lib import checkpoint
from lib.config import at_least, parse, user_errors
from lib.device import pick_device
from lib.origin import origin
from lib.trace import contributions, read_weights, shares, token_shares, trace
from lib.trace_figure import draw
from lib.trace_page import page
from lib.view import Mark, count_table, make_view, source_of

__all__ = ["contributions", "read_weights", "shares", "token_shares", "trace"]
MOST_TOKENS = 200_000  # of a text: what is noted of it lies in memory
PRINTED = 5            # places in the text


@dataclass
class LookConfig:
    runs: list = field(default_factory=list)  # folder of the run
    # what it reads: a story, or a text
    task: str = "qa1"      # task of BABILong
    length: str = "1k"     # tokens of the text around the story, 0k: none
    text: str = ""         # a file
    start: str = ""        # a text
    seed: int = 1337       # of the story
    n_samples: int = 0     # count over so many stories; 0: look at one
    # machine
    device: str = "auto"   # auto, cpu, cuda, cuda:N or mps
    # output
    out_dir: str = ""      # folder of the pictures; "": that of the run

    def __post_init__(self):
        if len(self.runs) != 1:
            raise ValueError(f"runs={self.runs} must be one folder: python look.py out/qa1")
        at_least(self, 0, "seed", "n_samples")
        if (self.text != "") + (self.start != "") + (self.n_samples > 0) > 1:
            raise ValueError("text, start and n_samples exclude each other: choose one")
        if len(parse_tasks(self.task)) > 1:
            raise ValueError(f"task={self.task} must be one task, such as qa1")
        if parse_length(self.length) > MOST_TOKENS:
            raise ValueError(f"length={self.length} is too long to keep all that is looked at: "
                             f"use at most {MOST_TOKENS // 1000}k")
        self.out_dir = self.out_dir or self.runs[0]


# --- What is read

class Passage(NamedTuple):
    ids: list
    marks: list    # Marks of a story, lib/view.py
    question: str  # at its end, and the right answer; "" for a text
    answer: str


def hidden_story(run, task, length, seed):
    """A story of a task and one of its questions, hidden in text -> Passage"""
    rng, tokens = random.Random(seed), parse_length(length)
    story = simulate(task, rng)
    asked = rng.choice([number for number, line in enumerate(story) if line.answer])
    told = [number for number, line in enumerate(story[:asked]) if not line.answer]
    pieces = [encode_text(story[number].text, run.tokenizer) for number in (*told, asked)]
    ids, starts = (run.haystack.mix(pieces, tokens, np.random.default_rng(seed)) if tokens
                   else join(pieces))
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


# --- Many stories

def count(run, config, device):
    """
    Ask n_samples questions -> rows of look.csv. Left out are those with a supporting fact in the
    last token's segment, which attention sees and memory has not yet written.
    """
    rows, about = [], origin(device)
    for seed in tqdm(range(config.seed, config.seed + config.n_samples), leave=False):
        passage = hidden_story(run, config.task, config.length, seed)
        view, answer = look_at(run.model, run.tokenizer, passage, device)[1:]
        written = len(passage.ids) // view.block_size * view.block_size
        if view.gifts and all(mark.end < written for mark in passage.marks
                              if mark.kind == "support"):
            rows.append({"task": config.task, "length": config.length, "seed": seed,
                         "question": passage.question, "answer": answer, "right": passage.answer,
                         "block": view.layer + 1, "share": f"{view.looks[0].share:.3f}",
                         "source": source_of(view), **about})
    return rows


# --- The program

def show(view):
    """Print what the answer came from, the largest share first."""
    if not view.gifts:
        print(view.why)
        return
    print(f"What the last token read of the memory, in block {view.layer + 1}, was written when "
          "slots looked at what stands in [ ]:")
    for look in view.looks[:PRINTED]:
        print(f"{look.share:6.1%}  segment {look.segment}: ...{look.text}...")
    print(f"{view.gifts[view.layer].identity:6.1%}  what the memory was at the start")


def look_at(model, tokenizer, passage, device):
    """Read a Passage -> its Trace, its View, and what the model says next"""
    ids = torch.tensor(passage.ids, device=device)
    found = trace(model, ids)
    generated = model.generate(ids[None], ANSWER_TOKENS, temperature=0)[0, len(ids):]
    answer = tokenizer.decode(generated.tolist()).split(".")[0].strip()
    title = f"... {tokenizer.decode(passage.ids[-20:])} -> {answer}"
    if passage.question:
        is_right = "right" if answer == passage.answer else f"right: {passage.answer}"
        title = f"{passage.question} {answer} ({is_right})"
    return found, make_view(model, tokenizer, found, passage.marks, title), answer


def main():
    config, _ = parse(LookConfig, __doc__)
    with user_errors():
        device, folder, out_dir = pick_device(config.device), config.runs[0], Path(config.out_dir)
        checkpoint.make_folder(out_dir)
        if config.text or config.start:
            model, tokenizer, _ = checkpoint.load(folder, device)
            passage = given_text(tokenizer, config)
        else:
            run = load_run(folder, EvalConfig(config.runs), device)
            model, tokenizer = run.model, run.tokenizer
            passage = hidden_story(run, config.task, config.length, config.seed)
        if config.n_samples:
            rows = count(run, config, device)
            print(count_table(rows))
            with atomic_open(out_dir / "look.csv", "w", encoding="utf-8", newline="") as f:
                writer = csv.DictWriter(f, rows[0] if rows else [], lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            print(out_dir / "look.csv")
            return
        found, view, _ = look_at(model, tokenizer, passage, device)
    print(f"{view.title}\n{view.subtitle}\n")
    show(view)
    png = draw(model, found, view)
    for name, content in (("look.png", png), ("look.html", page(view, png).encode())):
        with user_errors(OSError), atomic_open(out_dir / name) as f:
            f.write(content)
        print(out_dir / name)


if __name__ == "__main__":
    main()
