"""What bench.py found: rows, and the tables, sentences, file and picture that they make."""
import csv
import math
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from data.files import atomic_open

ATTEND, FULL = "LM2 attend", "full attention"
OTHERS = NANOGPT, LLAMA = "nanoGPT", "transformers' Llama"  # not ours


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
    if with_head:
        print(f"\n| {rows[0].part} | model | tokens a second | quartiles | times {rows[0].model} "
              "| memory and more |\n| --- | --- | ---: | --- | ---: | --- |")
    for row in sorted(rows, key=lambda row: -row.tokens_per_s):
        notes = ((row.peak_memory_mib, "{:,.0f} MiB"), (row.mfu_percent, "MFU {:.0f}%"),
                 (row.first_token_ms, "first token after {:,.0f} ms"))
        notes = [words.format(figure) for figure, words in notes if figure is not None]
        what = row.what.removeprefix(row.part).strip(", ")
        print(f"| {what} | {row.model} | {row.tokens_per_s:,.0f} "
              f"| {row.quartile1:,.0f} to {row.quartile3:,.0f} | {row.ratio:.2f} "
              f"| {', '.join(notes)} |", flush=True)


def speeds(rows, model):
    """{what: tokens a second} of what a model did."""
    return {row.what: row.tokens_per_s for row in rows if row.model == model}


def span(numbers):
    """0.73 to 0.80; 0.73 where both ends read alike."""
    return " to ".join(dict.fromkeys(f"{number:.2f}" for number in (min(numbers), max(numbers))))


def compared(rows, model, others):
    """How fast a model is beside others, in all that both did; "" where they did nothing."""
    ours, found = speeds(rows, model), []
    for other in others:
        ratios = [ours[what] / theirs for what, theirs in speeds(rows, other).items()
                  if what in ours]
        found += [f"{span(ratios)} times {other}"] if ratios else []
    return f"Speed of {model}: {', '.join(found)}. " if found else ""


def conclusion(part, rows):
    """What the rows of a part say, in sentences; rows: those of other parts as well."""
    of_part = [row for row in rows if row.part == part]
    models = list(dict.fromkeys(row.model for row in of_part))
    if part == "data":
        made = of_part[-1].tokens_per_s
        trained = speeds([row for row in rows if row.part == "training"], ATTEND).values()
        more = f", {made / max(trained):,.0f} times what {ATTEND} trains on" if trained else ""
        return f"One core makes {made:,.0f} tokens of stories a second{more}."
    found = compared(of_part, ATTEND, [name for name in models if name != ATTEND])
    if part == "training":
        found += compared(of_part, FULL, [name for name in models if name in OTHERS])
    if part == "reading":
        for name in (ATTEND, FULL):
            first, *_, last = [*speeds(of_part, name).values()] * 2
            found += f"{name} keeps {last / first:.2f} of its speed to the longest text. "
    return found.rstrip()


# --- In files

def write_csv(path, rows, about):
    """about: {column: value}, the same in all rows."""
    with atomic_open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow([*Row._fields, *about])
        writer.writerows([*row, *about.values()] for row in rows)


def write_plot(path, rows):
    """A panel for each comparison: medians as bars, quartiles as whiskers."""
    comparisons = list(dict.fromkeys(row.what for row in rows))
    height = math.ceil(len(comparisons) / 3)
    figure = Figure(figsize=(15, 2.2 * height), layout="constrained")
    axes = figure.subplots(height, 3, squeeze=False)
    for panel, what in zip(axes.flat, comparisons):
        compared = [row for row in rows if row.what == what]
        below = [row.tokens_per_s - row.quartile1 for row in compared]
        above = [row.quartile3 - row.tokens_per_s for row in compared]
        panel.barh([row.model for row in compared], [row.tokens_per_s for row in compared],
                   xerr=(below, above), color="0.6")
        panel.invert_yaxis()  # the first rival on top
        panel.set(title=what, xlabel="tokens/s")
    for panel in axes.flat[len(comparisons):]:
        panel.remove()
    with atomic_open(path) as f:
        figure.savefig(f, dpi=120, format="png")
