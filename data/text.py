"""
Text to train on: find it, keep it, turn it into token ids once, draw batches from them.

    data/shakespeare/input.txt       the text; fetched on first use
    data/shakespeare/char/           its token ids: train.bin and val.bin (90% and 10%), and
                                     tokenizer.json; meta.json says what they were made from

Token ids are made anew whenever meta.json does not say exactly what is found. What is no plain
text, or too large for memory, is a corpus: data/corpus.py keeps that.
"""
import hashlib
import json
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data.dataset import EvaluationBatch
from data.files import atomic_open, read_utf8, write_json
from data.shakespeare import SOURCES, fetch_shakespeare
from data.tokenizer import check_text, from_json, make_tokenizer, prompt_ids

DATA_DIR = Path(__file__).parent
STREAM_TOKENS = 1 << 17  # as much of the validation text as an evaluation reads in one stream
LARGEST_TEXT = 200_000_000  # bytes of a text that is taken into memory
SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")  # of the files of a corpus


# --- The text

def dataset_files(dataset):
    """The paths of a corpus, a file or what a folder has of its kinds, in the order of names."""
    path = Path(dataset)
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))


def is_corpus(dataset):
    """Whether a dataset is a corpus: not all of it is plain text, or it is too large for memory."""
    if dataset in ("", "shakespeare") or not Path(dataset).exists():
        return False
    paths = dataset_files(dataset)
    return (any(path.name.endswith(SUFFIXES[1:]) for path in paths)
            or sum(path.stat().st_size for path in paths) > LARGEST_TEXT)


class FoundText(NamedTuple):
    text: str
    sha256: str   # of the text in UTF-8
    source: str   # its name
    folder: Path  # for token ids


def read_text(dataset, flag="dataset"):
    """
    The FoundText of a dataset, which a flag names: "shakespeare", a text file, or a folder of .txt
    files, in the order of their names. Raises ValueError or OSError, one line that says what to do.
    """
    path = Path(dataset)
    if dataset == "shakespeare":
        path = DATA_DIR / "shakespeare" / "input.txt"
        if not path.exists():
            fetch_shakespeare(path)
    if not dataset or not path.exists():
        raise OSError(f"{flag}={dataset} is not there: "
                      "use shakespeare, a text file or a folder of .txt files")
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if path.name.endswith(SUFFIXES[1:]) and not path.is_dir():
        raise ValueError(f"{dataset} is not plain text: "
                         "use shakespeare, a text file or a folder of .txt files")
    if not files:
        raise OSError(f"{flag}={dataset} is a folder without .txt files")
    text = "\n".join(read_utf8(file) for file in files)
    if not text.strip():
        raise ValueError(f"{flag}={dataset} is empty: give it some text")
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    if dataset == "shakespeare":
        return FoundText(text, sha256, SOURCES.get(sha256, str(path)), path.parent)
    folder = DATA_DIR / f"{path.resolve().stem[:40]}-{sha256[:8]}"
    return FoundText(text, sha256, str(path), folder)


def split(text):
    """A text in two, 90% to train on and 10% to evaluate on."""
    border = int(0.9 * len(text))
    return text[:border], text[border:]


# --- Its token ids, kept in files

def encode_to_file(tokenizer, text, path, dtype, lines_at_once=20_000):
    """Write the token ids of a text into a binary file, some lines at a time."""
    lines = text.splitlines(keepends=True)
    bar = tqdm(total=len(text), unit="char", unit_scale=True, delay=1,
               desc=f"tokenizing {path.stem}")
    with atomic_open(path) as f, bar:
        for start in range(0, len(lines), lines_at_once):
            piece = "".join(lines[start:start + lines_at_once])
            f.write(np.array(tokenizer.encode(piece), dtype=dtype).tobytes())
            bar.update(len(piece))


def map_file(path, dtype):
    """The token ids of a file, memory-mapped. Raises OSError where it is missing."""
    n = path.stat().st_size // np.dtype(dtype).itemsize
    return np.memmap(path, dtype, mode="r", shape=n) if n else np.empty(0, dtype)


def token_dtype(tokenizer):
    """The narrowest type for its ids."""
    return "uint16" if tokenizer.n_vocab <= 1 << 16 else "uint32"


def digest(tokenizer):
    """The sha256 of a tokenizer."""
    return hashlib.sha256(json.dumps(tokenizer.to_json()).encode()).hexdigest()


def describe(sha256, tokenizer, train, val):
    """What meta.json must say of token ids: what they were made from, and what they are."""
    return {
        "sha256": sha256,
        "tokenizer": tokenizer.kind,
        "vocab_size": tokenizer.n_vocab,
        "tokenizer_sha256": digest(tokenizer),
        "dtype": token_dtype(tokenizer),
        "tokens": {"train": len(train), "val": len(val)},
        "ids_sha256": {"train": hashlib.sha256(train).hexdigest(),
                       "val": hashlib.sha256(val).hexdigest()},
    }


def load_token_files(folder, found):
    """The Text of a folder of token ids, or None where they are not those of a FoundText."""
    try:
        tokenizer = from_json(json.loads(read_utf8(folder / "tokenizer.json")))
        train = map_file(folder / "train.bin", token_dtype(tokenizer))
        val = map_file(folder / "val.bin", token_dtype(tokenizer))
        saved = json.loads(read_utf8(folder / "meta.json"))
    except (OSError, ValueError):
        return None
    meta = describe(found.sha256, tokenizer, train, val)
    return Text(train, val, tokenizer, {"source": found.source} | meta) if saved == meta else None


def make_token_files(folder, found, tokenizer):
    """
    Encode a FoundText into a folder. Each file is replaced by a whole one, meta.json last: until
    then it does not describe the others. Raises ValueError where the tokenizer lacks a character.
    """
    check_text(tokenizer, found.text)
    dtype = token_dtype(tokenizer)
    train, val = split(found.text)
    encode_to_file(tokenizer, train, folder / "train.bin", dtype)
    encode_to_file(tokenizer, val, folder / "val.bin", dtype)
    write_json(folder / "tokenizer.json", tokenizer.to_json())
    train, val = (map_file(folder / f"{name}.bin", dtype) for name in ("train", "val"))
    write_json(folder / "meta.json", describe(found.sha256, tokenizer, train, val))


def open_text(dataset, kind="char", vocab_size=1024, tokenizer=None):
    """
    The Text of a dataset under a tokenizer (char, bpe with vocab_size tokens, gpt2), made on first
    use and kept. tokenizer: that of a run which goes on; it is then used instead of a new one.
    Raises ValueError or OSError, one line that says what to do.
    """
    found = read_text(dataset)
    if tokenizer:
        kind, vocab_size = tokenizer.kind, tokenizer.n_vocab
    for folder in token_folders(found.folder, kind, vocab_size, tokenizer):
        text = load_token_files(folder, found)
        if text and is_wanted(text.tokenizer, kind, vocab_size, tokenizer):
            return text
    if not tokenizer:
        seen = split(found.text)[0] if kind == "bpe" else found.text
        tokenizer = make_tokenizer(kind, seen, vocab_size)
    make_token_files(folder, found, tokenizer)
    text = load_token_files(folder, found)
    if not text:
        raise OSError(f"{folder} was changed while it was written: start again")
    return text


def token_folders(folder, kind, vocab_size, tokenizer):
    """Where the token ids of a text may lie, the last one where they are to be made."""
    folders = [folder / (f"bpe{vocab_size}" if kind == "bpe" else kind)]
    if tokenizer:  # where it is not the one that this text gets today, it has a folder of its own
        folders.append(folders[0].with_name(f"{folders[0].name}-{digest(tokenizer)[:8]}"))
    return folders


def is_wanted(found, kind, vocab_size, tokenizer):
    """Whether a tokenizer is the given one, or of the given kind where none is given."""
    if tokenizer:
        return digest(found) == digest(tokenizer)
    return found.kind == kind and (kind != "bpe" or found.n_vocab == vocab_size)


# --- Batches

class Shards:
    """Token ids that lie in several arrays as one: len(), and slices without a step."""

    def __init__(self, arrays, start, stop):
        self.arrays, self.start, self.stop = arrays, start, stop
        self.borders = [0, *accumulate(map(len, arrays))]  # where each array begins, and the end

    def __len__(self):
        return self.stop - self.start

    def __getitem__(self, wanted):
        start, stop, _ = wanted.indices(len(self))
        start, stop = start + self.start, stop + self.start
        first, last = bisect_right(self.borders, start) - 1, bisect_left(self.borders, stop)
        parts = [self.arrays[i][max(0, start - self.borders[i]):stop - self.borders[i]]
                 for i in range(first, last)]
        return np.concatenate([self.arrays[0][:0], *parts])


@dataclass
class Text:
    """A text as train.py sees it: a Dataset of data/dataset.py."""
    train: np.ndarray  # (n,) token ids, memory-mapped; or the Shards of a corpus
    val: np.ndarray
    tokenizer: object
    meta: dict         # source, and what `describe` says
    columns = ("train_loss", "val_loss", "stream_loss")
    progress = None       # text has no curriculum
    last_is_best = False  # it is overfitted in the end

    def batch(self, config, step, part):
        """Inputs and targets (batch_size, n_segments * block_size) of one part of a step."""
        length = config.n_segments * config.block_size
        x, y = get_batch(self.train, length, config.batch_size, config.seed, step, part)
        return x, y, None

    def evaluation_batches(self, config):
        """
        Windows spread over both splits (train_loss, val_loss), then the validation text as one
        stream, piece by piece (stream_loss).
        """
        length = config.n_segments * config.block_size
        for column, data in (("train_loss", self.train), ("val_loss", self.val)):
            for x, y in spread_batches(data, length, config.batch_size, config.eval_iters):
                yield EvaluationBatch(column, x, y, continues=False, tasks=[])
        n = min(STREAM_TOKENS, len(self.val) - 1)
        longest = 16 * config.block_size
        for start in range(0, n, longest):
            x, y = windows(self.val, [start], min(longest, n - start))
            yield EvaluationBatch("stream_loss", x, y, continues=start > 0, tasks=[])

    def position(self):
        return {}

    def report(self, row):
        """An evaluation in words."""
        return (f"train loss {row['train_loss']:.4f}, validation loss {row['val_loss']:.4f}, "
                f"as one stream {row['stream_loss']:.4f}")

    def advance(self, step, row, config):
        """Text has no curriculum to move on in."""

    def example(self, model, device):
        """Text that the model writes."""
        prompt = torch.tensor([prompt_ids(self.tokenizer, "")], device=device)
        written = model.generate(prompt, 500, temperature=0.8)[0, len(self.tokenizer.begin):]
        return self.tokenizer.decode(written.tolist())


def check_length(text, length):
    """Raises ValueError where a split of a Text is too small for a sequence of length tokens."""
    for name, data in (("training", text.train), ("validation", text.val)):
        if len(data) <= length:  # the target of the last token is one more
            raise ValueError(
                f"the {name} split has {len(data)} tokens, too few for a sequence of "
                f"n_segments * block_size = {length}: use more text, or a smaller --n_segments "
                "or --block_size")


def windows(data, starts, length):
    """The windows of a split that begin at starts (B,) -> inputs and targets (B, length), int64."""
    found = np.stack([data[start:start + length + 1] for start in starts])  # (B, length + 1)
    found = torch.from_numpy(found.astype(np.int64))
    return found[:, :-1], found[:, 1:]


def get_batch(data, length, batch_size, seed, step, part=0):
    """
    Random windows of a split, a pure function of (seed, step, part) -> inputs and targets
    (batch_size, length). Parts 0 to P-1 are together what part 0 has with P times the batch size.
    """
    rng = np.random.default_rng([seed, step])
    starts = rng.integers(len(data) - length, size=(part + 1) * batch_size)
    return windows(data, starts[-batch_size:], length)


def spread_batches(data, length, batch_size, n_batches):
    """
    Random windows for an evaluation, one from each of n_batches * batch_size equal stretches of the
    split, the same ones in all runs -> an iterator of inputs and targets (batch_size, length)
    """
    n = n_batches * batch_size
    stretch = (len(data) - length) / n
    starts = (np.arange(n) + np.random.default_rng(0).random(n)) * stretch
    for batch in starts.astype(int).reshape(n_batches, batch_size):
        yield windows(data, batch, length)
