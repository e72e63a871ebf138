"""Files are written whole or not at all, and read in one way."""
import errno
import hashlib
import json
import os
import secrets
import threading
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ONE_THREAD = threading.Lock()
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # they name no file themselves


def is_of_writing(error, path):
    """Whether an error is about writing the file at path, and not about what was to be written."""
    if not isinstance(error, OSError):
        return False
    return error.filename == str(path) or error.filename is None and error.errno in NO_ROOM


@contextmanager
def atomic_open(path, mode="wb", **kwargs):
    """
    Open a file that appears under its name only when it is whole: written aside, synced, renamed.
    Raises OSError that names the file where it cannot be written; an old file is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(aside, mode, **kwargs) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as e:
        error = e if isinstance(e, OSError) else e.__context__  # torch.save hides it in another
        if is_of_writing(error, aside):
            raise OSError(f"{path} cannot be written: {error.strerror}") from e
        raise
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def exclusive(folder):
    """
    Wait until no other thread is in here, and no other process for the same folder where its file
    system has locks. Raises OSError where it cannot be made.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with ONE_THREAD, ExitStack() as stack:
        with suppress(OSError):
            if fcntl:
                lock = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, lock)  # which gives the lock back
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def lock_file(path):
    """
    The file at path, open and locked until it is closed, where its file system has locks; None
    where another program has the lock. Raises OSError where it cannot be opened.
    """
    f = open(path, "w", encoding="utf-8")
    try:
        fcntl and fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        f.close()
        return None
    except OSError:  # no locks there
        pass
    return f


def write_json(path, value):
    """Write a value as JSON, whole or not at all."""
    with atomic_open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1)


def read_utf8(path):
    """
    The text of a file, without byte order marks (also where marked files were joined to one).
    Lines may end in CR LF or CR in the file, and end in LF here. Raises ValueError where it is not
    UTF-8, OSError where it cannot be read or is a folder, pipe or device, which may have no end.
    """
    if not Path(path).is_file():
        what = "not a file with text" if Path(path).exists() else "not there"
        raise OSError(f"{str(path) or 'an empty name'} is {what}: name a text file")
    try:
        return Path(path).read_text(encoding="utf-8").replace("\ufeff", "")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 (byte {e.start}): convert it, "
                         "for example with iconv -f LATIN1 -t UTF-8") from None


def sha256_of(path):
    """The sha256 of a file's bytes, in hex. Raises OSError."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
