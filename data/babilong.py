"""
BABILong: the facts of bAbI stories hidden in a long text, and questions about them (Kuratov et al.
2024, arXiv 2406.10149).

    read_babilong    the questions of a real BABILong file
    Haystack         a text by sentences, to hide facts in
    hide_question    facts hidden in a text, and one question at its end
    is_correct       BABILong's rule for the answer
"""
import csv
import io
import json
import re
import textwrap
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.babi import TASKS
from data.files import read_utf8
from data.tokenizer import encode_inside

LONGEST = 100_000_000  # tokens of a length; a text of more would not fit into memory
ANSWER_TOKENS = 24  # the longest answer is three objects and a full stop, a token each letter


class Question(NamedTuple):
    context: tuple  # the sentences before the question
    text: str
    answer: str


def questions_of(story):
    """
    A Question for each one in a story, with all facts before it; earlier questions are dropped, as
    in BABILong.
    """
    found, facts = [], []
    for line in story:
        if line.answer:
            found.append(Question(tuple(facts), line.text, line.answer))
        else:
            facts.append(line.text)
    return found


# --- Flags: lists of tasks and of lengths

def parse_list(name, text):
    """
    The parts of "qa1, qa2": spaces around the commas and a comma at the end do not matter. name: of
    the flag, for the message. Raises ValueError where nothing is listed, or something twice.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ValueError(f"{name}={text} lists nothing: name at least one")
    for part in parts:
        if parts.count(part) > 1:
            raise ValueError(f"{name}={text} lists {part} twice: leave one out")
    return parts


def parse_tasks(text):
    """The tasks of "qa1,qa2". Raises ValueError."""
    tasks = parse_list("tasks", text)
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"task {task} in tasks={text} is not known: use {', '.join(TASKS)}")
    return tasks


def parse_length(text):
    """Tokens of a length: "0k" -> 0, "512" -> 512, "4k" -> 4000, "1M" -> 1000000, or ValueError."""
    match = re.fullmatch("([0-9]{1,9})([kM]?)", text)
    if not match:
        raise ValueError(f"length {text!r} is not known: use for example 0k, 512, 4k or 1M")
    tokens = int(match[1]) * {"": 1, "k": 1000, "M": 1_000_000}[match[2]]
    if tokens > LONGEST:
        raise ValueError(f"length {text} is too long: use at most {LONGEST // 1_000_000}M")
    return tokens


def parse_lengths(text):
    """
    The lengths of "0k,512,4k" and their tokens, in this order: {"0k": 0, "512": 512, "4k": 4000}.
    Raises ValueError.
    """
    lengths = {}
    for name in parse_list("lengths", text):
        tokens = parse_length(name)
        if tokens in lengths.values():
            raise ValueError(f"lengths={text} lists {tokens} tokens twice: leave one out")
        lengths[name] = tokens
    return lengths


# --- Files

EXPECTED = "expected a record with input, question and target"


def parse_json(text, path, line):
    """A JSON value that begins at a line of a file. Raises ValueError that names both."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}:{line + e.lineno - 1}: {EXPECTED} as JSON ({e.msg})") from None
    except (ValueError, RecursionError) as e:  # 5,000 digits, or a list in a list in ...
        raise ValueError(f"{path}:{line}: {EXPECTED} as JSON ({e})") from None


def read_records(path):
    """The records of a .json, .csv or .jsonl file -> pairs of (where in the file, record)."""
    kind, text = Path(path).suffix, read_utf8(path)
    if kind == ".json":
        records = parse_json(text, path, line=1)
        if not isinstance(records, list):
            raise ValueError(f"{path}:1: {EXPECTED}, in a list")
        return [(f"{path}: record {n}", record) for n, record in enumerate(records, 1)]
    if kind == ".csv":
        csv.field_size_limit(1 << 30)  # a context of 128k tokens is longer than csv believes
        reader = csv.DictReader(io.StringIO(text))
        try:
            return [(f"{path}:{reader.line_num}", record) for record in reader]
        except csv.Error as e:
            raise ValueError(f"{path}:{reader.line_num}: {EXPECTED} ({e})") from None
    return [(f"{path}:{n}", parse_json(line, path, n))
            for n, line in enumerate(text.split("\n"), 1) if line.strip()]


def read_babilong(path):
    """
    The Questions of a BABILong file with input, question and target in .json (a list), .jsonl or
    .csv. Raises ValueError that names file and record, OSError where the file cannot be read.
    """
    found = []
    for where, record in read_records(path) or [(f"{path}:1", None)]:
        keys = ("input", "question", "target")
        values = [record.get(key) for key in keys] if isinstance(record, dict) else [None]
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"{where}: {EXPECTED}")
        context, question, answer = (value.strip() for value in values)
        if not question or not answer:
            raise ValueError(f"{where}: {EXPECTED}, and neither question nor target empty")
        if re.search("[\ud800-\udfff]", context + question + answer):
            raise ValueError(f"{where}: it has half of a surrogate pair: mend the text")
        found.append(Question(tuple(split_sentences(context)), question, answer))
    return found


def find_file(folder, task, length=""):
    """
    The file of a task in a folder of bAbI, or with a length ("4k") in one of BABILong as
    RMT-team/babilong has it. Raises ValueError.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder: name the one that has the files of {task}")
    if length:
        names = [f"{task}/{length}", f"data/{task}/{length}", f"{length}/{task}"]
        patterns = [f"{name}.{kind}" for name in names for kind in ("json", "jsonl", "csv")]
    else:
        patterns = [f"{task}_*test*.txt", f"{task}_*.txt"]
    for pattern in patterns:
        if files := sorted(Path(folder).glob(pattern)):
            return files[0]
    wanted = f"{task} at {length}" if length else task
    raise ValueError(f"{folder} has no file for {wanted}: looked for {', '.join(patterns)}")


# --- Scores

def is_correct(output, answer, question, labels):
    """
    BABILong's rule: the labels in the output's first sentence, but for those in the question, are
    the expected ones and no other. "one" in "none" does not count (the original could never score
    "none").
    """
    pattern = "|".join(labels).lower()
    first_sentence = re.split(r"\.|<context>|<example>", output.lower())[0]
    said = set(re.findall(pattern, first_sentence))
    asked = set(re.findall(pattern, question.lower()))
    return said - asked == set(answer.lower().split(","))


# --- Haystack

def split_sentences(text, longest=500):
    """
    The sentences of a text in which all whitespace became single spaces; what has no end within so
    many characters is split there.
    """
    found = []
    for sentence in re.split(r"(?<=[.!?]) ", " ".join(text.split())):
        if len(sentence) > longest:
            found += textwrap.wrap(sentence, longest, break_on_hyphens=False)
        elif sentence:
            found.append(sentence)
    return found


def join(pieces):
    """Arrays of ids -> all of them in one, and where each begins."""
    sizes = [len(piece) for piece in pieces]
    return np.concatenate(pieces), np.cumsum(sizes) - sizes


class Haystack:
    def __init__(self, text, tokenizer):
        """
        The sentences of a text, tokenized once, each with a space in front. Raises ValueError where
        there is none, or a character that the tokenizer lacks.
        """
        encoded = [encode_inside(tokenizer, " " + sentence) for sentence in split_sentences(text)]
        if not encoded:
            raise ValueError("the text to hide facts in has no sentence: give it some text")
        self.ids = np.concatenate(encoded).astype(np.int32)
        self.starts = np.cumsum([0] + [len(ids) for ids in encoded[:-1]])

    def mix(self, pieces, length, rng):
        """
        Hide pieces (arrays of ids) between the sentences of a random stretch of the text, in order
        and uniformly; the last one ends it. rng: a NumPy Generator -> ids (length,), and where each
        piece begins. The stretch goes round the end of the text, and its first sentence lacks as
        much of its beginning as makes the length exact. No text where the pieces have `length`
        tokens or more.
        """
        joined, offsets = join(pieces)
        n = length - len(joined)
        if n <= 0:
            return joined, offsets
        n_tokens, n_sentences = len(self.ids), len(self.starts)
        # count sentences and tokens through as many laps of the text as the stretch needs; it ends
        # before sentence `last`
        last = -(-n // n_tokens) * n_sentences + int(rng.integers(n_sentences))
        end = last // n_sentences * n_tokens + self.starts[last % n_sentences]
        lap, begin = divmod(end - n, n_tokens)
        first = lap * n_sentences + np.searchsorted(self.starts, begin)  # the first whole sentence
        # each piece but the last stands in front of a sentence, drawn in order of the text
        in_front = np.sort(rng.integers(first, last, size=len(pieces) - 1, endpoint=True))
        in_front = np.append(in_front, last)
        borders = in_front // n_sentences * n_tokens + self.starts[in_front % n_sentences]
        borders -= end - n  # in tokens from the beginning of the stretch
        text = self.ids[np.arange(end - n, end) % n_tokens]
        parts, done = [], 0
        for border, piece in zip(borders.tolist(), pieces):
            parts += text[done:border], piece
            done = border
        return np.concatenate(parts), borders + offsets


@lru_cache(1 << 16)  # sentences of the simulator are finite in number
def encode_text(text, tokenizer):
    return np.array(encode_inside(tokenizer, " " + text), dtype=np.int32)


def encode_line(line, tokenizer):
    """
    Ids of " Mary moved to the bathroom.", or of a question and its answer, " Where is Mary?
    bathroom." -> ids, tokens of the answer (0 for a fact)
    """
    if not line.answer:
        return encode_text(line.text, tokenizer), 0
    answer = encode_text(line.answer + ".", tokenizer)
    return np.concatenate([encode_text(line.text, tokenizer), answer]), len(answer)


def hide_question(question, length, haystack, tokenizer, rng):
    """
    The facts of a Question hidden in text, the question at the end, `length` tokens in all, without
    any text where they have as many by themselves (or where it is 0) -> ids (length,), or more.
    rng: a NumPy Generator. Raises ValueError where the tokenizer lacks a character.
    """
    pieces = [encode_text(sentence, tokenizer) for sentence in question.context]
    pieces.append(encode_text(question.text, tokenizer))
    ids, _ = haystack.mix(pieces, length, rng) if length else join(pieces)
    return ids
