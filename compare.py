"""
Compare models: train and ask the rows of an experiment, each with several seeds, and make a table.

    python compare.py experiments/qa1.toml             # what is missing is measured
    python compare.py experiments/qa1.toml --dry_run   # what would be run, and for how long
    python compare.py experiments/qa1.toml --only="LM2,RMT" --seeds=1,2 --jobs=2
    python compare.py --write                          # tables of results/ into README.md and docs/

An experiment is a TOML file: rows, seeds, and what is asked (lib/experiment.py shows one). Its
results go into results/NAME.csv, results/NAME.png and results/NAME_log.csv, run by run; a second
call only prints and draws. Runs lie in --out_dir. What is stopped goes on with the same command.
"""
import math
import os
import signal
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from data.babilong import parse_length
from eval_babilong import EvalConfig
from lib import checkpoint, measured, programs, tables
from lib import experiment as ex
from lib.config import at_least, from_dict, parse, user_errors
from lib.device import pick_device
from lib.experiment_tables import difference_table, experiment_table
from lib.programs import Failed, Programs, locked
from lib.run import check_curriculum
from train import TrainConfig

TRAINED_PER_SECOND = 4_000  # tokens, of the small models of config/ on one core: to guess times by
READ_PER_SECOND = 25_000


@dataclass
class CompareConfig:
    experiments: list = field(default_factory=list)  # TOML files, such as experiments/qa1.toml
    # what to run
    only: str = ""        # rows, as in "LM2,RMT"; what they need is trained as well
    seeds: str = ""       # as in 1,2; all seeds of the experiment if empty
    again: bool = False   # measure anew what was measured with other code or flags
    dry_run: bool = False  # only say what would be run, and for how long
    jobs: int = 0         # runs at a time; 0: one a core, on a GPU one
    # files
    write: bool = False   # put the tables of results/ between their markers in README.md and docs/
    out_dir: str = "out/compare"  # folder of the runs
    results_dir: str = "results"  # folder of the CSV files and plots

    def __post_init__(self):
        at_least(self, 0, "jobs")
        about_runs = self.only or self.seeds or self.again or self.dry_run
        if not self.experiments and (about_runs or not self.write):
            raise ValueError("no experiment is named: python compare.py experiments/qa1.toml")
        for seed in listed(self.seeds):
            if not seed.isdecimal():
                raise ValueError(f"seeds={self.seeds} are not whole numbers: use for example 1,2")


def listed(text):
    """The parts of "LM2, RMT"."""
    return [part.strip() for part in text.split(",") if part.strip()]


# --- Jobs

@dataclass
class Job:
    """A row and a seed: its run is to be trained, asked, and recorded."""
    experiment: ex.Experiment
    row: ex.Row
    seed: int
    keys: list          # what is missing of it, see Experiment.wanted
    folder: Path        # of its run
    run: str            # the code and flags that it had when it was found, see lib/experiment.py
    needs: dict         # {row: folder} of the runs that it builds on
    size: str = ""      # parameters of the row to match, where results know them
    done: float = 0.0   # the share that is done

    @property
    def name(self):
        return self.name_of(self.row.name)

    def name_of(self, row):
        """The name of the job of a row, of the same seed."""
        return f"{self.experiment.name}: {row}, seed {self.seed}"

    @property
    def before(self):
        """Names of the rows whose runs this one still needs, to begin or to answer."""
        if self.trained:
            return []
        begins = not (self.folder / "ckpt.pt").exists()
        names = (begins and not self.size and self.row.match, begins and self.row.init_from,
                 self.row.run_of)
        return [name for name in names if name]

    @property
    def trained(self):
        return ex.is_trained(self.folder)

    @property
    def questions(self):
        """[(length, questions of each task)] that are missing."""
        return list(dict.fromkeys((length, n) for measure, _, length, n in self.keys
                                  if measure == "accuracy"))

    def seconds(self, known):
        """
        Of training and of asking: as long as the row took before, {(experiment, row): seconds}, or
        as its tokens take at the pace of the slowest row that is known, or of small models.
        """
        before = {row.name: known[self.experiment.name, row.name] for row in self.experiment.row
                  if not row.run_of and (self.experiment.name, row.name) in known}
        if self.trained or self.row.run_of:
            training = 0
        elif self.row.name in before:
            training = before[self.row.name]
        else:
            paces = [ex.planned_tokens(self.experiment, self.experiment.named(name)) / seconds
                     for name, seconds in before.items()]
            training = (ex.planned_tokens(self.experiment, self.row)
                        / min(paces, default=TRAINED_PER_SECOND))
        tokens = sum(n * max(parse_length(length), 100) for measure, _, length, n in self.keys
                     if measure == "accuracy")
        return training, tokens / READ_PER_SECOND


def check_train_flags(experiment, row):
    """
    Raises ValueError where train.py of this checkout would refuse the flags of a row, except for
    those whose name or value the text of its change brings.
    """
    brought = " ".join(new for _, _, new in row.change)
    flags = {"init_from": "run"} if row.init_from else {}
    flags |= {name: value for name, value in ex.flags_of(row.flags).items()
              if name not in brought and value not in brought}
    config = from_dict(TrainConfig, ex.load_preset(experiment.preset_of(row)) | flags)
    check_curriculum(config)
    if experiment.cells(row) and config.dataset != "babilong":
        raise ValueError(f"dataset={config.dataset} has nothing to ask: use a file without ask")


def check_flags(experiment):
    """
    Raises ValueError where train.py or eval_babilong.py of this checkout would refuse flags later.
    """
    for row in experiment.row:
        try:
            if not (row.code or row.run_of):
                check_train_flags(experiment, row)
            ex.planned_tokens(experiment, row)
            if experiment.cells(row) and not experiment.answering_row(row).code:
                flags = {"tasks": experiment.tasks} | ex.flags_of(row.ask_flags)
                from_dict(EvalConfig, flags | {"runs": ["run"]})
        except ValueError as e:
            raise ValueError(f"{experiment.name}, row {row.name!r}: {e}") from None


def find_jobs(experiment, config, rows):
    """
    The Jobs of an experiment: what is missing in the rows of its results, and the runs that this
    needs. Raises ValueError where --only or --seeds name nothing.
    """
    only, seeds = listed(config.only), [int(seed) for seed in listed(config.seeds)]
    names = [row.name for row in experiment.row]
    for name in only:
        if name not in names:
            raise ValueError(f"only={name} is no row of {experiment.name}: use {', '.join(names)}")
    known = sorted({seed for row in experiment.row for seed in experiment.seeds_of(row)})
    if set(seeds) - set(known):
        raise ValueError(f"seeds={config.seeds} are not all of {experiment.name}: use "
                         f"{', '.join(map(str, known))}")
    chosen = [(row, seed) for row in experiment.row for seed in experiment.seeds_of(row)
              if (not only or row.name in only) and (not seeds or seed in seeds)]
    keys = {(row.name, seed): measured.missing(experiment, row, seed, rows, config.again)
            for row, seed in chosen}
    sizes = {row["run"]: row["parameters"] for row in rows}
    jobs = []
    for row in reversed(experiment.row):  # a row needs rows above it only
        size = ""
        if row.match and not row.code:  # another checkout's train.py may not take a number
            size = sizes.get(ex.run_id(experiment, experiment.named(row.match)), "")
        run = ex.run_id(experiment, row)
        for seed in sorted({seed for _, seed in keys}, reverse=True):
            folder = ex.folder_of(experiment, row, seed, config.out_dir)
            needs = ex.needs(experiment, row, seed, config.out_dir)
            job = Job(experiment, row, seed, keys.get((row.name, seed), []), folder, run,
                      needs, size)
            needed = any(row.name in other.before and other.seed == seed for other in jobs)
            if job.keys or needed and not job.trained:
                jobs.append(job)
    return sorted(jobs, key=lambda job: (job.seed, names.index(job.row.name)))


# --- Work

class Work:
    """What the threads that work on jobs share."""

    def __init__(self, config, threads, known):
        self.config, self.programs, self.known = config, Programs(threads), known
        self.failed = {}  # name of a job: why

    def do(self, job):
        """Train, ask and record. What fails is noted in `failed`."""
        try:
            training, asking = job.seconds(self.known)
            share = training / max(training + asking, 1e-9)
            if missing := self.missing_runs(job):
                raise Failed(f"it needs {' and '.join(sorted(missing))}, which failed")
            with locked(job.folder) as lock:
                if not job.trained:
                    self.train(job, share, lock)
                job.done = share
                self.record(job, [key for key in job.keys if key[0] != "accuracy"])
                self.ask(job, share, lock)
        except (Failed, OSError, ValueError, LookupError) as e:
            self.failed[job.name] = str(e)
            tqdm.write(f"{job.name} failed, the others go on: {e}", file=sys.stderr)
        finally:
            job.done = 1.0

    def record(self, job, keys):
        """Put what was measured into results. Raises Failed, OSError, ValueError."""
        self.check_unedited(job)
        if keys:
            measured.save(job.experiment, job.row, job.seed, keys, job.folder,
                          self.config.results_dir)

    def check_unedited(self, job):
        """Raises Failed where the code of a job is not that of its run any more."""
        if ex.run_id(job.experiment, job.row) != job.run:
            raise Failed("its code or preset was edited since compare.py began: take the edit "
                         "back, or begin anew, with the same command")

    def code_of(self, job):
        """The folder of the programs for a job. Raises Failed where they were edited."""
        self.check_unedited(job)
        return ex.code_folder(job.experiment.answering_row(job.row), self.config.out_dir)

    def missing_runs(self, job):
        """Names of the jobs whose runs a job needs and that are not there yet, a set."""
        found = set()
        for name in job.before:
            # a run's number of parameters is known as soon as it has begun
            is_size = name not in (job.row.init_from, job.row.run_of)
            begun = is_size and (job.needs[name] / "ckpt.pt").exists()
            if not (begun or ex.is_trained(job.needs[name])):
                found.add(job.name_of(name))
        return found

    def train(self, job, share, lock):
        """Train the run of a job, or go on with it; the time is noted in times.csv."""
        flags = ex.train_flags(job.experiment, job.row, job.seed, job.folder, job.needs, job.size)
        times = job.folder / "times.csv"
        before, start = 0.0, time.monotonic()
        if "--resume" in flags:
            before = (measured.elapsed(job.folder) or [(math.nan, 0)])[-1][0]
        else:
            times.unlink(missing_ok=True)

        def watch():
            step, last = ex.steps(job.folder)
            with open(times, "a", encoding="utf-8") as f:
                f.write(f"{before + time.monotonic() - start:.2f},{step}\n")
            job.done = share * step / max(last, 1)

        output = job.folder.with_name(f"{job.folder.name}.txt")
        self.programs.call(self.code_of(job) / "train.py", flags, output, lock, watch)
        if not job.trained:
            raise Failed(f"its training was stopped: the same command goes on (see {output})")

    def ask(self, job, share, lock):
        """Ask the run of a job what is missing, and record it, length by length."""
        output = job.folder.with_name(f"{job.folder.name}-answers.txt")
        total = sum(n * parse_length(length) for length, n in job.questions)
        for length, n in job.questions:
            flags = ex.ask_flags(job.experiment, job.row, job.folder, length, n)
            program = self.code_of(job) / "eval_babilong.py"
            self.programs.call(program, flags, output, lock)
            self.record(job, [key for key in job.keys if key[2] == length])
            job.done += (1 - share) * n * parse_length(length) / max(total, 1)


def run_jobs(jobs, config, threads, known):
    """Run all jobs, config.jobs at a time, as soon as they can -> {name of a job: why it failed}"""
    work = Work(config, threads, known)
    weights = [sum(job.seconds(known)) for job in jobs]
    layout = "{l_bar}{bar}| {elapsed}, {remaining} left{postfix}"
    with (ThreadPoolExecutor(config.jobs) as pool,
          tqdm(total=sum(weights), bar_format=layout, disable=not jobs) as bar):
        waiting, running = list(jobs), {}  # {future: job}
        try:
            while waiting or running:
                to_come = {job.name for job in [*waiting, *running.values()]}
                for job in list(waiting):
                    busy = {other.folder for other in running.values()}  # rows may share a run
                    if (len(running) < config.jobs and job.folder not in busy
                            and not work.missing_runs(job) & to_come):
                        waiting.remove(job)
                        running[pool.submit(work.do, job)] = job
                finished, _ = wait(running, timeout=programs.POLL, return_when=FIRST_COMPLETED)
                bar.n = sum(job.done * weight for job, weight in zip(jobs, weights))
                bar.set_postfix_str("; ".join(job.name for job in jobs if 0 < job.done < 1))
                for future in finished:
                    running.pop(future)
                    future.result()
        except BaseException:  # the pool would wait for what runs
            work.programs.stop()
            raise
    return work.failed


# --- The program

def say_what_would_be_run(jobs, config, known):
    total = 0
    for job in jobs:
        training, asking = job.seconds(known)
        total += training + asking
        what = [f"train about {training / 60:.0f} min"] if training else []
        if job.questions:
            asked = ", ".join(f"{length} x {n}" for length, n in job.questions)
            what.append(f"ask {asked}, about {asking / 60:.0f} min")
        print(f"{job.name}: {'; '.join(what) or 'read its log'} ({job.folder})")
    at_once = min(config.jobs, max(1, len(jobs)))
    hours, minutes = divmod(round(total / 60 / at_once), 60)
    print(f"{len(jobs)} runs, about {hours} h {minutes} min, {at_once} at a time")


def show(experiment, rows, results_dir):
    """Print the tables of an experiment, and draw its plot."""
    from lib.figure import plot  # here, since matplotlib takes half a second
    if not rows:
        return
    current = {row.name: ex.run_id(experiment, row) for row in experiment.row}
    print(f"\n{experiment.title}\n\n{experiment_table(rows, current)}\n\n"
          f"{difference_table(rows, current)}")
    path = Path(results_dir) / f"{experiment.name}.png"
    log = measured.read_log(results_dir, experiment.name)
    plot(rows, path, experiment.title, log, experiment.curve, current)
    print(f"\n{path.with_suffix('.csv')}, {path}")


@user_errors(OSError)
def main():
    config, _ = parse(CompareConfig, __doc__)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # a shell's background job ignores Ctrl-C
        number = getattr(signal, name, None)
        # nohup has SIGHUP ignored, and so it stays
        if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
            signal.signal(number, signal.default_int_handler)
    results = Path(config.results_dir)
    with user_errors():
        cores = os.cpu_count() or 1
        config.jobs = config.jobs or (cores if pick_device("auto").type == "cpu" else 1)
        experiments = [ex.load(path) for path in config.experiments]
        jobs, known = [], {}
        names = [experiment.name for experiment in experiments]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two experiments have the name {name}, and would share "
                                 f"{results / name}.csv: rename a file")
        for experiment in experiments:
            check_flags(experiment)
            rows = measured.read_results(results / f"{experiment.name}.csv")
            known |= measured.known_seconds(rows)
            jobs += find_jobs(experiment, config, rows)
            if old := measured.outdated(experiment, rows):
                print(f"{experiment.name}: {', '.join(old)} measured with other code or flags: "
                      "--again measures anew")
        if experiments and not config.dry_run:
            checkpoint.make_folder(config.out_dir)
            checkpoint.make_folder(results, flag="results_dir")
    if config.dry_run:
        say_what_would_be_run(jobs, config, known)
        return
    try:
        failed = run_jobs(jobs, config, max(1, cores // config.jobs), known)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    with user_errors():
        for experiment in experiments:
            show(experiment, measured.in_order(experiment, results), results)
        if config.write:
            for path in tables.fill(ex.ROOT):
                print(f"{path}: tables filled in")
    for name, reason in failed.items():
        print(f"error: {name} failed: {reason}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
