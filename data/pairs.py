"""
Pairs as train.py sees them: a text lists keys with their values, then asks for keys, after the
associative retrieval of ARMT (Rodkin et al. 2024, arXiv 2407.04841).

     Qx7 Bk3 Qj0?Bk3?Qx7    three pairs, then two questions with their answers

A key is two letters, its value a digit: a guess is right in 1 of 10 (0.1). There are two kinds of
text, and half of the texts are of each:

remember    n pairs of n keys: how many fit into the memory?
rewrite     n pairs of min(16, n // 2) keys in random order, each key at least twice, with a value
            drawn anew each time; the last value counts: does it replace those before?

A text asks for up to 16 of its keys, drawn at random. Pairs and questions have UNIT characters, so
that none lies across a border between segments where UNIT divides block_size.

A curriculum moves on to more pairs as that of data/curriculum.py does to longer stories. Each
evaluation also asks after the numbers of pairs in ASKED, whatever the curriculum has reached.
"""
import hashlib
import re
from string import ascii_lowercase, ascii_uppercase, digits

import numpy as np
import torch

from data.babilong import parse_list
from data.curriculum import moved_on, rng_of_step, stage_of_batch
from data.dataset import EvaluationBatch
from data.tokenizer import check_text, make_tokenizer

KEYS = [first + second for first in ascii_uppercase for second in ascii_lowercase]
UNIT = len("?Qx7")
QUESTIONS = 16  # of a text, at most, and keys of a rewrite text
KINDS = ("remember", "rewrite")
ASKED = (10, 20, 50, 100, 200, 500)
TRAINING, CURRENT, FIXED = range(3)  # texts that have nothing in common


def write_text(kind, n, rng):
    """n pairs, 2 <= n <= len(KEYS), and their questions. rng: a NumPy Generator"""
    different = n if kind == "remember" else min(QUESTIONS, n // 2)
    chosen = rng.choice(KEYS, different, replace=False)
    keys = rng.permutation(np.resize(chosen, n))  # each as often as another, or once more
    values = rng.choice(list(digits), n)
    newest = dict(zip(keys, values))
    asked = rng.choice(list(newest), min(QUESTIONS, different), replace=False)
    pairs = [f" {key}{value}" for key, value in zip(keys, values)]
    return "".join(pairs + [f"?{key}{newest[key]}" for key in asked])


class Pairs:
    """Pairs as train.py sees them: a Dataset of data/dataset.py."""
    last_is_best = True  # no text comes twice, so nothing is overfitted

    def __init__(self, numbers, tokenizer, meta):
        """numbers: of pairs, in the order of the curriculum."""
        self.numbers, self.tokenizer, self.meta = numbers, tokenizer, meta
        asked = [f"{kind}_{n}" for kind in KINDS for n in ASKED]
        self.columns = ("pairs", "val_loss", "accuracy", *KINDS, "asked_loss", *asked)
        self.progress = [0, 0]  # the index of the current number, and the step in which it began

    def draw(self, n, rows, purpose, seed, step, part=0):
        """
        Texts of n pairs, a pure function of the arguments, shorter ones filled with spaces ->
        inputs and targets (rows, L) int64, -1 but for answers, and the kind of each row. Parts 0 to
        P-1 are together what part 0 has with P times the rows.
        """
        kinds, texts = [], []
        for row in range(part * rows, (part + 1) * rows):
            rng = np.random.default_rng([purpose, seed, step, row])
            kinds.append(KINDS[(step + row) % 2])  # with step: a batch may have a single row
            texts.append(write_text(kinds[-1], n, rng))
        width = max(map(len, texts))
        x = torch.tensor([self.tokenizer.encode(text.ljust(width)) for text in texts])
        y = torch.full_like(x, -1)
        [question_mark] = self.tokenizer.encode("?")
        row, mark = torch.where(x == question_mark)
        y[row, mark + 2] = x[row, mark + 3]  # behind "?Qx" the digit is to be predicted
        return x, y, kinds

    def batch(self, config, step, part):
        """Inputs and targets (rows, L) of one part of a step; targets are -1 but for answers."""
        rng = rng_of_step(config, step)
        n = self.numbers[stage_of_batch(self.progress, config, rng)]
        x, y, _ = self.draw(n, n_rows(n, config), TRAINING, config.seed, step, part)
        return x, y, None

    def evaluation_batches(self, config):
        """
        eval_iters batches of the current number of pairs (val_loss, accuracy); then of each number
        of ASKED as many texts as have at least 16 * eval_iters answers of each kind (asked_loss).
        """
        n = self.position()["pairs"]
        for step in range(config.eval_iters):
            x, y, kinds = self.draw(n, n_rows(n, config), CURRENT, config.seed, step)
            yield EvaluationBatch("val_loss", x, y, continues=False, tasks=kinds)
        for n in ASKED:
            rows, at_once = 2 * config.eval_iters * -(-2 * QUESTIONS // n), n_rows(n, config)
            for part in range(-(-rows // at_once)):
                x, y, kinds = self.draw(n, min(rows, at_once), FIXED, config.seed, n, part)
                tasks = [f"{kind}_{n}" for kind in kinds]
                yield EvaluationBatch("asked_loss", x, y, continues=False, tasks=tasks)

    def position(self):
        stage, _ = self.progress
        return {"pairs": self.numbers[stage]}

    def report(self, row):
        """An evaluation in words."""
        kinds = " ".join(f"{kind} {row[kind]:.3f}" for kind in KINDS if kind in row)
        asked = ", ".join(" ".join([kind, *(f"{row[f'{kind}_{n}']:.2f}" for n in ASKED)])
                          for kind in KINDS)
        return (f"{row['pairs']} pairs: validation loss {row['val_loss']:.4f}, accuracy "
                f"{row['accuracy']:.3f} ({kinds}); {' '.join(map(str, ASKED))} pairs: {asked}")

    def advance(self, step, row, config):
        n_stages = len(self.numbers)
        self.progress = moved_on(self.progress, n_stages, step, row["accuracy"], config)

    def example(self, model, device):
        """A text up to its first answer, and the model's."""
        text = write_text("remember", self.numbers[0], np.random.default_rng(0))
        prompt = text[:text.index("?") + 3]
        ids = torch.tensor([self.tokenizer.encode(prompt)], device=device)
        answer = self.tokenizer.decode(model.generate(ids, 1, temperature=0)[0, -1:].tolist())
        return f"{prompt}{answer} (right: {text[len(prompt)]})"


def n_rows(n, config):
    """Texts of n pairs that fit into batch_size * n_segments * block_size tokens, at least one."""
    tokens = config.batch_size * config.n_segments * config.block_size
    return max(1, tokens // (UNIT * (n + min(QUESTIONS, n))))


def parse_numbers(text):
    """The numbers of pairs of "4,8,16". Raises ValueError."""
    numbers = []
    for part in parse_list("pairs", text):
        if not re.fullmatch("[0-9]{1,9}", part) or not 2 <= int(part) <= len(KEYS):
            raise ValueError(f"{part} in pairs={text} must be a number from 2 to {len(KEYS)}, as "
                             "there are so many keys")
        if int(part) in numbers:
            raise ValueError(f"pairs={text} lists {int(part)} twice: leave one out")
        numbers.append(int(part))
    return numbers


def open_pairs(config, tokenizer=None):
    """
    The Pairs of a TrainConfig. tokenizer: that of a run which goes on; it is then used instead of
    a new one. Raises ValueError, one line that says what to do.
    """
    numbers = parse_numbers(config.pairs)
    if config.tokenizer != "char":
        raise ValueError(f"tokenizer={config.tokenizer} is not for pairs: use char")
    made_from = "".join(KEYS) + digits + " ?"
    tokenizer = tokenizer or make_tokenizer("char", made_from, 0)
    check_text(tokenizer, made_from)
    tokens = config.batch_size * config.n_segments * config.block_size
    meta = {
        "source": "pairs, written while they are needed",
        "sha256": hashlib.sha256(f"{made_from} {UNIT} {QUESTIONS} {KINDS}".encode()).hexdigest(),
        "tokenizer": tokenizer.kind,
        "vocab_size": tokenizer.n_vocab,
        "tokens": {"train": config.max_iters * config.gradient_accumulation_steps * tokens,
                   "val": config.eval_iters * tokens},
    }
    return Pairs(numbers, tokenizer, meta)
