"""
The programs that compare.py runs beside one another, all stopped together; and the lock of a run,
which its program keeps.
"""
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

from data.files import fcntl, lock_file, read_utf8

POLL = 1.0  # seconds between two looks at the programs that run
# their progress bars go into a file: a line a minute
SLOW_BARS = {"TQDM_MININTERVAL": "60", "TQDM_MAXINTERVAL": "60"}


class Failed(Exception):
    """A program ended with an error, which the message repeats."""


class Programs:
    """The programs that run now: they are stopped together."""

    def __init__(self, threads):
        self.threads, self.running, self.stopped = threads, set(), False

    def stop(self):
        self.stopped = True
        for process in list(self.running):
            process.send_signal(signal.SIGINT)

    def call(self, program, flags, output, lock, watch=lambda: None):
        """
        Run a Python program. Its command and what it says go into the file output; watch() is
        called every POLL seconds. The program keeps the lock of its run, should this one be killed.
        Raises Failed, KeyboardInterrupt where it was stopped.
        """
        if self.stopped:
            raise KeyboardInterrupt
        env = {"OMP_NUM_THREADS": str(self.threads)} | os.environ | SLOW_BARS
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(output, "w", encoding="utf-8") as f:
            print(shlex.join([str(program), *flags]), file=f, flush=True)
            process = subprocess.Popen([sys.executable, str(program), *flags], env=env, stdout=f,
                                       stderr=f, start_new_session=True,
                                       pass_fds=[lock.fileno()] if fcntl else [])
        self.running.add(process)
        if self.stopped:  # just now: `stop` did not see it
            process.send_signal(signal.SIGINT)
        try:
            while process.poll() is None:
                time.sleep(POLL)
                watch()
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait()
            self.running.discard(process)
        watch()
        if self.stopped:
            raise KeyboardInterrupt
        if process.returncode:
            *_, last = read_utf8(output).strip().splitlines()[1:] or ["it said nothing"]
            reason = f"signal {-process.returncode}: " if process.returncode < 0 else ""
            raise Failed(f"{reason}{last} (all of it: {output})")


@contextmanager
def locked(folder):
    """
    A run is for one compare.py at a time -> its lock, an open file, until the block ends. Raises
    Failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    f = lock_file(folder / "lock")
    if f is None:
        raise Failed(f"another compare.py works on {folder}: wait for it")
    with f:
        try:
            yield f
        finally:
            # to close f is not enough: a process that is just being started may hold a copy
            with suppress(OSError):
                fcntl and fcntl.flock(f, fcntl.LOCK_UN)
