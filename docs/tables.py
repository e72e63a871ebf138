"""
The tables of README.md and docs/, made from the CSV files in results/:

    python docs/tables.py            # prints all of them
    python docs/tables.py --write    # puts each between its markers in README.md and docs/*.md

A table stands between a line `<!-- table: NAME -->` and a line `<!-- end -->`; --write replaces
what is between them. A new number goes into a CSV file, with the command, the commit and the
machine that gave it, and never into a table by hand.
"""
import csv
import os
import re
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
END = "<!-- end -->"
MARKER = re.compile(rf"^(<!-- table: .+ -->|{END})$", re.MULTILINE)
NOTHING = "–"  # in a cell that was not measured


def load(name):
    """The rows of a CSV file, each as {column: text}. name: its path from the repository's root."""
    with open(ROOT / name, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def values(rows, column):
    """The different values of a column, in the order of their first row."""
    return list(dict.fromkeys(row[column] for row in rows))


def select(rows, **wanted):
    """The rows that have the wanted values, as in select(rows, model="LM2", length="4k")."""
    return [row for row in rows if all(row[column] == value for column, value in wanted.items())]


def whole(number):
    """A number as text, without decimals: 1,334,400."""
    return f"{float(number):,.0f}"


def markdown(header, lines, left=1):
    """A Markdown table of lists of cells. left: how many columns hold words instead of numbers."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *lines])


def pivot(corner, rows, down, across, cell, order=None):
    """
    A table with a line for each value of the column `down` and a column for each value of the
    column `across` (in this order, if given). cell: the rows of one cell -> text.
    """
    order = order or values(rows, across)
    lines = []
    for name in values(rows, down):
        found = [select(rows, **{down: name, across: column}) for column in order]
        lines.append([name] + [cell(some) if some else NOTHING for some in found])
    return markdown([corner, *order], lines)


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


def speed(name):
    """Tokens a second: a line for each model, a column for each thing that all of them did."""
    rows = [row for row in load(name) if row["part"] != "data"]
    return pivot("tokens a second", rows, "model", "what",
                 lambda rows: whole(rows[0]["tokens_per_s"]))


def speed_all(name):
    """Each measurement with its ratio to the first model that did the same, memory and more."""
    rows, lines = load(name), []
    units = {"peak_memory_mib": "MiB", "mfu_percent": "% MFU",
             "first_token_ms": "ms to the first token"}
    for row in rows:
        median, low, high = (row[c] for c in ("tokens_per_s", "quartile1", "quartile3"))
        ratio = float(median) / float(select(rows, what=row["what"])[0]["tokens_per_s"])
        more = [f"{whole(row[column])} {unit}" for column, unit in units.items() if row[column]]
        spread = f"{whole(low)} to {whole(high)}" if low else NOTHING
        lines.append([row["what"], row["model"], whole(median), spread, f"{ratio:.2f}",
                      ", ".join(more)])
    header = ["what", "model", "tokens a second", "quartiles", "ratio", "memory and more"]
    return markdown(header, lines, left=2)


def profile(size):
    """Milliseconds of a training step and of a generation, by part of the block."""
    rows = select(load("results/profile_cpu.csv"), size=size)
    return pivot(f"ms, {size}", rows, "part", "job", measured)


def printed(name, first, last):
    """What a program printed, word for word: the first and the last lines of it."""
    lines = (ROOT / name).read_text(encoding="utf-8").rstrip().split("\n")
    return "\n".join(["```", *lines[:first], "[...]", *lines[-last:], "```"])


TEN = ["0k", "1k", "4k", "16k", "32k"]
TABLES = {
    "first-run": lambda: printed("results/first_run.txt", 10, 2),
    "qa1": lambda: accuracy("results/qa1.csv", ["0k", "1k", "4k", "16k", "64k", "128k"]),
    "qa1-all": lambda: accuracy_all("results/qa1.csv"),
    "first-segment": lambda: accuracy("results/first_segment.csv", ["0k", "1k", "2k", "4k", "8k"]),
    "ten": lambda: accuracy("results/ten.csv", TEN),
    "ten-all": lambda: accuracy_all("results/ten.csv"),
    "ten-tasks": lambda: by_task("results/ten.csv"),
    "ten-gpu-all": lambda: accuracy_all("results/ten_gpu.csv"),
    "ten-gpu-tasks": lambda: by_task("results/ten_gpu.csv"),
    "real-babi": lambda: pivot("accuracy in %", load("results/real_babi.csv"), "run", "stories",
                               with_interval),
    "paper": lambda: pivot("accuracy in %", load("data/paper_babilong.csv"), "model", "length",
                           paper_mean),
    "paper-far": paper_far,
    "shakespeare": lambda: pivot("", load("results/shakespeare.csv"), "model", "measure", measured),
    "speed-cpu": lambda: speed("results/speed_cpu.csv"),
    "speed-cpu-all": lambda: speed_all("results/speed_cpu.csv"),
    "speed-cpu-far": lambda: speed_all("results/speed_cpu_far.csv"),
    "speed-cpu-compiled": lambda: speed_all("results/speed_cpu_compiled.csv"),
    "speed-gpu": lambda: speed("results/speed_gpu.csv"),
    "speed-gpu-all": lambda: speed_all("results/speed_gpu.csv"),
    "profile-4x128": lambda: profile("4 x 128"),
    "profile-6x192": lambda: profile("6 x 192"),
    "streaming": lambda: pivot("", load("results/streaming.csv"), "what", "measure", measured),
}


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
        if name not in TABLES:
            raise ValueError(f"there is no table {name}: use {', '.join(TABLES)}")
        parts[i + 1] = f"\n{TABLES[name]()}\n"
    return "".join(parts)


def replace(path, content):
    """Write bytes to a file, whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def stop(error):
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def main():
    if not sys.argv[1:]:
        print("\n\n".join(f"{name}\n\n{table()}" for name, table in TABLES.items()))
        return
    if sys.argv[1:] != ["--write"]:
        stop("use python docs/tables.py, or python docs/tables.py --write")
    changed = {}  # no file is touched unless all tables of all files could be made
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        before = path.read_text(encoding="utf-8")
        try:
            after = rendered(before)
        except ValueError as error:
            stop(f"{path.relative_to(ROOT)}: {error}")
        if after != before:
            changed[path] = after
    for path, text in changed.items():
        replace(path, text.encode("utf-8"))
        print(f"{path.relative_to(ROOT)}: tables filled in")


if __name__ == "__main__":
    main()
