"""
Stories as train.py sees them: batches of BABILong's tasks at the current length of a curriculum.

The curriculum moves on to the next length when the current one is learned, or when half of the
steps that were left are spent. Part of the batches rehearse the shorter lengths. In most batches
the stories ask at their end about all that they told, whatever any of the tasks would ask: that
gives a memory many answers to learn from. Lengths that let in one fact more each, one after the
other, teach to match names.

A length such as 128k/2k is time dilation: 2,000 tokens whose segments without a part of the story
are written so often that all together count as 128,000. What training asks of the gates is then
what a text of 128,000 tokens asks: to keep over two thousand segments, and to let nothing in.
"""
import random
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from data.babi import TASKS, simulate
from data.babilong import (
    ANSWER_TOKENS,
    Haystack,
    encode_line,
    hide_question,
    join,
    parse_length,
    parse_list,
    parse_tasks,
    questions_of,
)
from data.dataset import EvaluationBatch
from data.text import read_text, split
from data.tokenizer import decode_inside, make_tokenizer

RECALL = 0.7       # share of the batches whose stories ask at their end
LESSONS = 400      # stories of each task that the tokenizer sees
BARE_TOKENS = 256  # of a bare story in training, at most: the rest of it is left out
TRIES = 5000       # stories that are written until one has a question within a length


# --- A curriculum of stages: lengths of text here, numbers of pairs in data/pairs.py

def rng_of_step(config, step):
    """The Generator of what all rows of a step share; its stream is none of a row's own."""
    return np.random.default_rng(np.random.SeedSequence([config.seed, step], spawn_key=(1,)))


def stage_of_batch(progress, config, rng):
    """The stage a batch is of: the current one, in a share of the batches any one up to it."""
    stage, _ = progress
    return int(rng.integers(stage + 1)) if rng.random() < config.rehearse else stage


def moved_on(progress, n_stages, step, accuracy, config):
    """
    The progress after an evaluation, [index of the stage, step in which it began]: at the next
    stage if this one is learned (accuracy of advance_at), or if half of the steps that were left
    when it began are spent.
    """
    stage, began = progress
    learned = accuracy >= config.advance_at
    spent = 2 * (step - began) >= config.max_iters - began
    is_time = stage + 1 < n_stages and step > began and (learned or spent)
    return [stage + 1, step] if is_time else progress


# --- Lengths

class Length(NamedTuple):
    """A length of the curriculum."""
    tokens: int   # of a story and the text around it; 0: bare stories
    counted: int  # what its segments count for in the write, in tokens: more with time dilation


def parse_curriculum(text):
    """
    The Lengths of "512,2k,128k/2k". 128k/2k is 2,000 tokens that count as 128,000, see `dilation`.
    Raises ValueError.
    """
    lengths = []
    for name in parse_list("lengths", text):
        counted, slash, tokens = name.partition("/")
        length = Length(parse_length(tokens if slash else counted), parse_length(counted))
        if slash and not 0 < length.tokens < length.counted:
            raise ValueError(f"length {name} in lengths={text} must count as more tokens than it "
                             "has: use for example 128k/2k")
        if length in lengths:
            raise ValueError(f"lengths={text} lists {name} twice: leave one out")
        lengths.append(length)
    return lengths


def curriculum_of(config):
    """The Lengths of a TrainConfig. Raises ValueError, also where its memory cannot dilate time."""
    lengths = parse_curriculum(config.lengths)
    dilated = any(length.counted > length.tokens for length in lengths)
    if dilated and (config.memory, config.mem_write) != ("lm2", "attend"):
        raise ValueError(f"lengths={config.lengths} has time dilation, which needs memory=lm2 and "
                         "mem_write=attend: leave out what has a /")
    return lengths


# --- Batches

def training_row(tasks, limit, tokenizer, rng, asking, tries=TRIES):
    """
    A task, and the encoded lines of one of its stories up to the last question within `limit`
    tokens. Raises ValueError where none of `tries` stories has one.
    """
    for _ in range(tries):
        task = rng.choice(tasks)
        ask = {"along": (), "own": [task], "all": tasks}[asking]
        lines = [encode_line(line, tokenizer) for line in simulate(task, rng, ask)]
        ends = np.cumsum([len(ids) for ids, _ in lines])
        fitting = [i for i, (_, n_answer) in enumerate(lines) if n_answer and ends[i] <= limit]
        if fitting:
            return task, lines[:fitting[-1] + 1]
    raise ValueError(f"no story of {', '.join(tasks)} has a question within {limit} tokens: "
                     "use a greater length")


def mix_story(lines, length, haystack, rng):
    """
    The encoded lines of a story mixed to `length` tokens (0: the bare story) -> ids, and where each
    line begins. The questions behind the last fact stay together.
    """
    told = 1 + max(i for i, (_, n_answer) in enumerate(lines) if not n_answer)
    questions, offsets = join([ids for ids, _ in lines[told:]])
    pieces = [ids for ids, _ in lines[:told]] + [questions]
    ids, starts = haystack.mix(pieces, length, rng) if length else join(pieces)
    return ids, np.append(starts[:told], starts[told] + offsets)


def training_batch(tasks, length, haystack, tokenizer, batch_size, seed, step, part=0,
                   asking="along"):
    """
    Stories with questions and answers in place, mixed to `length` tokens (0: bare stories of up to
    BARE_TOKENS, haystack unused), a pure function of its arguments -> x, y (batch_size, L) int64,
    told (batch_size, L) bool, and the task of each row. y is the next token where that belongs to
    an answer, and -1 elsewhere; told is True for the tokens of the story; L is a multiple of 16.
    Parts 0 to P-1 are together what part 0 has with P times the batch size.
    asking: the stories ask "along" the way, as bAbI does, or at their end, with no text between the
    questions: all that their "own" task, or "all" tasks together, can ask about them.
    """
    rows, names = [], []
    for row in range(part * batch_size, (part + 1) * batch_size):
        rng = np.random.default_rng([seed, step, row])
        story_rng = random.Random(int(rng.integers(1 << 62)))
        task, lines = training_row(tasks, length or BARE_TOKENS, tokenizer, story_rng, asking)
        names.append(task)
        rows.append((*mix_story(lines, length, haystack, rng), lines))
    width = -(-max(len(ids) for ids, _, _ in rows) // 16) * 16
    x = np.zeros((batch_size, width), dtype=np.int64)
    y = np.full((batch_size, width), -1)
    told = np.zeros((batch_size, width), dtype=bool)
    for i, (ids, starts, lines) in enumerate(rows):
        x[i, :len(ids)] = ids
        for start, (line, n_answer) in zip(starts, lines):
            end = start + len(line)
            told[i, start:end] = True
            if n_answer:
                y[i, end - n_answer - 1:end - 1] = ids[end - n_answer:end]
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(told), names


def dilation(told, n_tokens, T):
    """
    Time dilation: how often each segment of T tokens is to count, so that together they are
    n_tokens. A segment with a token of the story counts once, and the empty ones share the rest
    equally. told (B, L) bool -> (B, S) float32, at least 1, S = L / T rounded up
    """
    S = -(-told.size(1) // T)
    full = F.pad(told, (0, S * T - told.size(1))).unflatten(1, (S, T)).any(-1)
    n_full = full.sum(1, keepdim=True)
    of_empty = (n_tokens / T - n_full) / (S - n_full).clamp(min=1)
    return torch.where(full, 1.0, of_empty.clamp(min=1.0))


# --- The data set

class Stories:
    """Stories as train.py sees them: a Dataset of data/dataset.py."""
    last_is_best = True  # no story comes twice, so nothing is overfitted

    def __init__(self, tasks, lengths, train, val, tokenizer, meta):
        """lengths: Lengths in the order of the curriculum; train and val: Haystacks."""
        self.tasks, self.lengths = tasks, lengths
        self.train, self.val = train, val
        self.tokenizer, self.meta = tokenizer, meta
        self.columns = ("length", "val_loss", "accuracy") + tuple(tasks)
        self.progress = [0, 0]  # the index of the current length, and the step in which it began

    def draw(self, haystack, length, config, seed, step, part, asking):
        """
        As many rows as fit into batch_size * n_segments * block_size tokens, asking as in
        `training_batch` -> inputs, targets (rows, L), repeats (rows, S) or None, task of each row
        """
        usual = length.tokens or 128  # most bare stories are about as long
        rows = config.batch_size * config.n_segments * config.block_size // usual
        x, y, told, tasks = training_batch(self.tasks, length.tokens, haystack, self.tokenizer,
                                           max(1, rows), seed, step, part, asking)
        repeats = None
        if length.counted > length.tokens:
            repeats = dilation(told, length.counted, config.block_size)
        return x, y, repeats, tasks

    def batch(self, config, step, part):
        """
        Inputs and targets (rows, L) of one part of a step; targets are -1 but for answers. Then
        how often each segment counts (rows, S), None where each does once.
        """
        rng = rng_of_step(config, step)
        length = self.lengths[stage_of_batch(self.progress, config, rng)]
        asking = "all" if rng.random() < RECALL else "along"
        return self.draw(self.train, length, config, config.seed, step, part, asking)[:3]

    def evaluation_batches(self, config):
        """
        Stories at the current length, in text that training never sees (val_loss); every second
        batch asks at the end, only what its own task asks.
        """
        stage, _ = self.progress
        for step in range(config.eval_iters):
            asking = ("along", "own")[step % 2]
            x, y, repeats, tasks = self.draw(self.val, self.lengths[stage], config,
                                             config.seed + 1, step, 0, asking)
            yield EvaluationBatch("val_loss", x, y, False, tasks, repeats)

    def position(self):
        """The current length, in the tokens that it counts as."""
        stage, _ = self.progress
        return {"length": self.lengths[stage].counted}

    def report(self, row):
        """An evaluation in words."""
        tasks = " ".join(f"{task} {row[task]:.3f}" for task in self.tasks if task in row)
        stage, _ = self.progress
        tokens, counted = self.lengths[stage]
        length = f"{tokens:,} tokens" + (f" that count as {counted:,}" if counted > tokens else "")
        return (f"{length}: validation loss {row['val_loss']:.4f}, "
                f"accuracy {row['accuracy']:.3f} ({tasks})")

    def advance(self, step, row, config):
        n_stages = len(self.lengths)
        self.progress = moved_on(self.progress, n_stages, step, row["accuracy"], config)

    def example(self, model, device):
        """A story, its question and the model's answer."""
        question = questions_of(simulate(self.tasks[0], random.Random(0)))[-1]
        rng = np.random.default_rng(0)
        ids = hide_question(question, 0, self.val, self.tokenizer, rng)
        prompt = torch.tensor(ids.astype(np.int64), device=device)[None]
        written = model.generate(prompt, ANSWER_TOKENS, temperature=0)[0, prompt.size(1):]
        answer, _, _ = decode_inside(self.tokenizer, written.tolist()).partition(".")
        facts = " ".join(question.context)
        return f"{facts} {question.text}{answer}. (right: {question.answer})"


def right_answers(found, y):
    """
    found, y (rows, L): likeliest tokens and targets, -1 between answers -> for each row a list:
    whether each of its answers is right to the last token.
    """
    result = []
    for hits, asked in zip((found == y).numpy(), (y != -1).numpy()):
        edges = np.flatnonzero(np.diff(asked, prepend=False, append=False))
        begins, ends = edges[::2], edges[1::2]
        result.append([bool(hits[begin:end].all()) for begin, end in zip(begins, ends)])
    return result


def tokenizer_text(text):
    """What a tokenizer learns from: the text, and stories of all tasks, for their words."""
    rng = random.Random(0)
    lessons = [simulate(task, rng) for task in TASKS for _ in range(LESSONS)]
    return text + "".join(f"\n {line.text} {line.answer}." for story in lessons for line in story)


def open_stories(config, tokenizer=None):
    """
    The Stories of a TrainConfig. tokenizer: that of a run which goes on; it is then used instead of
    a new one. Raises ValueError or OSError, one line that says what to do.
    """
    tasks, lengths = parse_tasks(config.tasks), curriculum_of(config)
    found = read_text(config.corpus, "corpus")
    train, val = split(found.text)
    if not tokenizer:
        seen = tokenizer_text(found.text if config.tokenizer == "char" else train)
        tokenizer = make_tokenizer(config.tokenizer, seen, config.vocab_size)
    train, val = Haystack(train, tokenizer), Haystack(val, tokenizer)
    for length in lengths:  # one that few stories fit into is told now
        for asking in ("along", "own", "all"):
            training_row(tasks, length.tokens or BARE_TOKENS, tokenizer, random.Random(0), asking,
                         TRIES // 25)
    meta = {
        "source": found.source,
        "sha256": found.sha256,
        "tokenizer": tokenizer.kind,
        "vocab_size": tokenizer.n_vocab,
        "tokens": {"train": len(train.ids), "val": len(val.ids)},
    }
    return Stories(tasks, lengths, train, val, tokenizer, meta)
