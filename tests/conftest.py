"""What several tests share."""
import functools
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models are faster so; torch reads it once
REPO = Path(__file__).parent.parent
LINES = [f"SPEAKER {i % 7}:\nThe {i}th line of a small play, said {'loud' if i % 3 else 'low'}.\n\n"
         for i in range(150)]
TEXT = "".join(LINES)
SMALL = ["--n_layer=1", "--n_embd=16", "--n_head=2", "--block_size=8", "--mem_slots=4",
         "--n_segments=2", "--batch_size=2", "--eval_iters=1", "--warmup_iters=2", "--device=cpu",
         "--dtype=float32"]
SOURCES = ("*.py", "baselines/*.py", "config/*.toml", "data/*.py", "data/*.csv", "docs/*",
           "lib/*.py", "results/*", "tests/*", "*.md", "*.toml", ".pytest.ini")


def copy_sources(folder):
    """Copy the sources, without git's folder, data and runs."""
    for pattern in SOURCES:
        for source in filter(Path.is_file, REPO.glob(pattern)):
            target = folder / source.relative_to(REPO)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


def is_one_line(code, err, *named):
    """Whether a program refused, with exit code 2 and one line that names something."""
    lines = [line for line in err.splitlines() if line.strip() and "%|" not in line]  # no bar
    return code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and all(
        name in lines[0] for name in named)


def heed_interrupts():
    """A shell starts background programs deaf to Ctrl-C; a test's program is to hear it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def shortened(example):
    """Text.example, which ends a run, with 20 tokens: the texts of all runs would take minutes."""
    def short_example(self, model, device):
        generate = model.generate
        with patch.object(model, "generate", lambda idx, n, **flags: generate(idx, 20, **flags)):
            return example(self, model, device)
    return short_example


class Checkout:
    """
    A copy of the sources, so that no test touches the data and the runs of the person who calls
    it, and a small text.
    """

    def __init__(self, folder):
        self.folder = folder
        copy_sources(folder)
        (folder / "play.txt").write_text(TEXT)

    def start(self, *args, **environment):
        """A program in a process of its own, in a process group of its own."""
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment
        return subprocess.Popen([sys.executable, *args], cwd=self.folder, env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                start_new_session=True, preexec_fn=heed_interrupts)

    def run(self, *args, **environment):
        """A program in a process of its own -> exit code, standard output, standard error"""
        process = self.start(*args, **environment)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def call(self, program, *args):
        """
        Call a program's main() in this process, which is faster than a new one; the text that a
        training run ends with is short -> exit code, standard output, standard error
        """
        module = importlib.import_module(program.removesuffix(".py"))
        text = importlib.import_module("data.text").Text
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        with (chdir(self.folder), patch("sys.argv", [program, *args]),
              patch("data.text.DATA_DIR", self.folder / "data"),
              patch.object(text, "example", shortened(text.example)),
              redirect_stdout(out), redirect_stderr(err)):
            try:
                module.main()
                code = 0
            except SystemExit as e:
                code = e.code
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        for stream in (out, err):
            stream.seek(0)
        return code or 0, out.read(), err.read()

    def train(self, out_dir, *args):
        """A short training run that must succeed -> its output."""
        code, out, err = self.call("train.py", "--dataset=play.txt", f"--out_dir={out_dir}", *SMALL,
                                   *args)
        assert code == 0, err
        return out

    def log(self, out_dir):
        return (self.folder / out_dir / "log.csv").read_text()


@pytest.fixture(scope="session", autouse=True)
def tokenizer_text_is_made_once():
    """What a tokenizer of stories learns from is the same for all runs, and takes a second."""
    curriculum = importlib.import_module("data.curriculum")
    make = curriculum.tokenizer_text
    made = functools.cache(lambda text, lessons: make(text))  # some tests set fewer lessons
    with patch.object(curriculum, "tokenizer_text", lambda text: made(text, curriculum.LESSONS)):
        yield


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A Checkout that the tests of a file share."""
    return Checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def call(checkout):
    """Call a program's main() in the checkout -> exit code, standard output, standard error."""
    return checkout.call
