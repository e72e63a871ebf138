"""
BABILong: the facts of bAbI stories hidden in a long text, and questions about them (Kuratov et al. 2024, arXiv 2406.10149).

    read_babilong        questions of a real BABILong file
    Haystack             a corpus by sentences, to hide facts in
    evaluation_sample    the facts in a text, and one question at the end; is_correct: BABILong's rule for its answer
"""
import csv
import json
import re
import textwrap
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.babi import read_lines


class Sample(NamedTuple):
    context: tuple  # the sentences before the question
    question: str
    answer: str


def samples(story):
    """One Sample for each question of a story, with all facts before it; earlier questions are dropped, as in BABILong."""
    return [Sample(tuple(fact.text for fact in story[:i] if not fact.answer), line.text, line.answer)
            for i, line in enumerate(story) if line.answer]


def read_babilong(path):
    """Samples of a BABILong file: input, question, target in .json (a list), .jsonl or .csv. Raises ValueError that names the record."""
    lines, kind, records = read_lines(path), Path(path).suffix, []
    expected = "expected a record with input, question and target"
    try:
        if kind == ".json":
            records = [(f"{path}: record {n}", record) for n, record in enumerate(json.loads("\n".join(lines)), 1)]
        elif kind == ".csv":
            csv.field_size_limit(1 << 30)  # a context of 128k tokens is longer than csv believes
            reader = csv.DictReader(line + "\n" for line in lines)
            records = [(f"{path}:{reader.line_num}", record) for record in reader]
        else:
            for line in lines:
                records.append((f"{path}:{len(records) + 1}", json.loads(line)))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}:{len(records) + e.lineno}: {expected} as JSON ({e.msg})") from None
    except (TypeError, csv.Error) as e:
        raise ValueError(f"{path}:1: {expected}, in a list ({e})") from None
    found = []
    for place, record in records or [(f"{path}:1", None)]:
        values = [record.get(key) for key in ("input", "question", "target")] if isinstance(record, dict) else [None]
        if not all(isinstance(value, str) for value in values) or not values[1].strip() or not values[2].strip():
            raise ValueError(f"{place}: {expected}")
        found.append(Sample(tuple(split_sentences(values[0])), values[1].strip(), values[2].strip()))
    return found


def find_file(folder, task, length=""):
    """The file of a task in a folder of bAbI, or with a length ("4k") in one of BABILong as RMT-team/babilong has it. Raises ValueError."""
    if length:
        places = [f"{task}/{length}", f"data/{task}/{length}", f"{length}/{task}"]
        patterns = [f"{place}.{kind}" for place in places for kind in ("json", "jsonl", "csv")]
    else:
        patterns = [f"{task}_*test*.txt", f"{task}_*.txt"]
    for pattern in patterns:
        if files := sorted(Path(folder).glob(pattern)):
            return files[0]
    raise ValueError(f"{folder} has no file for {task}{' at ' + length if length else ''}: looked for {', '.join(patterns)}")


def parse_length(text):
    """Tokens of a length: "0k" -> 0, "512" -> 512, "4k" -> 4000, "1M" -> 1000000. Raises ValueError."""
    match = re.fullmatch(r"(\d+)([kM]?)", text)
    if not match:
        raise ValueError(f"length {text!r} is not known: use for example 0k, 512, 4k or 1M")
    return int(match[1]) * {"": 1, "k": 1000, "M": 1_000_000}[match[2]]


def is_correct(output, sample_answer, question, labels):
    """BABILong's rule: the labels in the output's first sentence, but for those in the question, are the expected ones and no other.
    "one" in "none" does not count (the original could never score "none")."""
    pattern = "|".join(labels).lower()
    first_sentence = re.split(r"\.|<context>|<example>", output.lower())[0]
    return set(re.findall(pattern, first_sentence)) - set(re.findall(pattern, question.lower())) == set(sample_answer.lower().split(","))


# --- Haystack

def split_sentences(text, longest=500):
    """The sentences of a text in which all whitespace became single spaces; what has no end within so many characters is cut."""
    sentences = re.split(r"(?<=[.!?]) ", " ".join(text.split()))
    return [part for s in sentences if s for part in (textwrap.wrap(s, longest, break_on_hyphens=False) if len(s) > longest else [s])]


def join(pieces):
    """Arrays of ids -> all of them in one, and where each begins."""
    sizes = [len(piece) for piece in pieces]
    return np.concatenate(pieces), np.cumsum(sizes) - sizes


class Haystack:
    def __init__(self, text, tokenizer):
        """The sentences of a text, tokenized once, each with a space in front. Raises ValueError where there is none."""
        encoded = [tokenizer.encode(" " + sentence) for sentence in split_sentences(text)]
        if not encoded:
            raise ValueError("the text to hide facts in has no sentence: give it some text")
        self.ids = np.concatenate(encoded).astype(np.int32)
        self.starts = np.cumsum([0] + [len(ids) for ids in encoded[:-1]])

    def mix(self, pieces, length, rng):
        """
        Hide pieces (arrays of ids) between the sentences of a random stretch of the text, in order and uniformly; the last one ends it.
        rng: a NumPy Generator -> ids (length,), and where each piece begins. The stretch goes round the end of the text, and its first
        sentence lacks as much of its beginning as makes the length exact. No text where the pieces have `length` tokens or more.
        """
        joined, offsets = join(pieces)
        n = length - len(joined)
        if n <= 0:
            return joined, offsets
        n_tokens, n_sentences = len(self.ids), len(self.starts)
        # count sentences and tokens through as many repetitions of the text as the stretch needs; it ends before sentence `last`
        last = -(-n // n_tokens) * n_sentences + int(rng.integers(n_sentences))
        end = last // n_sentences * n_tokens + self.starts[last % n_sentences]
        lap, begin = divmod(end - n, n_tokens)
        first = lap * n_sentences + np.searchsorted(self.starts, begin)  # the first whole sentence
        borders = np.append(np.sort(rng.integers(first, last, size=len(pieces) - 1, endpoint=True)), last)
        cuts = borders // n_sentences * n_tokens + self.starts[borders % n_sentences] - (end - n)
        text = self.ids[np.arange(end - n, end) % n_tokens]
        parts, done = [], 0
        for cut, piece in zip(cuts.tolist(), pieces):
            parts += text[done:cut], piece
            done = cut
        return np.concatenate(parts), cuts + offsets


@lru_cache(1 << 16)  # sentences of the simulator are finite in number
def encode_text(text, tokenizer):
    return np.array(tokenizer.encode(" " + text), dtype=np.int32)


def encode_line(line, tokenizer):
    """Ids of " Mary moved to the bathroom.", or of a question and its answer " Where is Mary? bathroom." -> ids, tokens of the answer."""
    if not line.answer:
        return encode_text(line.text, tokenizer), 0
    answer = encode_text(line.answer + ".", tokenizer)
    return np.concatenate([encode_text(line.text, tokenizer), answer]), len(answer)


def evaluation_sample(sample, length, haystack, tokenizer, rng):
    """The facts of a sample hidden in text, its question at the end, `length` tokens in all (0: no text) -> ids, an int array."""
    pieces = [encode_text(sentence, tokenizer) for sentence in (*sample.context, sample.question)]
    return haystack.mix(pieces, length, rng)[0] if length else join(pieces)[0]
