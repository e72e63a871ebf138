"""What several tests share."""
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
TEXT = "".join(f"SPEAKER {i % 7}:\nThe {i}th line of a small play, said {'loud' if i % 3 else 'low'}.\n\n" for i in range(150))
SMALL = ["--n_layer=1", "--n_embd=16", "--n_head=2", "--block_size=8", "--mem_slots=4", "--n_segments=2", "--batch_size=2",
         "--eval_iters=1", "--warmup_iters=2", "--device=cpu", "--dtype=float32"]


class Checkout:
    """A copy of the sources, so that no test touches the data and the runs of the person who calls it, and a small text."""

    def __init__(self, folder):
        self.folder = folder
        for source in (*REPO.glob("*.py"), *REPO.glob("data/*.py"), *REPO.glob("config/*.toml"), *REPO.glob("data/*.csv"), *REPO.glob("lib/*.py"), *REPO.glob("baselines/*.py")):
            target = folder / source.relative_to(REPO)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        (folder / "play.txt").write_text(TEXT)

    def start(self, *args):
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen([sys.executable, *args], cwd=self.folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, *args):
        """-> exit code, standard output, standard error"""
        process = self.start(*args)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def train(self, out_dir, *args):
        """A short training run that must succeed -> its output."""
        code, out, err = self.run("train.py", "--dataset=play.txt", f"--out_dir={out_dir}", *SMALL, *args)
        assert code == 0, err
        return out

    def log(self, out_dir):
        return (self.folder / out_dir / "log.csv").read_text()


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    return Checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def call(checkout, monkeypatch, capsys):
    """Call a program's main() in this process, which is faster than a new one -> exit code, standard output, standard error."""
    import bench
    import data.text
    import eval_babilong
    import sample
    import train
    programs = {"train.py": train, "sample.py": sample, "eval_babilong.py": eval_babilong, "bench.py": bench}

    def run(program, *args):
        monkeypatch.chdir(checkout.folder)
        monkeypatch.setattr(sys, "argv", [program, *args])
        monkeypatch.setattr(data.text, "DATA_DIR", checkout.folder / "data")
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            programs[program].main()
            code = 0
        except SystemExit as e:
            code = e.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capsys.readouterr()
        return code, out, err
    return run
