"""
What eval_babilong.py found: kept in results.csv, shown as tables and a plot.

results.csv has a row for each run, length and task. Its first columns, KEY, say what a row is of:
which weights answered, how, and which questions. Rows are added, and never dropped. The column
`answers` has a character for each question, in the order in which they are made: 1 right, 0 wrong.
Rows of the same questions_sha256 can be compared question by question.
"""
import csv
import io
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from data.babi import TASKS
from data.babilong import parse_length
from data.files import atomic_open, exclusive, read_utf8
from lib.config import convert

PAPER = Path(__file__).parents[1] / "data" / "paper_babilong.csv"  # of arXiv 2502.06049

# --- results.csv

SUBJECT = {"run": str, "checkpoint_sha256": str, "rag": int, "count": str, "corpus": str,
           "corpus_sha256": str, "dtype": str}
ASKED = {"source": str, "seed": int, "length": str, "task": str, "questions_sha256": str, "n": int}
KEY = SUBJECT | ASKED
FOUND = {"right": int, "answers": str, "accuracy": float, "parameters": int, "trained_on": str,
         "commit": str, "torch": str, "device": str}
COLUMNS = KEY | FOUND


def parse_row(cells, columns):
    """The cells of a line -> {column: value}. Raises ValueError where they cannot be a row."""
    if len(cells) != len(columns):
        raise ValueError(f"{len(cells)} cells instead of {len(columns)}")
    row = {name: convert(name, cell, kind) for (name, kind), cell in zip(columns.items(), cells)}
    if "length" in row:
        parse_length(row["length"])
    answers = row["answers"]
    counts = len(answers), answers.count("1")
    if not re.fullmatch("[01]+", answers) or counts != (row["n"], row["right"]):
        raise ValueError(f"answers are not {row['right']} right ones of {row['n']}")
    if row.get("accuracy") not in (None, row["right"] / row["n"]):
        raise ValueError(f"accuracy {row['accuracy']} is not {row['right']} of {row['n']}")
    return row


def load(path, columns=COLUMNS):
    """
    The rows of results.csv, dicts; [] where there is none. columns: {name: type}, right and answers
    among them. Raises ValueError, OSError.
    """
    if not Path(path).exists():
        return []
    text = read_utf8(path)
    csv.field_size_limit(1 << 30)  # a cell has the answers to any number of questions
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        if next(reader, None) != list(columns):
            raise ValueError("not the columns of this program")
        rows = [parse_row(cells, columns) for cells in reader]
        if not text.endswith("\n"):
            raise ValueError("the line does not end")
    except (ValueError, csv.Error) as e:
        raise ValueError(f"{path}, line {reader.line_num or 1}, is damaged or foreign ({e}): "
                         "repair it, move it away, or use another --out_dir") from None
    return rows


def add(path, row, columns=COLUMNS):
    """
    Put one more row into results.csv, whole or not at all. The file is read again before, since
    another evaluation may have added to it. Raises OSError; the file is then as it was.
    """
    try:
        with (exclusive(Path(path).parent),
              atomic_open(path, "w", encoding="utf-8", newline="") as f):
            rows = [*load(path, columns), row]
            writer = csv.DictWriter(f, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    except (OSError, ValueError) as e:
        raise OSError(f"{e}: once that is mended, the same command goes on") from None


def answered(rows, key):
    """Whether one of the rows has the values of this key, a dict."""
    return any(key.items() <= row.items() for row in rows)


def subject(row):
    """Who answered, and how: a tuple of the columns SUBJECT."""
    return tuple(row[column] for column in SUBJECT)


def title(row):
    """What a table calls a subject, if nothing else has the name: its folder and its options."""
    name = Path(row["run"]).name
    if row["rag"]:
        name += f" + RAG ({row['rag']} sentences)"
    if row["corpus"]:
        name += f" in {Path(row['corpus']).name}"
    if row["count"] == "gpt2":
        name += ", GPT-2's tokens"
    return name


def names(rows):
    """
    {subject: its name in a table}. Where titles are equal, the difference stands behind them:
    "lm2 (out/b/lm2)", or of weights that changed in the same folder "lm2 (1f0c9a2b)".
    """
    subjects = {subject(row): row for row in rows}
    found = {}
    for key, row in subjects.items():
        twins = [other for other in subjects.values() if title(other) == title(row)]
        details = []
        for column in ("run", "checkpoint_sha256", "dtype", "corpus", "corpus_sha256"):
            alike = [other for other in twins if other[column] == row[column]]
            if len(alike) < len(twins):
                details.append(row[column][:8] if "sha256" in column else row[column])
            twins = alike
        found[key] = title(row) + (f" ({', '.join(details)})" if details else "")
    return found


# --- Tables

class TableLine(NamedTuple):
    """A line of a table: a run at one length."""
    name: str
    accuracy: dict  # task -> % right
    average: float  # over the tasks
    interval: float | None = None   # half of the average's 95% interval
    questions: int | str = ""


def average(cells):
    """
    Counts (n, right) of each task -> mean accuracy over the tasks in %, and half its 95% interval
    (normal, each share as Agresti and Coull have it: two right and two wrong answers more).
    """
    mean = sum(right / n for n, right in cells) / len(cells)
    shares = [(n + 4, (right + 2) / (n + 4)) for n, right in cells]
    variance = sum(share * (1 - share) / n for n, share in shares) / len(cells) ** 2
    return 100 * mean, 100 * 1.96 * math.sqrt(variance)


def make_tables(rows, n_samples, paper):
    """
    {length: its TableLines}, shortest first; paper: with the paper's. Where a run was asked several
    numbers of questions of a task, the largest up to n_samples counts.
    """
    titles = names(rows)
    counted = defaultdict(lambda: defaultdict(dict))  # length -> name -> task -> (n, right)
    for row in sorted(rows, key=lambda row: (row["n"] <= n_samples, row["n"])):
        cells = counted[row["length"]][titles[subject(row)]]
        cells[row["task"]] = row["n"], row["right"]
    tables = {}
    for length in sorted(counted, key=parse_length):
        lines = []
        for name in titles.values():
            if cells := counted[length].get(name):
                accuracy = {task: 100 * right / n for task, (n, right) in cells.items()}
                asked = sum(n for n, _ in cells.values())
                lines.append(TableLine(name, accuracy, *average(cells.values()), asked))
        tasks = {task for line in lines for task in line.accuracy}
        tables[length] = lines + (paper_lines(length, tasks) if paper else [])
    return tables


def paper_lines(length, tasks):
    """The paper's lines for a length; where it has none from 8k on, those of its mean ">=8k"."""
    with open(PAPER, newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    tokens = parse_length(length)
    exact = [row for row in rows if row["length"] != ">=8k"
             and parse_length(row["length"]) == tokens]
    found = exact or [row for row in rows if row["length"] == ">=8k" and tokens >= 8000]
    lines = []
    for row in found:
        name = f"paper: {row['model']}" + ("" if exact else " (>=8k)")
        accuracy = {task: float(row[task]) for task in TASKS if task in tasks}
        lines.append(TableLine(name, accuracy, sum(accuracy.values()) / len(tasks)))
    return lines


def markdown(tables):
    """One table for each length, in the paper's layout: a line a model, a column a task."""
    text = []
    for length, lines in tables.items():
        tasks = [task for task in TASKS if any(task in line.accuracy for line in lines)]
        text.append(f"| {length} | {' | '.join(tasks)} | avg | questions |")
        text.append("| --- |" + " ---: |" * (len(tasks) + 2))
        for line in lines:
            accuracy = [line.accuracy.get(task) for task in tasks]
            cells = ["" if percent is None else f"{percent:.0f}" for percent in accuracy]
            interval = "" if line.interval is None else f" ± {line.interval:.1f}"
            cells += [f"{line.average:.1f}{interval}", f"{line.questions}"]
            text.append(f"| {line.name} | {' | '.join(cells)} |")
        text.append("")
    return "\n".join(text)


def plot(tables, path):
    """A picture of average accuracy over length, a curve for each name, with 95% intervals."""
    from matplotlib.figure import Figure  # here, since it takes half a second
    curves = list(dict.fromkeys(line.name for lines in tables.values() for line in lines))
    figure = Figure(figsize=(7, 4 + 0.22 * len(curves)), layout="constrained")
    axes = figure.subplots()
    for name in curves:
        points = [(x, line.average, line.interval or 0) for x, lines in enumerate(tables.values())
                  for line in lines if line.name == name]
        x, y, intervals = zip(*points)
        style = ":" if name.startswith("paper: ") else "-"
        axes.errorbar(x, y, yerr=intervals, label=name, ls=style, marker="o", ms=3, capsize=2)
    axes.set(xticks=range(len(tables)), xticklabels=tables, ylim=(0, 102),
             xlabel="length of the context, tokens", ylabel="accuracy, % (average over tasks)")
    figure.legend(loc="outside lower left", fontsize="small")  # below the axes, hides no curve
    with atomic_open(path) as f:
        figure.savefig(f, dpi=120, format="png", bbox_inches="tight")
