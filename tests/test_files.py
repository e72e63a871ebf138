"""data/files.py: files are written whole or not at all, and read in one way."""
import errno
import os
import resource
import signal
from contextlib import contextmanager

import pytest
import torch

from data.files import atomic_open, lock_file, read_utf8, sha256_of, write_json


@contextmanager
def full_disk(size):
    """No file may grow beyond size bytes: to a program that is what a full disk looks like."""
    old_limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old_limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limits)
        signal.signal(signal.SIGXFSZ, old_handler)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError):
        with atomic_open(path) as f:
            f.write(b"half of the n")
            f.flush()
            assert path.read_bytes() == b"old"
            raise RuntimeError("killed")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_two_writers_at_once_do_not_mix(tmp_path):
    path = tmp_path / "file"
    with atomic_open(path) as first:
        first.write(b"first, ")
        with atomic_open(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
        first.write(b"to the end")
    assert path.read_bytes() == b"first, to the end" and list(tmp_path.iterdir()) == [path]


def test_on_a_full_disk_the_old_file_stays_and_the_error_names_it(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, "old")
    with full_disk(1000), pytest.raises(OSError, match=r"file\.json cannot be written: [^\n]+$"):
        write_json(path, "new" * 1000)
    assert path.read_text() == '"old"' and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_of_a_checkpoint_too(tmp_path):
    """torch.save raises RuntimeError then, which would end in a traceback."""
    path = tmp_path / "ckpt.pt"
    path.write_bytes(b"old")
    with full_disk(1000), pytest.raises(OSError, match=r"ckpt\.pt cannot be written: [^\n]+$"):
        with atomic_open(path) as f:
            torch.save({"weights": torch.zeros(10_000)}, f)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_replaced_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder cannot be written"):
        write_json(tmp_path / "folder", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_error_of_the_writer_is_passed_on_as_it_is(tmp_path):
    with pytest.raises(TimeoutError, match="^the source is silent$"):
        with atomic_open(tmp_path / "file"):
            raise TimeoutError("the source is silent")


@pytest.mark.parametrize("content, text", [
    (b"\xef\xbb\xbfcaf\xc3\xa9\n", "café\n"),
    (b"\xef\xbb\xbf\xef\xbb\xbfa", "a"),
    (b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n", "one\ntwo\n"),
    (b"one\r\ntwo\rthree\n", "one\ntwo\nthree\n"),
    (b"", ""),
])
def test_text_is_read_without_byte_order_marks_and_with_newlines_of_one_kind(
        tmp_path, content, text):
    (tmp_path / "text").write_bytes(content)
    assert read_utf8(tmp_path / "text") == text


@pytest.mark.parametrize("content, byte", [(b"caf\xe9!", 3), ("Text".encode("utf-16"), 0)])
def test_what_is_no_utf8_is_named_with_the_byte_and_a_remedy(tmp_path, content, byte):
    (tmp_path / "text").write_bytes(content)
    message = rf"text is not UTF-8 \(byte {byte}\): convert it[^\n]*$"
    with pytest.raises(ValueError, match=message):
        read_utf8(tmp_path / "text")


def test_what_is_no_text_file_is_refused_and_not_waited_for(tmp_path):
    def too_late(number, frame):
        raise AssertionError("it waits for somebody to write into a pipe")
    os.mkfifo(tmp_path / "pipe")
    handler = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(5)
    try:
        for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
            with pytest.raises(OSError, match=f"{path} is not a file with text"):
                read_utf8(path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    with pytest.raises(OSError, match="missing is not there"):
        read_utf8(tmp_path / "missing")


def test_a_file_is_locked_once_and_where_there_are_no_locks_not_at_all(tmp_path, monkeypatch):
    first = lock_file(tmp_path / "lock")
    assert lock_file(tmp_path / "lock") is None
    first.close()
    lock_file(tmp_path / "lock").close()

    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    lock_file(tmp_path / "lock").close()


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_of(tmp_path / "file").startswith("ba7816bf8f01cfea414140de5dae2223")
