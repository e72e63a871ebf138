"""
What compare.py measured, as results/NAME.csv and results/NAME_log.csv keep it: a row for each
figure, with what gave it.
"""
import csv
import io
import json
import math
import shlex
from collections import defaultdict
from pathlib import Path
from statistics import mean

from data.babilong import parse_length, parse_tasks
from data.files import atomic_open, exclusive, read_utf8
from lib import experiment as ex
from lib.device import pick_device
from lib.origin import hardware, origin

COLUMNS = ("experiment", "row", "seed", "measure", "task", "length", "n", "right", "answers",
           "value", "parameters", "minutes", "tokens_per_s", "run", "commit", "command", "device",
           "dtype", "torch")


# --- The files

def read_results(path, columns=COLUMNS):
    """
    The rows of a CSV file, dicts of text; [] where there is none. columns: those it must have,
    None: those of a log, at least row, seed and step. Raises ValueError.
    """
    if not Path(path).exists():
        return []
    csv.field_size_limit(1 << 30)  # a cell has the answers to any number of questions
    reader = csv.DictReader(io.StringIO(read_utf8(path), newline=""))
    try:
        rows = list(reader)
        there = tuple(reader.fieldnames or ())
        fits = there == columns if columns else {"row", "seed", "step"} <= set(there)
        if not fits:
            raise ValueError("other columns than this program writes")
        for row in rows:
            if None in row or None in row.values():
                raise ValueError("a row of another length")
            int(row["seed"]), int(row.get("n") or 0)
            for name in ("minutes", "parameters", "value"):
                if not 0 <= float(row.get(name) or 0) < math.inf:
                    raise ValueError(f"{name}={row[name]}")
            parse_length(row["length"]) if columns and row["length"] else None
    except (ValueError, KeyError, csv.Error) as e:
        raise ValueError(f"{path} is damaged or foreign ({e}): mend it, or move it away") from None
    return rows


def read_log(results_dir, name):
    """The evaluations of an experiment's runs, dicts of text. Raises ValueError."""
    return read_results(Path(results_dir) / f"{name}_log.csv", None)


def write_results(path, rows, columns=COLUMNS):
    """Raises OSError; the file is then as it was."""
    with atomic_open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def missing(experiment, row, seed, rows, again=False):
    """
    The keys of Experiment.wanted that no row of results answers, with as many questions or more.
    again: rows of other code or flags do not count.
    """
    run = ex.run_id(experiment, row)
    found = {(old["measure"], old["task"], old["length"]): int(old["n"] or 0) for old in rows
             if (old["row"], old["seed"]) == (row.name, str(seed))
             and (old["run"] == run or not again)}
    return [(*key, n) for *key, n in experiment.wanted(row, seed) if found.get(tuple(key), -1) < n]


def known_seconds(rows):
    """{(experiment, row): mean seconds of training} of results."""
    found = defaultdict(list)
    for row in rows:
        if float(row["minutes"] or 0):
            found[row["experiment"], row["row"]].append(60 * float(row["minutes"]))
    return {name: mean(seconds) for name, seconds in found.items()}


def outdated(experiment, rows):
    """The names of the rows that were measured with other code or flags than today's."""
    current = {row.name: ex.run_id(experiment, row) for row in experiment.row}
    return list(dict.fromkeys(row["row"] for row in rows
                              if row["row"] in current and row["run"] != current[row["row"]]))


def merged(experiment, rows, new):
    """Rows of results with new ones in place of those of the same cell, in the table's order."""
    def cell(row):
        return tuple(str(row[name]) for name in ("row", "seed", "measure", "task", "length"))

    replaced = {cell(row) for row in new}
    names = [row.name for row in experiment.row] + [row["row"] for row in rows]
    tasks = parse_tasks(experiment.tasks) if experiment.tasks else []

    def place(row):
        length = parse_length(row["length"]) if row["length"] else -1
        task = tasks.index(row["task"]) if row["task"] in tasks else len(tasks)
        return names.index(row["row"]), int(row["seed"]), row["measure"] != "accuracy", length, task

    return sorted([row for row in rows if cell(row) not in replaced] + new, key=place)


def save(experiment, row, seed, keys, folder, results_dir):
    """
    Put what was measured of a run into NAME.csv, and its evaluations into NAME_log.csv. keys: what
    was missing. Raises OSError, ValueError.
    """
    path = Path(results_dir) / f"{experiment.name}.csv"
    new = measured(experiment, row, seed, keys, folder)
    with exclusive(results_dir):
        if not row.run_of:  # first: what is in NAME.csv is not measured again
            save_log(experiment, row, seed, folder, results_dir)
        write_results(path, merged(experiment, read_results(path), new))


def save_log(experiment, row, seed, folder, results_dir):
    """Put the evaluations of a run into NAME_log.csv. Raises OSError, ValueError."""
    about, (_, last) = json.loads(read_utf8(folder / "config.json")), ex.steps(folder)
    tokens = ex.planned_tokens(experiment, row, about["train"])
    log = [{"row": row.name, "seed": str(seed), **line,
            "tokens": tokens * int(line["step"]) // max(last, 1)} for line in evaluations(folder)]
    others = [line for line in read_log(results_dir, experiment.name)
              if (line["row"], line["seed"]) != (row.name, str(seed))]
    columns = tuple(dict.fromkeys(name for line in [*others, *log] for name in line))
    names = [row.name for row in experiment.row] + [line["row"] for line in others]
    path = Path(results_dir) / f"{experiment.name}_log.csv"
    write_results(path, sorted(others + log, key=lambda line: (
        names.index(line["row"]), int(line["seed"]), int(line["step"]))), columns)


def in_order(experiment, results_dir):
    """The rows of NAME.csv, which get the order of the experiment's. Raises OSError, ValueError."""
    path = Path(results_dir) / f"{experiment.name}.csv"
    with exclusive(results_dir):
        rows = read_results(path)
        ordered = merged(experiment, rows, [])
        if ordered != rows:
            write_results(path, ordered)
    return ordered


# --- The figures of a run

def measured(experiment, row, seed, keys, folder):
    """The rows of results that a trained and asked run gives for keys."""
    about, trained = json.loads(read_utf8(folder / "config.json")), experiment.answering_row(row)
    times, log = elapsed(folder), evaluations(folder)
    seconds = times[-1][0] if times else 0
    tokens = ex.planned_tokens(experiment, trained, about["train"])
    tokens_per_s = f"{tokens / seconds:.0f}" if seconds else ""
    device = pick_device(about["train"]["device"])
    common = {
        "experiment": experiment.name, "row": row.name, "seed": seed,
        "parameters": about["parameters"], "minutes": f"{seconds / 60:.2f}" if times else "",
        "tokens_per_s": tokens_per_s, "run": ex.run_id(experiment, row),
        **origin(device, trained.checkout), "device": hardware(device),
        "dtype": about["train"]["dtype"],
        "command": f'python compare.py {shlex.quote(experiment.path)} --only="{row.name}"'}
    answered, rows = answers(experiment, row, folder), []
    copied = ["n", "right", "answers", "dtype", "torch"]
    if not trained.change:  # a changed copy knows no commit
        copied.append("commit")
    for measure, task, length, n in keys:
        found = {"measure": measure, "task": task, "length": length}
        if measure == "accuracy":
            if (task, length, n) not in answered:
                raise ValueError(f"it has no {n} answers to {task} at {length}: ask fewer, or for "
                                 "a length and tasks that its stories have")
            answer = answered[task, length, n]
            found |= {name: answer[name] for name in copied}
            found["value"] = f"{int(answer['right']) / n:.4f}"
        elif measure in experiment.measure:
            found["value"] = (common | best(log)).get(measure)
            if found["value"] is None:
                raise ValueError(f"measure={measure} is no column of {folder}/log.csv: use "
                                 f"tokens_per_s, {', '.join(log[0])}")
        else:
            found["value"] = reached(experiment, measure, folder, log, times)
        rows.append(dict.fromkeys(COLUMNS, "") | common | found)
    return rows


def answers(experiment, row, folder):
    """{(task, length, n): row of results.csv} of what eval_babilong.py asked a run for a row."""
    path = ex.answers_folder(experiment, row, folder) / "results.csv"
    if not path.exists():
        return {}
    rows = csv.DictReader(io.StringIO(read_utf8(path), newline=""))
    return {(line["task"], line["length"], int(line["n"])): line for line in rows}


def elapsed(folder):
    """
    [(seconds of training, step)] of a run, as compare.py noted them; [] where they are not known:
    it was killed, and the training went on without it.
    """
    try:
        lines = [line.split(",") for line in read_utf8(folder / "times.csv").splitlines()]
        found = [(float(seconds), int(step)) for seconds, step in lines]
    except (OSError, ValueError):
        return []
    step, last = ex.steps(folder)
    known = found and not math.isnan(found[-1][0]) and step - found[-1][1] <= max(1, last / 100)
    return found if known else []


def evaluations(folder):
    """The rows of log.csv that have an evaluation."""
    rows = csv.DictReader(io.StringIO(read_utf8(folder / "log.csv"), newline=""))
    return [row for row in rows if row["val_loss"]]


def best(log):
    """The evaluation of best.pt: of stories the last one, of text the one with the least loss."""
    return log[-1] if "accuracy" in log[-1] else min(log, key=lambda row: float(row["val_loss"]))


def reached(experiment, measure, folder, log, times):
    """Minutes until an evaluation reached a figure, "" where none did. Raises ValueError."""
    if not times:
        raise ValueError("its minutes are not known, as compare.py was killed meanwhile: "
                         f"delete {folder}, and the same command trains it anew")
    column, figure = next(item for item in experiment.until.items()
                          if ex.minutes_until(*item) == measure)
    if column not in log[0]:
        raise ValueError(f"until has {column}, which is no column of log.csv: use "
                         f"{', '.join(log[0])}")
    sign = -1 if "loss" in column else 1  # a loss falls, an accuracy rises
    steps = [int(row["step"]) for row in log if sign * float(row[column]) >= sign * figure]
    minutes = [seconds / 60 for seconds, step in times if steps and step >= steps[0]]
    return f"{minutes[0]:.2f}" if minutes else ""
