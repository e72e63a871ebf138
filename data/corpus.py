"""
A corpus larger than memory: its documents are read one after the other, tokenized by several
processes, and kept as shards of token ids, of which training draws its windows.

    FOLDER/a.jsonl, b.jsonl.gz, c.parquet, d.txt, e.txt.gz    documents, in the order of names
    data/FOLDER-1a2b3c4d/bpe1024/                00000.bin, ...; tokenizer.json; manifest.json

The manifest says what each shard was made from, up to which place in the files. Killed at any
moment, the next start goes on behind the last shard that the manifest has.
"""
import gzip
import hashlib
import io
import json
import os
import re
import signal
import sys
import threading
from codecs import getincrementaldecoder
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from itertools import chain, takewhile
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data.text
from data.files import atomic_open, read_utf8, sha256_of, write_json
from data.text import Shards, Text, digest, is_wanted, map_file, split, token_dtype
from data.tokenizer import check_unicode, from_json, make_tokenizer

BPE_CHARS = 50_000_000   # as much of the beginning is looked at to train a bpe tokenizer
VAL_TOKENS = 10_000_000  # at most, from the end
PIECE = 1 << 18          # characters that are encoded at once
BATCH = 1 << 20          # characters that a process gets at once
PENDING = 3              # batches for each process, at work or waiting
SHARD = 1 << 26          # bytes of a shard
LONGEST_LINE = 1 << 26   # bytes of a line of .jsonl
VERSION = 1              # of the manifest: another one where the same files give other shards
# Behind a single newline, or else before a single space: there no tokenizer's pattern joins what is
# before with what is behind, and the ids of the pieces are those of the whole, but for the space
# that SentencePiece puts before each piece.
CUT = re.compile(r"(?s).*\S\n(?=\S)|.*\S(?= \S)")
END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>")


# --- The files and their documents

class HashedFile(io.FileIO):
    """A file that is hashed while it is read, once and from its beginning to its end."""

    def __init__(self, path):
        super().__init__(path)
        self.sha256 = hashlib.sha256()

    def readinto(self, buffer):
        n = super().readinto(buffer)
        self.sha256.update(memoryview(buffer)[:n])
        return n


def plain_text(f):
    """The text of an open file in blocks, as data.files.read_utf8 has it. Raises ValueError."""
    decoder = io.IncrementalNewlineDecoder(getincrementaldecoder("utf-8")(), translate=True)
    position, block = 0, True
    while block:
        block = f.read(PIECE)
        position += len(block)
        try:
            yield decoder.decode(block, final=not block).replace("\ufeff", "")
        except UnicodeDecodeError as e:
            raise ValueError(f"byte {position - len(e.object) + e.start} is not UTF-8") from None


def json_lines(f):
    """The key `text` of each line of an open .jsonl. Raises ValueError."""
    for number, line in enumerate(iter(lambda: f.readline(LONGEST_LINE), b""), 1):
        try:
            if line.strip():
                text = json.loads(line.decode().removeprefix("\ufeff"))["text"]
                check_unicode(text)
                yield text
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"line {number} is not a JSON object with a string `text`, in UTF-8, "
                             f"below {LONGEST_LINE >> 20} MB") from None


def parquet_rows(f):
    """The column `text` of an open .parquet, row by row. Raises ValueError, or pyarrow's errors."""
    from pyarrow.parquet import ParquetFile  # here, since it takes half a second
    size = os.stat(f.name).st_size
    table = ParquetFile(f.name, buffer_size=1 << 20, pre_buffer=False)  # not whole columns
    if "text" not in table.schema_arrow.names:
        raise ValueError(f"it has no column text, only {table.schema_arrow.names}"[:200])
    batches = table.iter_batches(64, columns=["text"], use_threads=False)
    texts = chain.from_iterable(rows.column(0).to_pylist() for rows in batches)
    for n, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise ValueError(f"row {n} has no string in its column text")
        # pyarrow reads by itself, here and there: this is for sha256 and the progress bar
        f.read(size * n // table.metadata.num_rows - f.tell())
        yield text
    f.read(size - f.tell())  # where there is no row


def documents(f):
    """The documents of an open file, each as strings that follow each other."""
    name = f.name.removesuffix(".gz")
    rows = {".jsonl": json_lines, ".parquet": parquet_rows}.get(Path(name).suffix)
    if name != f.name:
        f = gzip.GzipFile(fileobj=f)
    return ([text] for text in rows(f)) if rows else [plain_text(f)]


def in_pieces(blocks):
    """A document in pieces of at most PIECE characters -> (piece, whether it is the last one)"""
    rest = ""
    for block in blocks:
        rest, at = rest + block, 0
        while len(rest) - at > PIECE:
            cut = CUT.match(rest, at, at + PIECE)
            start, at = at, cut.end() if cut else at + PIECE
            yield rest[start:at], False
        rest = rest[at:]
    if rest:
        yield rest, True


def read_file(path, entry):
    """The pieces of a file -> (text, whether a document ends, bytes read). Raises ValueError."""
    try:
        with io.BufferedReader(HashedFile(str(path)), 1 << 20) as f:
            for blocks in documents(f):
                for text, ends in in_pieces(blocks):
                    yield text, ends, f.tell()
            entry["sha256"] = f.raw.sha256.hexdigest()
    except Exception as e:  # gzip and pyarrow raise a different type for each kind of damage
        why = " ".join(str(e).split())
        raise ValueError(f"{path} cannot be read ({why}): mend it, or leave it out") from None
    if entry_of(path) != entry | {"sha256": None}:
        raise ValueError(f"{path} was changed while it was read: start again")


def read_batches(paths, files, file=0, pieces=0):
    """
    A corpus behind a place, which is a file and how many of its pieces, in batches of about BATCH
    characters -> ([(text, whether a document ends with it)], the place behind the batch)
    """
    batch, size, before = [], 0, sum(entry["size"] for entry in files[:file])
    for number in range(file, len(files)):
        for n, (text, ends, n_bytes) in enumerate(read_file(paths[number], files[number]), 1):
            if number == file and n <= pieces:  # before the place
                continue
            batch.append((text, ends))
            size += len(text)
            place = {"file": number, "pieces": n, "bytes": before + n_bytes}
            if size >= BATCH:
                yield batch, place
                batch, size = [], 0
        before += files[number]["size"]
    if batch:
        yield batch, place


# --- Token ids, by several processes

def end_token(tokenizer):
    """The id of the token that ends a document, None where the vocabulary has none."""
    if tokenizer.kind == "gpt2":
        return tokenizer.encoding.eot_token
    added = tokenizer.description.get("added_tokens", ()) if tokenizer.kind == "hf" else ()
    special = {token["content"]: token["id"] for token in added if token.get("special")}
    return next((special[name] for name in END_TOKENS if name in special), None)


def start_worker(tokenizer):
    """Begin a process that encodes. tokenizer: as JSON, since not all can be sent as they are."""
    global encoder
    encoder = from_json(tokenizer)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    # where the main process is killed, a worker would wait for its next batch for ever
    threading.Thread(target=lambda: parent_process().join() or os._exit(1), daemon=True).start()


def encode_batch(batch):
    """The ids (n,) of a batch, in a worker. Where no token ends a document, a newline does."""
    end, dtype = end_token(encoder), token_dtype(encoder)
    newline, mark = ("\n", []) if end is None else ("", [end])
    return np.concatenate([
        np.array(encoder.encode(text + newline) + mark if ends else encoder.encode(text), dtype)
        for text, ends in batch])


def encoded(batches, tokenizer):
    """
    The ids of batches in their order -> (ids (n,), place). No more than PENDING batches for each
    process are read ahead, or memory would fill with text. Raises OSError, ValueError.
    """
    n, pending = min(os.cpu_count() or 1, 8), deque()
    # a fork shares the modules that are in memory; on other systems it is not safe
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(n, context, start_worker, (tokenizer.to_json(),))
    try:
        for batch, place in batches:
            pending.append((pool.submit(encode_batch, batch), place))
            if len(pending) == PENDING * n:
                future, place = pending.popleft()
                yield future.result(), place
        for future, place in pending:
            yield future.result(), place
    except BrokenProcessPool:
        raise OSError("a process that tokenizes was killed: start again, it goes on") from None
    finally:
        pool.shutdown(cancel_futures=True)


# --- Shards

def name_of(paths):
    """What a corpus is called: its file, or the folder of several."""
    return paths[0] if len(paths) == 1 else paths[0].parent


def entry_of(path):
    """What the manifest says of a file before it is read. Raises OSError."""
    found = path.stat()
    return {"name": path.name, "size": found.st_size, "mtime_ns": found.st_mtime_ns, "sha256": None}


def still_true(path, entry):
    """An entry with the file's time of today, or None where it is another file."""
    if not path.is_file() or [path.name, path.stat().st_size] != [entry["name"], entry["size"]]:
        return None
    time = path.stat().st_mtime_ns  # to hash all of a large corpus at each start takes minutes
    if time != entry["mtime_ns"] and sha256_of(path) != entry["sha256"]:
        return None
    return entry | {"mtime_ns": time}


def load_shards(paths, folder):
    """A folder's manifest, with the shards that are whole, and its tokenizer; or None, None."""
    try:
        tokenizer = from_json(json.loads(read_utf8(folder / "tokenizer.json")))
        manifest = json.loads(read_utf8(folder / "manifest.json"))
        if [manifest["version"], manifest["tokenizer_sha256"]] != [VERSION, digest(tokenizer)]:
            return None, None
        old, shards = manifest["files"], manifest["shards"]
        files = [*map(still_true, paths, old)]
        whole = [*takewhile(bool, (still_true(folder / entry["name"], entry) for entry in shards))]
        complete = manifest["complete"] and len(whole) == len(shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, None
    if None in files or len(paths) != len(old):
        print(f"{name_of(paths)} has changed: its token ids are made anew", flush=True)
        return None, None
    true = manifest | {"files": files, "shards": whole, "complete": complete}
    if true != manifest:
        write_json(folder / "manifest.json", true)  # not to hash again at the next start
    return true, tokenizer


def begin_shards(paths, folder, kind, vocab_size, tokenizer):
    """
    A manifest without shards, and the given tokenizer or a new one. Raises OSError, ValueError.
    """
    files, text = [*map(entry_of, paths)], ""
    for batch, _ in read_batches(paths, files):
        text += "".join(piece + "\n" * ends for piece, ends in batch)
        if kind != "bpe" or tokenizer or len(text) >= BPE_CHARS:
            break
    if not text:
        raise ValueError(f"dataset={name_of(paths)} has no document with text: give it some")
    # without the end of a short corpus, which is for validation
    tokenizer = tokenizer or make_tokenizer(kind, split(text)[0], vocab_size)
    write_json(folder / "tokenizer.json", tokenizer.to_json())
    return {"version": VERSION, "tokenizer_sha256": digest(tokenizer), "files": files,
            "shards": [], "complete": False}, tokenizer


def write_shard(path, stream, bar):
    """Ids of a stream, until they are SHARD bytes -> its entry. Raises OSError, ValueError."""
    sha256, tokens = hashlib.sha256(), 0
    with atomic_open(path) as f:
        for ids, place in stream:
            f.write(ids)
            sha256.update(ids)
            tokens += len(ids)
            bar.update(place["bytes"] - bar.n)
            if f.tell() >= SHARD:
                break
    return entry_of(path) | {"sha256": sha256.hexdigest(), "tokens": tokens, "behind": place}


def make_shards(paths, folder, manifest, tokenizer):
    """
    Make the shards that a manifest lacks, and add them to it one by one. Raises OSError or
    ValueError.
    """
    files, shards = manifest["files"], manifest["shards"]
    place = shards[-1]["behind"] if shards else {"file": 0, "pieces": 0, "bytes": 0}
    batches = read_batches(paths, files, place["file"], place["pieces"])
    bar = tqdm(total=sum(entry["size"] for entry in files), initial=place["bytes"], unit="B",
               unit_scale=True, delay=1, desc=f"tokenizing {name_of(paths).name}")
    with bar, closing(encoded(batches, tokenizer)) as stream:
        for first in stream:
            path = folder / f"{len(shards):05}.bin"
            shards.append(write_shard(path, chain([first], stream), bar))
            write_json(folder / "manifest.json", manifest)
    write_json(folder / "manifest.json", manifest | {"complete": True})
    for path in {*folder.glob("*.bin")} - {folder / entry["name"] for entry in shards}:
        path.unlink()  # of a longer corpus that was here before


def open_corpus(dataset, kind="bpe", vocab_size=1024, tokenizer=None):
    """The Text of a corpus, made on first use and kept, with open_text's arguments and errors."""
    if tokenizer:
        kind, vocab_size = tokenizer.kind, tokenizer.n_vocab
    if kind == "char":
        raise ValueError(f"tokenizer char does not take dataset={dataset}: use --tokenizer=bpe")
    paths, path = data.text.dataset_files(dataset), Path(dataset).resolve()
    home = f"{path.stem[:40]}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    for folder in data.text.token_folders(data.text.DATA_DIR / home, kind, vocab_size, tokenizer):
        manifest, found = load_shards(paths, folder)
        if found and is_wanted(found, kind, vocab_size, tokenizer):
            break
    else:
        manifest, found = begin_shards(paths, folder, kind, vocab_size, tokenizer)
    if not manifest["complete"]:
        make_shards(paths, folder, manifest, found)
    dtype, names = token_dtype(found), [entry["name"] for entry in manifest["shards"]]
    arrays = [np.asarray(map_file(folder / name, dtype)) for name in names]
    n = sum(map(len, arrays))
    n_train = max(int(0.9 * n), n - VAL_TOKENS)
    sha256 = hashlib.sha256("".join(entry["sha256"] for entry in manifest["files"]).encode())
    return Text(Shards(arrays, 0, n_train), Shards(arrays, n_train, n), found, {
        "source": dataset, "sha256": sha256.hexdigest(), "tokenizer": found.kind,
        "vocab_size": found.n_vocab, "tokenizer_sha256": digest(found), "dtype": dtype,
        "tokens": {"train": n_train, "val": n - n_train}})
