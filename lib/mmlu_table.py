"""
What eval_mmlu.py found: the columns of its results.csv, and their table, which has those of the
paper's Table 2 (arXiv 2502.06049), with 95% Wilson intervals.
"""
import csv
import math
from collections import defaultdict
from pathlib import Path
from statistics import mean

from data.mmlu import CATEGORIES, CATEGORY, LEVELS, PROMPTS, level
from lib.experiment_tables import NOTHING, markdown
from lib.scores import NORMAL

PAPER = Path(__file__).parents[1] / "data" / "paper_mmlu.csv"
AREAS = (*CATEGORIES, *LEVELS)  # the columns of the paper's Table 2; a subject counts in two

WHO = {"run": str, "checkpoint_sha256": str, "dtype": str}
ASKED = {"source": str, "subject": str, "questions_sha256": str, "shots": int, "cloze": bool,
         "n": int}
FOUND = {"right": int, "answers": str, "commit": str, "torch": str, "device": str}
COLUMNS = WHO | ASKED | FOUND


# --- Cells

def wilson(right, n):
    """The 95% interval of a share of right answers: (low, high), in %."""
    share, z = right / n, NORMAL ** 2 / n
    center, half = share + z / 2, math.sqrt(z * share * (1 - share) + z ** 2 / 4)
    return 100 * (center - half) / (1 + z), 100 * (center + half) / (1 + z)


def percent(right, n):
    """A cell: the accuracy and its interval."""
    low, high = wilson(right, n) if n else (0, 0)
    return f"{100 * right / n:.1f} ({low:.1f}–{high:.1f})" if n else NOTHING


def total(counts):
    """The sum of pairs (right, n)."""
    counts = list(counts)
    return sum(right for right, _ in counts), sum(n for _, n in counts)


def make_cells(counts):
    """{subject: (right, n)} -> accuracy in the eight columns, their mean, that of all questions."""
    totals = [total(found for subject, found in counts.items()
                    if column in (CATEGORY[subject], level(subject))) for column in AREAS]
    complete = all(n for _, n in totals)
    average = f"{100 * mean(right / n for right, n in totals):.1f}" if complete else NOTHING
    right, n = total(counts.values())
    return [percent(*pair) for pair in totals] + [average, percent(right, n), f"{n:,}"]


# --- Lines

def name_of(who, others):
    """A run's folder, and what tells it apart where others have the same."""
    run, sha256, dtype = who
    alone = [run for run, *_ in others].count(run) == 1
    return run if alone else f"{run} ({sha256[:8]}, {dtype})"


def paper_lines():
    """The lines of the paper's Table 2."""
    with open(PAPER, newline="", encoding="utf-8") as f:
        return [[f"paper: {row['model']}", *(row[column] for column in (*AREAS, "average")),
                 NOTHING, NOTHING] for row in csv.DictReader(f)]


def heading(rows):
    """What was asked in rows of the same questions."""
    n = sum({row["subject"]: row["n"] for row in rows}.values())
    source, shots, cloze = (rows[0][column] for column in ("source", "shots", "cloze"))
    shots = f"up to {shots} others of the subject as shots" if source == PROMPTS else (
        f"{shots} shots")
    return f"{n:,} questions of {source}, {shots}{', cloze' if cloze else ''}"


def make_table(rows, paper=False):
    """
    A Markdown table of rows of the same questions: what was asked, then a line for each run.
    paper: with the paper's lines.
    """
    answered = defaultdict(dict)
    for row in rows:
        answered[tuple(row[column] for column in WHO)][row["subject"]] = row["right"], row["n"]
    lines = [[name_of(who, answered), *make_cells(counts)] for who, counts in answered.items()]
    header = ["accuracy in %", *AREAS, "average", "all questions", "questions"]
    table = markdown(header, lines + (paper_lines() if paper else []))
    return f"{heading(rows)}\n\n{table}"
