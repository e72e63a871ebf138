"""lib/mmlu_table.py: intervals and columns of MMLU's table, and the paper's lines in it."""
import csv
from statistics import mean

import pytest

from data.mmlu import PROMPTS, SUBJECTS
from lib.mmlu_table import AREAS, PAPER, make_cells, make_table, wilson


def row(name, subject, right, n, **changes):
    return {"run": name, "checkpoint_sha256": "a" * 64, "dtype": "float32", "subject": subject,
            "source": "mmlu", "shots": 5, "cloze": False, "right": right, "n": n} | changes


def test_intervals_are_wilsons():
    for right, n, low, high in ((0, 10, 0, 27.75), (50, 100, 40.38, 59.62), (4, 4, 51.01, 100)):
        assert wilson(right, n) == pytest.approx((low, high), abs=0.01)


def test_a_column_counts_the_questions_of_its_subjects():
    counts = {subject: (number, 100) for number, subject in enumerate(SUBJECTS)}
    cells = dict(zip((*AREAS, "average", "all", "n"), make_cells(counts)))
    numbers = {column: float(cell.split()[0]) for column, cell in cells.items() if column != "n"}
    college = [number for number, subject in enumerate(SUBJECTS) if subject.startswith("college_")]
    assert numbers["college"] == round(mean(college), 1) and len(college) == 6
    assert numbers["all"] == mean(range(57)) and cells["n"] == "5,700"
    assert numbers["average"] == pytest.approx(mean(numbers[c] for c in AREAS), abs=0.051)
    cells = make_cells({"anatomy": (10, 10), "virology": (0, 90), "astronomy": (5, 10)})
    assert [cell.split(" ")[0] for cell in cells] == [
        "50.0", "–", "–", "10.0", "–", "–", "–", "13.6", "–", "13.6", "110"]


def test_every_subject_counts_in_one_category_and_one_level():
    for subject in SUBJECTS:
        cells = make_cells({subject: (1, 1)})
        category, level = cells[:4], cells[4:8]
        assert [sum(cell != "–" for cell in part) for part in (category, level)] == [1, 1]


def test_the_papers_lines_stand_beside_ours():
    plain, with_paper = (make_table([row("x", "anatomy", 1, 4)], paper) for paper in (False, True))
    ours, lines = plain.splitlines()[2:], with_paper.splitlines()[2:]
    assert lines[:3] == ours and ours[0].startswith(
        "| accuracy in % | STEM | humanities | social sciences | other | high school | college | "
        "professional | general | average |")
    printed = {"vanilla-Llama-1.7B": "27.2 28.7 29.2 27.7 28.8 27.7 27.5 27.2 28.0",
               "RMT-1.7B": "25.7 26.7 27.0 27.1 26.5 27.1 26.6 25.6 26.5",
               "LM2-1.7B": "28.1 32.2 31.6 28.0 30.4 29.0 27.6 28.5 29.4"}
    assert lines[3:] == [f"| paper: {model} | {numbers.replace(' ', ' | ')} | – | – |"
                         for model, numbers in printed.items()]


def test_the_papers_average_is_the_mean_of_its_eight_columns():
    with open(PAPER, newline="") as f:
        for line in csv.DictReader(f):
            average = mean(float(line[column]) for column in AREAS)
            assert float(line["average"]) == round(average, 1)


def test_lines_with_the_same_folder_are_told_apart():
    table = make_table([row("x", "anatomy", 1, 4), row("x", "anatomy", 2, 4, dtype="bfloat16"),
                        row("y", "anatomy", 3, 4)])
    assert [line.split(" | ")[0] for line in table.splitlines()[4:]] == [
        "| x (aaaaaaaa, float32)", "| x (aaaaaaaa, bfloat16)", "| y"]


def test_the_table_says_what_was_asked():
    rows = [row("x", "anatomy", 1, 4), row("x", "sociology", 2, 1000), row("y", "anatomy", 3, 4)]
    for changes, said in (({}, "1,004 questions of mmlu, 5 shots"),
                          ({"shots": 0, "cloze": True}, "1,004 questions of mmlu, 0 shots, cloze"),
                          ({"source": PROMPTS}, f"1,004 questions of {PROMPTS}, up to 5 others of "
                                                "the subject as shots")):
        table = make_table([some | changes for some in rows])
        assert table.startswith(f"{said}\n\n| accuracy in % | STEM |")
