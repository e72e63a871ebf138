"""What bench.py found: rows, and the tables, sentences, file and picture that they make."""
import csv
import math
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.files import atomic_open
from lib.rivals import ATTEND, FULL, LLAMA, NANOGPT, PLAIN

NOTES = {"peak_memory_mib": "MiB", "mfu_percent": "% MFU",
         "first_token_ms": "ms to the first token"}


class Row(NamedTuple):
    """What was measured of a model, as in the CSV file. None: not measured."""
    part: str
    what: str
    model: str
    tokens_per_s: float  # the median
    quartile1: float
    quartile3: float
    ratio: float         # of the median to that of the first rival
    peak_memory_mib: float | None = None
    mfu_percent: float | None = None     # share of the hardware's matmul peak
    first_token_ms: float | None = None  # from the beginning of the prompt on
    dtype: str = ""                      # of the matmuls


def take_turns(part, what, jobs, repeats):
    """jobs: {rival: function -> tokens per second}, in turns after a warm-up -> {rival: Row}"""
    laps = []
    for _ in tqdm(range(1 + repeats), desc=what, leave=False):
        laps.append([job() for job in jobs.values()])
    low, middle, high = np.quantile(laps[1:], (0.25, 0.5, 0.75), axis=0).tolist()
    return {name: Row(part, what, name, middle[i], low[i], high[i], middle[i] / middle[0])
            for i, name in enumerate(jobs)}


# --- In the terminal: a table for each part, and under it what it says

def print_rows(rows, with_head):
    """What rivals did of one thing, the fastest first; ratios are to the first rival."""
    notes = {row: ", ".join(f"{getattr(row, column):,.0f} {unit}" for column, unit in NOTES.items()
                            if getattr(row, column) is not None) for row in rows}
    more = any(notes.values())
    if with_head:
        head = [f"{rows[0].part} {rows[0].dtype}".strip(), "rival", "tokens a second", "quartiles",
                f"{rows[0].model} = 1"] + more * ["memory and more"]
        print(f"\n| {' | '.join(head)} |\n| --- | --- | ---: | ---: | ---: |{more * ' --- |'}")
    for row in sorted(rows, key=lambda row: -row.tokens_per_s):
        spread = f"{row.quartile1:,.0f} to {row.quartile3:,.0f}"
        cells = [row.what.removeprefix(f"{row.part}, "), row.model, f"{row.tokens_per_s:,.0f}",
                 spread if row.quartile1 < row.quartile3 else "–", f"{row.ratio:.2f}"]
        print(f"| {' | '.join(cells + more * [notes[row]])} |", flush=True)


def speeds(rows, part, model):
    """{what: tokens a second} of what a model did in a part."""
    return {row.what: row.tokens_per_s for row in rows if (row.part, row.model) == (part, model)}


def times(rows, part, model, others):
    """A sentence on how fast a model is beside others; none of them, no sentence."""
    ours, found = speeds(rows, part, model), []
    for other in others:
        ratios = [ours[what] / theirs for what, theirs in speeds(rows, part, other).items()]
        ends = dict.fromkeys(f"{ratio:.2f}" for ratio in (min(ratios), max(ratios)))
        found.append(f"{' to '.join(ends)} times {other}")
    return [f"Speed of {model}: {'; '.join(found)}."] if found else []


def conclusion(rows, part):
    """What the rows of a part say."""
    models = list(dict.fromkeys(row.model for row in rows if row.part == part))
    if part == "data":
        made, = speeds(rows, part, models[-1]).values()
        trained = speeds(rows, "training", ATTEND).values()
        more = f"; {ATTEND} trains on {max(trained):,.0f} at most" if trained else ""
        return f"One core makes {made:,.0f} tokens of stories a second{more}."
    see_all = [name for name in models if name in (FULL, PLAIN, NANOGPT, LLAMA)]
    others = [name for name in models if name != ATTEND]
    if part == "generation":
        return " ".join(times(rows, part, ATTEND, others))
    sentences = times(rows, part, ATTEND, [name for name in others if name not in see_all])
    if part == "training":
        ours = PLAIN if PLAIN in models else FULL
        sentences += times(rows, part, ours, [name for name in see_all if name != ours])
        return " ".join(sentences)
    for name in (ATTEND, FULL):  # reading
        first, *longer = speeds(rows, part, name).values()
        sentences += [f"{name} reads the longest text at {100 * longer[-1] / first:.1f}% of its "
                      "speed in the shortest."] if longer else []
    return " ".join(sentences)


# --- In files

def write_csv(path, rows, about):
    """about: {column: value}, the same in all rows."""
    with atomic_open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow([*Row._fields, *about])
        writer.writerows([*row, *about.values()] for row in rows)


def write_plot(path, rows):
    """A panel for each comparison: medians as bars, quartiles as whiskers."""
    from matplotlib.figure import Figure  # here, since it takes half a second
    comparisons = list(dict.fromkeys(row.what for row in rows))
    height = math.ceil(len(comparisons) / 3)
    figure = Figure(figsize=(15, 2.2 * height), layout="constrained")
    axes = figure.subplots(height, 3, squeeze=False)
    for panel, what in zip(axes.flat, comparisons):
        same = [row for row in rows if row.what == what]
        below = [row.tokens_per_s - row.quartile1 for row in same]
        above = [row.quartile3 - row.tokens_per_s for row in same]
        panel.barh([row.model for row in same], [row.tokens_per_s for row in same],
                   xerr=(below, above), color="0.6")
        panel.invert_yaxis()  # the first rival on top
        panel.set(title=what, xlabel="tokens/s")
    for panel in axes.flat[len(comparisons):]:
        panel.remove()
    with atomic_open(path) as f:
        figure.savefig(f, dpi=120, format="png")
