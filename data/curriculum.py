"""
Stories as train.py sees them: batches of BABILong's tasks at the current length of a curriculum, and their accuracy.

The curriculum moves on to the next length when the current one is learned, or when half of the updates that were left are spent. Part
of the batches rehearse the shorter lengths. In most batches the stories ask at their end about all that they told, whatever any of the
tasks would ask: that gives a memory many answers to learn from. Lengths that let in one fact more each, one after the other, teach to
match names.
"""
import random

import numpy as np
import torch

from data import tokenizer as tokenizers
from data.babi import TASKS, simulate
from data.babilong import Haystack, encode_line, evaluation_sample, join, parse_length, samples
from data.text import read_text, split

RECALL = 0.7   # share of the batches whose stories ask at their end
LESSONS = 400  # stories of each task that the tokenizer sees


def training_row(tasks, limit, tokenizer, rng, asking):
    """A task, and the encoded lines of one of its stories up to the last question within `limit` tokens. Raises ValueError."""
    for _ in range(1000):
        task = rng.choice(tasks)
        ask = {"along": (), "own": [task], "all": tasks}[asking]
        lines = [encode_line(line, tokenizer) for line in simulate(task, rng, ask)]
        total = np.cumsum([len(ids) for ids, _ in lines])
        fitting = [i for i, (_, n_answer) in enumerate(lines) if n_answer and total[i] <= limit]
        if fitting:
            return task, lines[:fitting[-1] + 1]
    raise ValueError(f"no story of {', '.join(tasks)} has a question within {limit} tokens: use a greater length")


BARE_TOKENS = 256  # of a bare story in training, at most: it is cut behind the last question that fits


def training_batch(tasks, length, haystack, tokenizer, batch_size, seed, step, rank=0, asking="along"):
    """
    Stories with questions and answers in place, mixed to `length` tokens (0: bare stories of up to BARE_TOKENS, haystack unused),
    a pure function of its arguments -> x, y (batch_size, L) int64 and the task of each row. y is the next token where that belongs to
    an answer, and -1 elsewhere; L is a multiple of 16. Ranks 0 to R-1 together draw what rank 0 alone would with R times the batch size.
    asking: the stories ask "along" the way, as bAbI does, or at their end, with no text between the questions: all that their "own"
    task, or "all" tasks together, can ask about them.
    """
    rows, names = [], []
    for row in range(rank * batch_size, (rank + 1) * batch_size):
        rng = np.random.default_rng([seed, step, row])
        task, lines = training_row(tasks, length or BARE_TOKENS, tokenizer, random.Random(int(rng.integers(1 << 62))), asking)
        told = 1 + max(i for i, (_, n) in enumerate(lines) if not n)  # facts, and questions between them
        end, offsets = join([ids for ids, _ in lines[told:]])
        pieces = [*(ids for ids, _ in lines[:told]), end]
        ids, starts = haystack.mix(pieces, length, rng) if length else join(pieces)
        starts = [*starts[:told], *(starts[told] + offsets)]
        names.append(task)
        rows.append((ids, [(start + len(line) - n, start + len(line)) for start, (line, n) in zip(starts, lines) if n]))
    width = -(-max(len(ids) for ids, _ in rows) // 16) * 16
    x, y = np.zeros((batch_size, width), dtype=np.int64), np.full((batch_size, width), -1)
    for i, (ids, answers) in enumerate(rows):
        x[i, :len(ids)] = ids
        for start, end in answers:
            y[i, start - 1:end - 1] = ids[start:end]
    return torch.from_numpy(x), torch.from_numpy(y), names


class Stories:
    """Stories as train.py sees them, in the same form as Corpus of data/text.py."""
    endless = True  # no story comes twice, so the last step is the best one, whatever a few answers say

    def __init__(self, tasks, lengths, train, val, tokenizer, meta):
        """tasks: names; lengths in tokens, in the order of the curriculum; train and val: Haystack."""
        self.tasks, self.lengths, self.train, self.val, self.tokenizer, self.meta = tasks, lengths, train, val, tokenizer, meta
        self.columns = ("length", "val_loss", "accuracy", *tasks)  # of an evaluation
        self.place = [0, 0]  # in the curriculum: which length, and the update in which it began

    def draw(self, haystack, length, config, seed, step, part, asking):
        """
        As many rows as fit into batch_size * n_segments * block_size tokens, asking as in `training_batch`
        -> inputs, targets (rows, length), task of each row
        """
        usual = length or 128  # most bare stories are about as long
        rows = max(1, config.batch_size * config.n_segments * config.block_size // usual)
        return training_batch(self.tasks, length, haystack, self.tokenizer, rows, seed, step, part, asking)

    def batch(self, config, step, part):
        """Inputs and targets (rows, length) of one part of an update; targets are -1 but for answers."""
        rng = np.random.default_rng([config.seed, step])
        stage = int(rng.integers(self.place[0] + 1)) if rng.random() < config.rehearse else self.place[0]
        return self.draw(self.train, self.lengths[stage], config, config.seed, step, part, "all" if rng.random() < RECALL else "along")[:2]

    @torch.no_grad()
    def evaluate(self, model, config, device):
        """
        Loss and accuracy on stories at the current length, in text that training never sees; every second batch asks at the end. An
        answer is right when each of its tokens is the likeliest one (eval_babilong.py lets the model write instead). Each answer counts
        the same: a task of which a length has few answers decides little.
        """
        length, total, right = self.lengths[self.place[0]], 0.0, {task: [] for task in self.tasks}
        for step in range(config.eval_iters):
            x, y, tasks = self.draw(self.val, length, config, config.seed + 1, step, 0, ("along", "own")[step % 2])
            logits, loss, _ = model(x.to(device), y.to(device))
            total += loss.item()
            for task, hits in zip(tasks, answers(logits.argmax(-1).cpu(), y)):
                right[task] += hits
        accuracy = {task: float(np.mean(hits)) for task, hits in right.items() if hits}
        return {"length": length, "val_loss": total / config.eval_iters, "accuracy": float(np.mean(sum(right.values(), []))), **accuracy}

    def report(self, row):
        """An evaluation in words."""
        accuracy = " ".join(f"{task} {row[task]:.3f}" for task in self.tasks if task in row)
        return f"{row['length']} tokens: validation loss {row['val_loss']:.4f}, accuracy {row['accuracy']:.3f} ({accuracy})"

    def advance(self, step, row, config):
        """Move on to the next length if this one is learned or half of the updates that were left are spent -> whether it did."""
        stage, since = self.place
        spent = 2 * (step - since) >= config.max_iters - since
        if stage == len(self.lengths) - 1 or step == since or not spent and row["accuracy"] < config.advance_at:
            return False
        self.place = [stage + 1, step]
        return True

    def example(self, model, device):
        """A story, its question and the model's answer."""
        rng = np.random.default_rng(0)
        sample = samples(simulate(self.tasks[0], random.Random(0)))[-1]
        prompt = torch.tensor(evaluation_sample(sample, 0, self.val, self.tokenizer, rng)[None].astype(np.int64), device=device)
        answer = self.tokenizer.decode(model.generate(prompt, 8, temperature=0)[0, prompt.size(1):].tolist())
        return f"{' '.join(sample.context)} {sample.question}{answer.split('.')[0]}. (right: {sample.answer})"


def answers(found, y):
    """found, y (rows, L): likeliest tokens and targets, -1 between answers -> for each row, whether each answer is right."""
    result = []
    for hits, asked in zip((found == y).numpy(), (y != -1).numpy()):
        edges = np.flatnonzero(np.diff(asked, prepend=False, append=False))  # an answer begins, ends, begins ...
        result.append([bool(hits[a:b].all()) for a, b in zip(edges[::2], edges[1::2])])
    return result


def tokenizer_text(text):
    """What a tokenizer learns from: the text, and stories of all tasks, so that their words become tokens."""
    rng = random.Random(0)
    lessons = (simulate(task, rng) for task in TASKS for _ in range(LESSONS))
    return text + "".join(f"\n {line.text} {line.answer}." for story in lessons for line in story)


def parse_tasks(text):
    """The tasks of "qa1,qa2". Raises ValueError."""
    tasks = text.split(",")
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"task {task} in tasks={text} is not known: use {', '.join(TASKS)}")
    return tasks


def prepare(config):
    """The Stories of a TrainConfig. Raises ValueError or OSError, one line that says what to do."""
    tasks = parse_tasks(config.tasks)
    lengths = [parse_length(length) for length in config.lengths.split(",")]
    text, sha, source, _ = read_text(config.corpus)
    train, val = split(text)
    seen = tokenizer_text(text if config.tokenizer == "char" else train)
    tokenizer = tokenizers.build(config.tokenizer, seen, config.vocab_size)
    train, val = Haystack(train, tokenizer), Haystack(val, tokenizer)
    for length in lengths:
        training_batch(tasks, length, train, tokenizer, 1, config.seed, 0)  # a length that no story fits into is told now
    meta = {"source": source, "sha256": sha, "tokenizer": config.tokenizer, "vocab_size": tokenizer.n_vocab,
            "tokens": {"train": len(train.ids), "val": len(val.ids)}}
    return Stories(tasks, lengths, train, val, tokenizer, meta)
