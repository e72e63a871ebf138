"""Files that appear whole or not at all."""
import json
import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_open(path, mode="wb", **kwargs):
    """Open a file that appears under its name only when it is whole: written aside, synced, renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, mode, **kwargs) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path, value):
    """Write a value as JSON, whole or not at all."""
    with atomic_open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1)
