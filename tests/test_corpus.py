"""Corpora larger than memory: the ids are those of the documents, whatever happens on the way."""
import gzip
import hashlib
import json
import os
import signal
import time
import tracemalloc
from concurrent.futures import Future
from multiprocessing import active_children, get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
from conftest import LINES, SMALL, is_one_line
from test_files import full_disk
from test_tokenizer import GPT2_PATTERN, stand_in_for_gpt2

from data import corpus, text
from data.corpus import end_token, in_pieces, open_corpus
from data.files import sha256_of
from data.text import Shards, get_batch, is_corpus
from data.tokenizer import HFTokenizer, make_tokenizer
from lib.run import open_data

TINY = Path(__file__).parent / "tiny_llama/grouped"
DOCUMENTS = ["".join(LINES[start:start + 3]).strip() for start in range(0, 150, 3)]
ODD = ["naïve café", "日本語と한국어 🙂", "<|endoftext|>", "a\r\nb", "  \n", "x" * 900]


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """Small pieces, batches and shards, so that small corpora have many of them."""
    monkeypatch.setattr(text, "DATA_DIR", tmp_path / "data")
    for name, value in {"PIECE": 200, "BATCH": 500, "SHARD": 1000}.items():
        monkeypatch.setattr(corpus, name, value)


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in documents))


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=7)


def write_gz(path, content):
    path.write_bytes(gzip.compress(content.encode()))


@pytest.fixture
def mixed(tmp_path):
    """A folder with all kinds of files -> the folder, its documents in their order"""
    folder = tmp_path / "mixed"
    folder.mkdir()
    parts = [DOCUMENTS[:20], DOCUMENTS[20:30], [*DOCUMENTS[30:], *ODD]]
    write_parquet(folder / "b.parquet", n=range(10), text=parts[1])
    write_jsonl(folder / "a.jsonl", parts[0])
    write_jsonl(folder / "c.jsonl", parts[2])
    write_gz(folder / "d.txt.gz", "".join(LINES))
    (folder / "e.txt").write_bytes(b"\xef\xbb\xbf" + "".join(LINES).replace("\n", "\r\n").encode())
    (folder / "f.txt").touch()
    (folder / "g.md").write_text("not this")
    return folder, [*parts[0], *parts[1], *parts[2], "".join(LINES), "".join(LINES)]


@pytest.fixture
def jsonl(tmp_path):
    write_jsonl(tmp_path / "plays.jsonl", DOCUMENTS)
    return tmp_path / "plays.jsonl"


@pytest.fixture
def batches(monkeypatch):
    """What was read to be tokenized: the places behind the batches."""
    places, encoded = [], corpus.encoded

    def spy(found, tokenizer):
        def watched():
            for batch, place in found:
                places.append(place)
                yield batch, place
        return encoded(watched(), tokenizer)
    monkeypatch.setattr(corpus, "encoded", spy)
    return places


def ids_of(found):
    """All token ids of a Text."""
    return np.concatenate([found.train[:], found.val[:]]).tolist()


def the_folder(tmp_path):
    folder, = (tmp_path / "data").glob("*/*")
    return folder


def shards_of(folder):
    return [path.read_bytes() for path in sorted(folder.glob("*.bin"))]


# --- Token ids

def hf_tokenizer(**special):
    """The tiny one of the tests, with other special tokens."""
    description = json.loads((TINY / "tokenizer.json").read_text())
    for token in description["added_tokens"]:
        token["special"] = special.get(token["content"], False)
    return HFTokenizer(description, 300)


def tokenizer_of(kind, monkeypatch):
    if kind == "hf":
        return hf_tokenizer(**{"<|endoftext|>": True})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: stand_in_for_gpt2())
    return make_tokenizer(kind, "".join(LINES), 300)


@pytest.mark.parametrize("kind", ["bpe", "gpt2", "hf"])
def test_ids_are_those_of_the_documents_encoded_whole(mixed, monkeypatch, kind):
    folder, documents = mixed
    tokenizer = tokenizer_of(kind, monkeypatch)
    found = open_corpus(str(folder), tokenizer=tokenizer)
    end, expected = end_token(tokenizer), []
    for document in documents:
        expected += tokenizer.encode(document + "\n" if kind == "bpe" else document)
        expected += [] if kind == "bpe" else [end]
    assert ids_of(found) == expected
    assert len(found.train.arrays) > 3 and found.meta["dtype"] == "uint16"


def test_wide_ids_are_kept_wide(jsonl):
    tokenizer = HFTokenizer(json.loads((TINY / "tokenizer.json").read_text()), 1 << 17)
    found = open_corpus(str(jsonl), tokenizer=tokenizer)
    assert found.train[:5].dtype == "uint32" and found.meta["vocab_size"] == 1 << 17
    assert tokenizer.decode(found.train[:50].tolist()).startswith(DOCUMENTS[0][:30])


def test_the_token_that_ends_a_document_is_the_tokenizers_own(monkeypatch):
    assert end_token(make_tokenizer("char", "abc", 0)) is None
    assert end_token(tokenizer_of("bpe", monkeypatch)) is None
    assert end_token(tokenizer_of("gpt2", monkeypatch)) == 256
    assert end_token(hf_tokenizer()) is None, "it is an ordinary token there"
    description = hf_tokenizer().description
    for name in ("<|endoftext|>", "</s>", "<|end_of_text|>"):
        tokens = [{"id": 7, "content": name, "special": True},
                  {"id": 3, "content": "<|im_start|>", "special": True}]
        assert end_token(SimpleNamespace(kind="hf", description=description | {
            "added_tokens": tokens})) == 7


@pytest.mark.parametrize("content", [
    "".join(LINES), "\n\n".join(LINES), "word " * 500, "東京 は\n" * 300, "y" * 2000, "\n" * 900,
    " \n\n \t" * 300], ids=["lines", "paragraphs", "words", "wide", "one word", "empty", "blank"])
def test_a_document_is_cut_where_no_token_is(content):
    pieces = list(in_pieces([content[:333], content[333:]]))
    assert "".join(piece for piece, _ in pieces) == content
    assert max(len(piece) for piece, _ in pieces) <= corpus.PIECE
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    if "\n\n \t" not in content and "yyy" not in content and content.strip():
        ranks = {bytes([i]): i for i in range(256)} | {b"\n\n": 256}
        gpt2 = tiktoken.Encoding("", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
        for tokenizer in (make_tokenizer("bpe", content, 260), hf_tokenizer(), gpt2):
            ids = [i for piece, _ in pieces for i in tokenizer.encode(piece)]
            assert ids == tokenizer.encode(content)


def test_bpe_is_trained_on_the_beginning_alone(jsonl, monkeypatch):
    seen, make = [], corpus.make_tokenizer
    monkeypatch.setattr(corpus, "BPE_CHARS", 2000)
    monkeypatch.setattr(corpus, "make_tokenizer",
                        lambda kind, text, n: seen.append(text) or make(kind, text, n))
    open_corpus(str(jsonl), "bpe", 300)
    assert 0.9 * 2000 <= len(seen[0]) < 3000 and "\n".join(DOCUMENTS).startswith(seen[0])
    monkeypatch.setattr(corpus, "BPE_CHARS", 10 ** 6)
    write_jsonl(jsonl, [*DOCUMENTS, "the end"])
    open_corpus(str(jsonl), "bpe", 300)
    whole = "\n".join([*DOCUMENTS, "the end", ""])
    assert seen[1] == whole[:int(0.9 * len(whole))], "not on what is for validation"


# --- Windows

def test_shards_are_one_array_across_their_borders():
    whole = np.arange(50, dtype=np.uint16)
    found = Shards([whole[:7], whole[7:8], whole[8:30], whole[30:]], 3, 45)
    assert len(found) == 42
    for start in (None, *range(-50, 50, 3)):
        for stop in (None, *range(-50, 50, 2)):
            piece = found[start:stop]
            assert type(piece) is np.ndarray and piece.dtype == np.uint16
            assert np.array_equal(piece, whole[3:45][start:stop])


def test_training_draws_windows_across_shards(jsonl):
    found = open_corpus(str(jsonl), "bpe", 300)
    ids = np.array(ids_of(found))
    x, y = get_batch(found.train, 600, 8, seed=1, step=1)  # a shard has 500
    expected = get_batch(ids[:len(found.train)], 600, 8, seed=1, step=1)
    assert x.tolist() == expected[0].tolist() and y.tolist() == expected[1].tolist()


def test_validation_is_the_end_and_bounded(jsonl, monkeypatch):
    found = open_corpus(str(jsonl), "bpe", 300)
    n = len(found.train) + len(found.val)
    assert len(found.train) == int(0.9 * n)
    assert found.meta["tokens"] == {"train": len(found.train), "val": len(found.val)}
    monkeypatch.setattr(corpus, "VAL_TOKENS", 50)
    again = open_corpus(str(jsonl), "bpe", 300)
    assert len(again.val) == 50 and ids_of(again) == ids_of(found)


# --- Memory

def test_what_waits_to_be_tokenized_is_bounded(mixed, monkeypatch):
    waiting, most = [0], []

    class Promise(Future):
        def result(self):
            waiting[0] -= 1
            return super().result()

    class Pool:
        def __init__(self, n, context, initializer, args):
            most.append(n)
            initializer(*args)

        def submit(self, function, batch):
            assert sum(len(text) for text, _ in batch) <= corpus.BATCH + corpus.PIECE
            waiting[0] += 1
            most.append(waiting[0])
            promise = Promise()
            promise.set_result(function(batch))
            return promise

        def shutdown(self, cancel_futures):
            pass
    monkeypatch.setattr(corpus, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(corpus, "start_worker", lambda tokenizer: setattr(
        corpus, "encoder", corpus.from_json(tokenizer)))
    monkeypatch.setattr(corpus, "encoder", None, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 20)
    open_corpus(str(mixed[0]), "bpe", 300)
    assert most[0] == 8 and max(most[1:]) == 8 * corpus.PENDING and waiting == [0]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.parquet"])
def test_reading_takes_little_memory(tmp_path, monkeypatch, name):
    monkeypatch.undo()
    line = "All work and no play makes Jack a dull boy.\n"
    path, documents = tmp_path / name, [f"{i:07}{line * 50}" for i in range(10_000)]  # 22 MB
    if name == "a.jsonl":
        write_jsonl(path, documents)
    elif name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path, compression="none",
                                    use_dictionary=False)
    else:
        (write_gz if name.endswith("gz") else Path.write_text)(path, "".join(documents))
    n_chars = sum(map(len, documents))
    del documents
    tracemalloc.start()
    for batch, _ in corpus.read_batches([path], [corpus.entry_of(path)]):
        n_chars -= sum(len(text) for text, _ in batch)
        assert pyarrow.total_allocated_bytes() < 8e6
    assert n_chars == 0 and tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()


# --- Kept, and made again

def test_a_corpus_is_tokenized_once_and_described(mixed, tmp_path, batches):
    folder, _ = mixed
    first = open_corpus(str(folder), "bpe", 300)
    n = len(batches)
    again = open_corpus(str(folder), "bpe", 300)
    assert n == len(batches) > 5 and again.meta == first.meta and ids_of(again) == ids_of(first)
    manifest = json.loads((the_folder(tmp_path) / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["files"]] == [
        "a.jsonl", "b.parquet", "c.jsonl", "d.txt.gz", "e.txt", "f.txt"]
    for entry in manifest["files"]:
        path = folder / entry["name"]
        assert (entry["size"], entry["sha256"]) == (path.stat().st_size, sha256_of(path))
    for entry in manifest["shards"]:
        path = the_folder(tmp_path) / entry["name"]
        assert (entry["size"], entry["sha256"]) == (path.stat().st_size, sha256_of(path))
        assert entry["tokens"] == entry["size"] / 2
    sizes = [entry["size"] for entry in manifest["files"]]
    assert manifest["shards"][-1]["behind"]["bytes"] == sum(sizes)
    assert first.meta["source"] == str(folder) and first.meta["tokenizer"] == "bpe"


def test_an_empty_parquet_is_hashed_too(tmp_path, jsonl):
    folder = tmp_path / "empty"
    folder.mkdir()
    jsonl.rename(folder / "a.jsonl")
    write_parquet(folder / "b.parquet", text=pyarrow.array([], "string"))
    open_corpus(str(folder), "bpe", 300)
    manifest = json.loads((the_folder(tmp_path) / "manifest.json").read_text())
    assert manifest["files"][1]["sha256"] == sha256_of(folder / "b.parquet")


def kill():
    """End this process as kill -9 does. The numbers of its workers are in a file then."""
    workers = [str(child.pid) for child in active_children()]
    (text.DATA_DIR / "workers").write_text(" ".join(workers))
    os.kill(os.getpid(), signal.SIGKILL)


def open_and_die(dataset, tokenizer, moment):
    write_json, encoded = corpus.write_json, corpus.encoded

    def deadly_write(path, value):
        if moment in (value.get("complete") and "complete", len(value.get("shards", ()))):
            kill()
        write_json(path, value)

    def deadly_stream(*args):
        for n, found in enumerate(encoded(*args)):
            if moment == f"batch {n}":
                kill()
            yield found
    corpus.write_json, corpus.encoded = deadly_write, deadly_stream
    open_corpus(dataset, tokenizer=tokenizer)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("moment, n_done", [(1, 0), (4, 3), ("batch 8", 2), ("complete", 14)])
def test_killed_at_any_moment_it_goes_on_behind_the_last_shard(mixed, tmp_path, batches, moment,
                                                               n_done):
    folder, tokenizer = str(mixed[0]), make_tokenizer("bpe", "".join(LINES), 300)
    process = get_context("fork").Process(target=open_and_die, args=(folder, tokenizer, moment))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    kept = the_folder(tmp_path)
    manifest = kept / "manifest.json"
    done = json.loads(manifest.read_text())["shards"] if n_done else []
    assert len(done) == n_done
    workers = (tmp_path / "data/workers").read_text().split()
    deadline = time.monotonic() + 10
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, workers)), "its workers end, too"
    assert bool(workers) == (moment != "complete")

    resumed, left = open_corpus(folder, tokenizer=tokenizer), [*batches]
    shards = shards_of(kept)
    manifest.unlink()
    batches.clear()
    whole = open_corpus(folder, tokenizer=tokenizer)
    assert shards_of(kept) == shards and resumed.meta == whole.meta
    start = batches.index(done[-1]["behind"]) + 1 if done else 0
    assert left == batches[start:], "what was finished is not done again"


def touch(path):
    """Another time, the same content."""
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def test_files_are_the_same_whatever_their_time(mixed, tmp_path, batches, monkeypatch, capsys):
    folder, _ = mixed
    first, n = open_corpus(str(folder), "bpe", 300), len(batches)
    for path in (*folder.iterdir(), *the_folder(tmp_path).glob("*.bin")):
        touch(path)
    assert open_corpus(str(folder), "bpe", 300).meta == first.meta
    monkeypatch.setattr(corpus, "sha256_of", None)  # the new times are known, nothing is hashed
    assert open_corpus(str(folder), "bpe", 300).meta == first.meta
    assert len(batches) == n and not capsys.readouterr().out


def rewrite(path, content):
    """Other content of the same length."""
    assert len(content) == path.stat().st_size
    path.write_bytes(content)


CHANGES = {
    "rewritten": lambda f: rewrite(f / "e.txt", (f / "e.txt").read_bytes().replace(b"y", b"z")),
    "shorter": lambda f: write_jsonl(f / "c.jsonl", DOCUMENTS[:3]),
    "renamed": lambda f: (f / "e.txt").rename(f / "e2.txt"),
    "in another order": lambda f: (f / "e.txt").rename(f / "0.txt"),
    "one less": lambda f: (f / "b.parquet").unlink(),
    "one more": lambda f: (f / "z.txt").write_text("And then?\n"),
    "one of another kind": lambda f: write_gz(f / "e2.txt.gz", "And then?\n")}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_corpus_that_changed_is_made_anew_with_one_line(mixed, tmp_path, capsys, change):
    folder, kept = mixed[0], tmp_path / "data"
    open_corpus(str(folder), "bpe", 300)
    change(folder)
    found = open_corpus(str(folder), "bpe", 300)
    assert capsys.readouterr().out == f"{folder} has changed: its token ids are made anew\n"
    files = [path for path in sorted(folder.iterdir()) if path.suffix != ".md"]
    sha256 = hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()
    assert found.meta["sha256"] == sha256
    shards = shards_of(the_folder(tmp_path))
    assert b"".join(shards) == np.array(ids_of(found), "uint16").tobytes(), "no old shard stays"
    kept.rename(tmp_path / "old")
    fresh = open_corpus(str(folder), "bpe", 300)
    assert fresh.meta == found.meta and shards_of(the_folder(tmp_path)) == shards


DAMAGES = {
    "last shard cut short": (-1, lambda shard: shard.write_bytes(shard.read_bytes()[:-2])),
    "shard changed": (3, lambda shard: rewrite(shard, b"\0\1" + shard.read_bytes()[2:])),
    "first shard missing": (0, Path.unlink)}


@pytest.mark.parametrize("number, damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_shards_are_made_anew_from_there_on(mixed, tmp_path, batches, number, damage):
    first, n = open_corpus(str(mixed[0]), "bpe", 300), len(batches)
    kept = the_folder(tmp_path)
    shards = shards_of(kept)
    damage(sorted(kept.glob("*.bin"))[number])
    assert open_corpus(str(mixed[0]), "bpe", 300).meta == first.meta
    assert shards_of(kept) == shards
    assert len(batches) - n == n if number == 0 else 0 < len(batches) - n < n


def edit_json(path, change):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize("damage", [
    lambda f: (f / "manifest.json").unlink(), lambda f: (f / "manifest.json").write_text('{"ver'),
    lambda f: (f / "manifest.json").write_text("[]"),
    lambda f: edit_json(f / "manifest.json", {"version": 0}),
    lambda f: edit_json(f / "manifest.json", {"shards": 5}),
    lambda f: edit_json(f / "tokenizer.json", {"pattern": r"\\w+|\\W+"}),
    lambda f: (f / "tokenizer.json").write_text("{}")])
def test_shards_without_their_manifest_or_tokenizer_are_made_anew(jsonl, tmp_path, batches, damage):
    first, n = open_corpus(str(jsonl), "bpe", 300), len(batches)
    damage(the_folder(tmp_path))
    again = open_corpus(str(jsonl), "bpe", 300)
    assert again.meta == first.meta and ids_of(again) == ids_of(first) and len(batches) == 2 * n


def test_tokenizers_have_folders_of_their_own(jsonl, tmp_path, batches):
    found = [open_corpus(str(jsonl), "bpe", n_vocab) for n_vocab in (300, 310)]
    own = make_tokenizer("bpe", "".join(LINES)[::-1], 300)
    n = len(batches)
    for _ in range(2):
        again = open_corpus(str(jsonl), "char", tokenizer=own)
        assert again.tokenizer.to_json() == own.to_json()
        assert own.decode(ids_of(again)) == "\n".join([*DOCUMENTS, ""])
        for first in found:  # a run goes on with what it had
            assert open_corpus(str(jsonl), tokenizer=first.tokenizer).meta == first.meta
    assert len(batches) == n + n // 2 and len([*(tmp_path / "data").glob("*/*")]) == 3


def test_a_jsonl_may_be_compressed(jsonl, tmp_path):
    plain = open_corpus(str(jsonl), "bpe", 300)
    write_gz(tmp_path / "plays.jsonl.gz", jsonl.read_text())
    assert ids_of(open_corpus(str(tmp_path / "plays.jsonl.gz"), "bpe", 300)) == ids_of(plain)


def test_a_folder_may_have_a_name_that_is_not_utf8(tmp_path):
    folder = os.fsdecode(bytes(tmp_path) + b"/caf\xe9")
    os.mkdir(folder)
    write_jsonl(Path(folder, "a.jsonl"), DOCUMENTS)
    assert len(open_corpus(folder, "bpe", 257).train)


def test_two_corpora_of_one_name_are_not_mixed_up(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "x.jsonl", [name * 10] * 100)
    for name in ("a", "b", "a"):
        found = open_corpus(str(tmp_path / name / "x.jsonl"), "bpe", 257)
        assert found.tokenizer.decode(found.train[:12].tolist()).startswith(name)
    assert not capsys.readouterr().out, "nothing is made anew"


def open_and_describe(dataset, tokenizer, queue):
    found = open_corpus(dataset, tokenizer=tokenizer)
    queue.put((found.meta, ids_of(found)))


def test_processes_that_make_shards_at_once_all_get_the_right_ones(mixed, tmp_path):
    context, tokenizer = get_context("fork"), make_tokenizer("bpe", "".join(LINES), 300)
    queue = context.Queue()
    processes = [context.Process(target=open_and_describe, args=(str(mixed[0]), tokenizer, queue))
                 for _ in range(4)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    again = open_corpus(str(mixed[0]), tokenizer=tokenizer)
    assert all(ids == ids_of(again) and meta == again.meta for meta, ids in found)
    assert not [*the_folder(tmp_path).glob(".*")]


# --- Refusals

def refused(dataset, **kwargs):
    """The one line with which a corpus is refused."""
    with pytest.raises((ValueError, OSError)) as e:
        open_corpus(str(dataset), **({"kind": "bpe", "vocab_size": 300} | kwargs))
    assert "\n" not in str(e.value)
    return str(e.value)


GOOD = json.dumps({"text": DOCUMENTS[0]}).encode() + b"\n"


@pytest.mark.parametrize("line", [
    b"no json", b'{"text": "cut', b'["text"]', b'"text"', b"7", b"null", b'{"content": "a"}',
    b'{"text": null}', b'{"text": 5}', b'{"text": ["a"]}', b'{"text": "caf\xe9"}',
    b'{"text": "\\ud83d"}', b"[" * 100_000, b'{"text": "' + b"a" * 2000 + b'"}'],
    ids=lambda line: line[:20])
def test_a_line_of_jsonl_that_is_no_document_is_named(tmp_path, monkeypatch, line):
    monkeypatch.setattr(corpus, "LONGEST_LINE", 1500)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD + line + b"\n" + GOOD)
    message = refused(path)
    assert f"{path} cannot be read (line 4 is not a JSON object with a string `text`" in message
    assert message.endswith(": mend it, or leave it out")
    assert not (tmp_path / "data").exists()
    path.write_bytes(path.read_bytes().replace(line + b"\n", b" \r\n"))  # an empty one is none
    assert len(ids_of(open_corpus(str(path), "bpe", 260))) > 100


def test_a_parquet_that_has_no_text_or_is_damaged_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, words=DOCUMENTS)
    assert f"{path} cannot be read (it has no column text, only ['words'])" in refused(path)
    write_parquet(path, text=[*DOCUMENTS[:9], None])
    assert f"{path} cannot be read (row 10 has no string" in refused(path)
    write_parquet(path, text=[b"bytes"])
    assert f"{path} cannot be read (row 1 has no string" in refused(path)
    write_parquet(path, text=DOCUMENTS)
    content = path.read_bytes()
    for damaged in (content[:-100], content[100:], b"", content[:300] + content[500:],
                    b"PAR1" + bytes(500) + content[504:]):
        path.write_bytes(damaged)
        assert f"{path} cannot be read (" in refused(path)


@pytest.mark.parametrize("change", [
    lambda gz: gz[:-20], lambda gz: gz[:100] + bytes(50) + gz[150:], lambda gz: b"text" + gz,
    lambda gz: gz + b"text"], ids=["early end", "damage", "no gz", "rubbish behind"])
def test_a_gz_that_ends_early_or_is_damaged_is_named(tmp_path, change):
    path = tmp_path / "a.txt.gz"
    write_gz(path, "".join(str(i ** 3) for i in range(3000)))
    path.write_bytes(change(path.read_bytes()))
    assert f"{path} cannot be read (" in refused(path)


@pytest.mark.parametrize("start", [b"", b"caf\xc3\xa9 " * 300], ids=["begin", "later"])
@pytest.mark.parametrize("bad", [b"caf\xe9 au lait", b"caf\xc3"], ids=["inside", "end"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text_that_is_not_utf8_is_named(tmp_path, monkeypatch, name, start, bad):
    path = tmp_path / name
    path.write_bytes(gzip.compress(start + bad) if name.endswith("gz") else start + bad)
    assert f"{path} cannot be read (byte {len(start) + 3} is not UTF-8)" in refused(path)


def test_a_corpus_without_documents_is_refused(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    for name in ("a.txt", "b.jsonl"):
        (folder / name).touch()
    write_gz(folder / "c.txt.gz", "")
    write_jsonl(folder / "d.jsonl", ["", ""])
    write_parquet(folder / "e.parquet", text=[""])
    assert f"dataset={folder} has no document with text" in refused(folder)
    file = folder / "d.jsonl"
    assert f"dataset={file} has no document with text" in refused(file)
    assert not (tmp_path / "data").exists()


def test_tokenizer_char_is_refused(jsonl, tmp_path):
    assert "use --tokenizer=bpe" in refused(jsonl, kind="char")
    assert "use --tokenizer=bpe" in refused(jsonl, tokenizer=make_tokenizer("char", "abc", 0))
    assert "tokenizer=word is not known" in refused(jsonl, kind="word")
    assert "use at most" in refused(jsonl, vocab_size=10 ** 6)
    assert not (tmp_path / "data").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_named(jsonl):
    jsonl.chmod(0)
    assert "plays.jsonl" in refused(jsonl)


def test_a_file_that_changes_while_it_is_read_is_refused(jsonl, monkeypatch):
    documents = corpus.documents

    def growing(f):
        yield from documents(f)
        jsonl.write_bytes(jsonl.read_bytes() + GOOD)
    monkeypatch.setattr(corpus, "documents", growing)
    assert f"{jsonl} was changed while it was read: start again" in refused(jsonl)


def test_on_a_full_disk_one_line_names_the_file_and_finished_shards_stay(mixed, tmp_path, batches,
                                                                         monkeypatch):
    monkeypatch.setattr(corpus, "SHARD", 6000)
    folder, tokenizer = mixed[0], make_tokenizer("bpe", "".join(LINES), 300)
    found = open_corpus(str(folder), tokenizer=tokenizer)
    kept, n = the_folder(tmp_path), len(batches)
    shards = shards_of(kept)
    for path in kept.glob("0000[1-9].bin"):
        path.unlink()
    with full_disk(5000):
        assert f"{kept}/00001.bin cannot be written: " in refused(folder, tokenizer=tokenizer)
    assert {path.name for path in kept.iterdir()} == {
        "00000.bin", "manifest.json", "tokenizer.json"}
    batches.clear()
    assert open_corpus(str(folder), tokenizer=tokenizer).meta == found.meta
    assert shards_of(kept) == shards and len(batches) < n


def killed_worker(batch):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_told_in_one_line(jsonl, monkeypatch):
    monkeypatch.setattr(corpus, "encode_batch", killed_worker)
    assert "a process that tokenizes was killed" in refused(jsonl)


# --- Which way a dataset goes

def test_small_plain_text_is_no_corpus(tmp_path, monkeypatch):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("".join(LINES))
    (folder / "b.txt").write_text("".join(LINES))
    (folder / "c.md").write_text("not this")
    assert not is_corpus(str(folder)) and not is_corpus(str(folder / "a.txt"))
    config = SimpleNamespace(dataset=str(folder), tokenizer="char", vocab_size=0, n_segments=2,
                             block_size=8)
    assert isinstance(open_data(config).train, np.memmap)
    monkeypatch.setattr(text, "LARGEST_TEXT", (folder / "a.txt").stat().st_size)
    assert is_corpus(str(folder)) and not is_corpus(str(folder / "a.txt"))
    config.tokenizer, config.vocab_size = "bpe", 300
    found = open_data(config)
    assert isinstance(found.train, Shards)
    assert found.tokenizer.decode(ids_of(found)) == "".join([*LINES, "\n"] * 2)


@pytest.mark.parametrize("name, expected", [
    ("x.jsonl", True), ("x.parquet", True), ("x.txt.gz", True), ("x.jsonl.gz", True),
    ("x.txt", False), ("x.md", False),
    ("x.gz", False), ("x.json", False)])
def test_a_file_is_a_corpus_by_its_name(tmp_path, monkeypatch, name, expected):
    (tmp_path / "a.txt").touch()
    (tmp_path / name).touch()
    assert is_corpus(str(tmp_path)) == is_corpus(str(tmp_path / name)) == expected
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shakespeare").mkdir()
    (tmp_path / "shakespeare/a.jsonl").touch()
    assert not is_corpus("") and not is_corpus("shakespeare") and is_corpus("./shakespeare")
    assert not is_corpus("missing.jsonl")


# --- Training

def test_train_runs_on_a_corpus_and_resumes(checkout, mixed, monkeypatch):
    monkeypatch.setattr(text.Text, "example", lambda *args: "")  # which takes longer than all else
    args = ["--dataset=" + str(mixed[0]), "--tokenizer=bpe", "--vocab_size=300", *SMALL]
    for out_dir, steps in (("out/whole", (4,)), ("out/parts", (2, 4))):
        for n, max_iters in enumerate(steps):
            given = ["--resume"] if n else ["--overwrite", *args]
            code, out, err = checkout.call("train.py", *given, f"--out_dir={out_dir}",
                                           f"--max_iters={max_iters}", "--lr_decay_iters=4")
            assert code == 0, err
    assert "bpe vocabulary of 300" in out
    losses = [line.split(",")[2] for name in ("whole", "parts")
              for line in checkout.log(f"out/{name}").splitlines()[1:5]]
    assert losses[:4] == losses[4:], "as if it had never stopped"
    (mixed[0] / "a.jsonl").write_bytes(GOOD)
    code, out, err = checkout.call("train.py", "--resume", "--out_dir=out/parts", "--max_iters=6")
    assert is_one_line(code, err, "is not the one this run was trained on")


def test_train_refuses_a_corpus_in_one_line(checkout, jsonl):
    flags = [f"--dataset={jsonl}", "--out_dir=out/refused", *SMALL]
    code, out, err = checkout.call("train.py", *flags)
    assert is_one_line(code, err, "plays.jsonl", "use --tokenizer=bpe")
    jsonl.write_bytes(GOOD + b"no json\n")
    code, out, err = checkout.call("train.py", *flags, "--tokenizer=bpe", "--vocab_size=300")
    assert is_one_line(code, err, "plays.jsonl", "line 2", "mend it")
