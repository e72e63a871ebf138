"""
The tables of README.md and docs/, made from the CSV files in results/. A table stands between a
line `<!-- table: NAME -->` and a line `<!-- end -->`; `python compare.py --write` replaces what is
between them. Each experiment that compare.py measured, results/NAME.csv, has these tables:

    NAME                    accuracy at all lengths, and all else that was measured
    NAME difference         the same, each row minus the first
    NAME brief 0k,4k,64k    means at some lengths
    NAME tasks 0k,4k        means over seeds, task by task; at all lengths if none is named

TABLES has the others.
"""
import csv
import re
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, stdev

from data.files import atomic_open
from lib import mmlu_table, results, scores
from lib.experiment_tables import (
    NOTHING,
    brief_table,
    difference_table,
    experiment_table,
    markdown,
    pivot,
    task_table,
    whole,
)
from lib.measured import COLUMNS, read_results
from lib.scores import select, values
from lib.speed import NOTES
from lib.view import count_table

ROOT = Path(__file__).resolve().parent.parent
END = "<!-- end -->"
MARKER = re.compile(rf"^(<!-- table: .+ -->|{END})$", re.MULTILINE)


def load(name):
    """The rows of a CSV file, each as {column: text}. name: its path from the repository's root."""
    with open(ROOT / name, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


# --- Tables of other files

def with_interval(rows):
    """Accuracy in one cell, with half of its 95% interval if that is known."""
    accuracy, half = rows[0]["accuracy"], rows[0]["interval95"]
    return f"{accuracy} ± {half}" if half else accuracy


def paper_mean(rows):
    """The mean over ten tasks of rows of the paper's tables, as text. A half is rounded up."""
    cells = [float(row[column]) for row in rows for column in row if column.startswith("qa")]
    return f"{mean(cells) + 1e-9:.1f}"


def paper_far():
    """The paper's row >=8k beside the means of the lengths that it may stand for."""
    rows, lines, far = load("data/paper_babilong.csv"), [], ["8k", "16k", "32k", "64k", "128k"]
    for model in values(rows, "model"):
        cells = [model]
        for lengths in ([">=8k"], far[:4], far):
            found = [row for row in select(rows, model=model) if row["length"] in lengths]
            cells.append(paper_mean(found) if len(found) == len(lengths) else NOTHING)
        lines.append(cells)
    return markdown(["accuracy in %", "printed as >=8k", "8k to 64k", "8k to 128k"], lines)


def measured(rows):
    """One value as it is, thousands parted; of several seeds the mean, then each."""
    found = [row["value"] for row in rows]
    if len(found) > 1:
        return f"{mean(map(float, found)):.3f} ({', '.join(found)})"
    return whole(found[0]) if found[0].isdigit() else found[0]


def each(rows):
    """Values as they are, those that are equal once."""
    return " and ".join(dict.fromkeys(measured([row]) for row in rows))


def speed(name):
    """Tokens a second: a line for each thing that was done, a column for each model."""
    rows = [row for row in load(name) if row["part"] != "data"]
    return pivot("tokens a second", rows, "what", "model",
                 lambda rows: whole(rows[0]["tokens_per_s"]))


def speed_all(name):
    """Each measurement with its ratio to the first model that did the same, memory and more."""
    rows, lines = load(name), []
    for row in rows:
        median, low, high = (row[c] for c in ("tokens_per_s", "quartile1", "quartile3"))
        ratio = float(median) / float(select(rows, what=row["what"])[0]["tokens_per_s"])
        more = [f"{whole(row[column])} {unit}" for column, unit in NOTES.items() if row[column]]
        spread = f"{whole(low)} to {whole(high)}" if low else NOTHING
        lines.append([row["what"], row["model"], whole(median), spread, f"{ratio:.2f}",
                      ", ".join(more)])
    header = ["what", "model", "tokens a second", "quartiles", "ratio", "memory and more"]
    return markdown(header, lines, left=2)


def profile(size):
    """Milliseconds of a training step and of a generation, by part of the block."""
    rows = select(load("results/profile_cpu.csv"), size=size)
    return pivot(f"ms, {size}", rows, "part", "job", measured)


def mmlu(name):
    """A table for each kind of questions that eval_mmlu.py asked: what they are, then the runs."""
    kinds = defaultdict(list)
    for row in results.load(ROOT / name, mmlu_table.COLUMNS):
        kinds[row["source"], row["shots"], row["cloze"]].append(row)
    return "\n\n".join(map(mmlu_table.make_table, kinds.values()))


def printed(name, first, last):
    """What a program printed, word for word: the first and the last lines of it."""
    lines = (ROOT / name).read_text(encoding="utf-8").rstrip().split("\n")
    return "\n".join(["```", *lines[:first], "[...]", *lines[-last:], "```"])


# --- Tables of experiments of before compare.py, with columns of their own

def of_seeds(rows):
    """Accuracy in % of each seed at one length, the mean over its tasks."""
    seeds = [select(rows, seed=seed) for seed in values(rows, "seed")]
    return [mean(float(row["accuracy"]) for row in some) for some in seeds]


def accuracy(name, lengths):
    """The mean over tasks and seeds: a line for each model, a column for each length."""
    return pivot("accuracy in %", load(name), "model", "length",
                 lambda rows: whole(mean(of_seeds(rows))), lengths)


def accuracy_all(name):
    """All lengths: with parameters, minutes of training if known, and the deviation over seeds."""
    rows = load(name)
    known = ["parameters", "minutes"] if rows[0]["minutes"] else ["parameters"]
    lengths, lines = values(rows, "length"), []
    for model in values(rows, "model"):
        cells = [whole(select(rows, model=model)[0][column]) for column in known]
        for length in lengths:
            seeds = of_seeds(select(rows, model=model, length=length))
            cells.append(whole(mean(seeds)) if seeds else NOTHING)
            if len(seeds) > 1:
                cells[-1] += f" ± {stdev(seeds):.0f}"
        lines.append([model, *cells])
    questions = [select(rows, length=length)[0]["questions"] for length in lengths]
    lines.append(["*questions, each task and seed*", *[""] * len(known), *questions])
    return markdown(["accuracy in %", *known, *lengths], lines)


def by_task(name):
    """Accuracy task by task, of the models whose tasks are known."""
    rows = [row for row in load(name) if row["task"] != "all"]
    lines = []
    for model in values(rows, "model"):
        for length in values(rows, "length"):
            found = [float(row["accuracy"]) for row in select(rows, model=model, length=length)]
            lines.append([model, length, *map(whole, [*found, mean(found[:5]), mean(found)])])
    header = ["accuracy in %", "length", *values(rows, "task"), "qa1-qa5", "all"]
    return markdown(header, lines, left=2)


TABLES = {
    "first-run": lambda: printed("results/first_run.txt", 6, 2),
    "first-segment": lambda: accuracy("results/first_segment.csv", ["0k", "1k", "2k", "4k", "8k"]),
    "real-babi": lambda: pivot("accuracy in %", load("results/real_babi.csv"), "run", "stories",
                               with_interval),
    "paper": lambda: pivot("accuracy in %", load("data/paper_babilong.csv"), "model", "length",
                           paper_mean),
    "paper-far": paper_far,
    "speed-cpu-training": lambda: speed("results/speed_cpu_training.csv"),
    "speed-cpu": lambda: speed("results/speed_cpu.csv"),
    "speed-cpu-far": lambda: speed_all("results/speed_cpu_far.csv"),
    "speed-cpu-generation": lambda: speed("results/speed_cpu_generation.csv"),
    "speed-cpu-compiled": lambda: speed("results/speed_cpu_compiled.csv"),
    "speed-gpu": lambda: speed("results/speed_gpu.csv"),
    "speed-gpu-all": lambda: speed_all("results/speed_gpu.csv"),
    "processes": lambda: pivot("", load("results/processes.csv"), "what", "measure", measured),
    "profile-4x128": lambda: profile("4 x 128"),
    "profile-6x192": lambda: profile("6 x 192"),
    "mmlu": lambda: mmlu("results/mmlu.csv"),
    "nanogpt": lambda: pivot("", load("results/nanogpt.csv"), "program", "measure", each),
    "look": lambda: count_table(load("results/look.csv")),
    "streaming": lambda: pivot("", load("results/streaming.csv"), "what", "measure", measured),
    "ten-before": lambda: accuracy_all("results/ten_before.csv"),
    "ten-gpu-all": lambda: accuracy_all("results/ten_gpu.csv"),
    "ten-gpu-tasks": lambda: by_task("results/ten_gpu.csv"),
}


# --- Tables of the experiments of compare.py

def experiments():
    """The names of the experiments in results/."""
    found = []
    for path in sorted((ROOT / "results").glob("*.csv")):
        with open(path, encoding="utf-8") as f:
            if f.readline().startswith(",".join(COLUMNS[:4])):
                found.append(path.stem)
    return found


def task_means(name, length):
    """{row: {task: accuracy in %, the mean over its seeds}} of results/NAME.csv at a length."""
    path = ROOT / "results" / f"{name}.csv"
    rows = select(scores.by_run(read_results(path)), length=length)
    return {row: scores.task_means(select(rows, row=row)) for row in values(rows, "row")}


def table_of_experiment(name, kind="", lengths=""):
    """The table that a marker `NAME KIND LENGTHS` means. Raises ValueError that names its file."""
    tables = {"": experiment_table, "difference": difference_table}
    path, wanted = f"results/{name}.csv", lengths.replace(",", " ").split()
    try:
        rows = read_results(ROOT / path)
        if not rows:
            raise ValueError("nothing was measured yet")
        if kind == "brief" and wanted:
            return brief_table(rows, wanted)
        if kind == "tasks":
            return task_table(rows, wanted)
        if kind in tables and not wanted:
            return tables[kind](rows)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    marker = f"{name} {kind} {lengths}".rstrip()
    raise ValueError(f"there is no table {marker}: use {name}, {name} difference, "
                     f"{name} tasks 0k,4k or {name} brief 0k,4k")


# --- Pages

def table(marker):
    """The table that a marker names. Raises ValueError, one line."""
    name, *more = marker.split(" ", 2)
    if name in experiments():
        return table_of_experiment(name, *more)
    if marker in TABLES:
        return TABLES[marker]()
    raise ValueError(f"there is no table {marker}: use {', '.join([*experiments(), *TABLES])}")


def rendered(text):
    """
    text with all its tables filled in. Raises ValueError, one line, for a marker that names no
    table, that is not closed, or that closes nothing.
    """
    parts = MARKER.split(text)  # text, marker, old table, end, text, marker, old table, end, text
    for i in range(1, len(parts), 4):
        marker, end = parts[i], parts[i + 2] if i + 2 < len(parts) else None
        name = marker.removeprefix("<!-- table: ").removesuffix(" -->")
        if marker == END:
            raise ValueError(f"a line {END} closes no table")
        if end != END:
            raise ValueError(f"the table {name} is not closed by a line {END}")
        parts[i + 1] = f"\n{table(name)}\n"
    return "".join(parts)


def fill(root):
    """
    Put all tables into README.md and docs/*.md of a checkout -> the paths that changed, from root.
    No page is touched unless all could be made. Raises ValueError for a marker, OSError.
    """
    changed = {}
    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        before = path.read_text(encoding="utf-8")
        try:
            after = rendered(before)
        except ValueError as e:
            raise ValueError(f"{path.relative_to(root)}: {e}") from None
        if after != before:
            changed[path] = after
    with ExitStack() as pages:  # each gets its name when all are written
        for path, text in changed.items():
            page = pages.enter_context(atomic_open(path, "w", encoding="utf-8", newline=""))
            page.write(text)
            page.flush()
    return [path.relative_to(root) for path in changed]
