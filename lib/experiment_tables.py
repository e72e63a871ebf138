"""
The tables of an experiment, from the rows that compare.py measured: dicts of text, one a measured
cell. lib/scores.py has what the cells say, lib/measured.py the columns.
"""
from statistics import mean

from lib import scores
from lib.scores import select, values

NOTHING = "–"  # in a cell that was not measured


def whole(number):
    """A number as text, without decimals: 1,334,400."""
    return f"{float(number):,.0f}"


def half(number):
    """Half of an interval as text; below 1 with a decimal, since none is 0."""
    return f"± {number:.0f}" if number >= 0.95 else f"± {number:.1f}"


def listed(words):
    """As in "a", "a and b", "a, b and c"."""
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def markdown(header, lines, left=1):
    """A Markdown table of lists of cells. left: how many columns hold words instead of numbers."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    lines = [[cell.replace("|", "\\|") for cell in line] for line in [header, rule, *lines]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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


# --- Accuracy and other figures

def experiment_table(rows, current=None):
    """
    A line for each row: parameters, mean minutes of training, then accuracy at each length as
    `mean [worst best seed] ± half of the interval`, and each other measure; a caption. current:
    see scores.by_run.
    """
    rows = scores.by_run(rows, current)
    lengths, measures, lines = scores.lengths_of(rows), scores.measures_of(rows), []
    for name in values(rows, "row"):
        own = select(rows, row=name)
        seeds = [select(own, seed=seed)[0] for seed in values(own, "seed")]
        minutes = [float(row["minutes"]) for row in seeds if row["minutes"]]
        cells = [whole(own[0]["parameters"]) if own[0]["parameters"] else NOTHING,
                 f"{mean(minutes):.{int(mean(minutes) < 10)}f}" if minutes else NOTHING]
        for length in lengths:
            asked = select(own, length=length)
            cells.append(accuracy_cell(asked) + of_tasks(asked, select(rows, length=length)))
        for measure in measures:
            cells.append(figures_cell(select(own, length="", measure=measure)))
        lines.append([name, *cells])
    if lengths:
        asked = [questions(select(rows, length=length)) for length in lengths]
        lines.append(["*questions, each task and seed*", "", "", *asked, *[""] * len(measures)])
    corner = "accuracy in %" if lengths else ""
    table = markdown([corner, "parameters", "minutes", *lengths, *measures], lines)
    return f"{table}\n\n{caption(rows)}"


def accuracy_cell(rows):
    """Of the rows of one name at one length, as in `99 [98 100] ± 1`."""
    if not rows:
        return NOTHING
    found = scores.accuracy(rows)
    spread = f" [{min(found.seeds):.0f} {max(found.seeds):.0f}]" if len(found.seeds) > 1 else ""
    return f"{found.mean:.0f}{spread} {half(found.half)}"


def of_tasks(rows, others):
    """How many of the others' tasks were asked, where some were not: " (1 of 2 tasks)"."""
    n, n_others = len(values(rows, "task")), len(values(others, "task"))
    return f" ({n} of {n_others} tasks)" if 0 < n < n_others else ""


def questions(rows):
    """How many questions of each task each seed was asked: 100, or 30 to 100."""
    asked = sorted({int(row["n"]) for row in rows})
    return f"{asked[0]} to {asked[-1]}" if len(asked) > 1 else f"{asked[0]}"


def decimals(rows):
    """How many digits behind the point a figure of these rows gets: as it has them, at most 3."""
    return max(min(len(row["value"].partition(".")[2]), 3) for row in rows)


def figures_cell(rows):
    """Of the rows of one name and measure: the figure; of several seeds the mean, then each."""
    if not rows:
        return NOTHING
    digits, found = decimals(rows), list(scores.figures(rows).values())
    each = [NOTHING if figure is None else f"{figure:,.{digits}f}" for figure in found]
    if len(found) == 1:
        return each[0]
    center = NOTHING if None in found else f"{mean(found):,.{max(digits, 1)}f}"
    return f"{center} ({', '.join(each)})"


def caption(rows):
    """In italics and one line: what the cells say, the seeds, and what they were measured with."""
    parts = [seeds_of_rows(rows)]
    for column, word in (("device", ""), ("dtype", ""), ("torch", "torch "), ("commit", "commit ")):
        found = [text for text in values(rows, column) if text]
        if column == "commit":
            found = list(dict.fromkeys(map(scores.short, found)))
        if found:
            parts.append(word + listed(found))
    about = ""
    if scores.lengths_of(rows):
        about = "Mean [worst and best seed] ± half of the 95% interval of the questions. "
    return f"*{about}{'; '.join(parts)}.*"


def seeds_of_rows(rows):
    """As in "Seeds 1, 2, 3; of RMT and window 1": first those that most rows have."""
    found = {}
    for name in values(rows, "row"):
        found.setdefault(tuple(values(select(rows, row=name), "seed")), []).append(name)
    (usual, _), *others = sorted(found.items(), key=lambda item: -len(item[1]))
    text = f"{'Seeds' if len(usual) > 1 else 'Seed'} {', '.join(usual)}"
    return text + "".join(f"; of {listed(names)} {', '.join(seeds)}" for seeds, names in others)


# --- Differences

def difference_table(rows, current=None):
    """
    Each row minus the first: accuracy in points, and each other measure; bold where the interval
    excludes zero. current: see scores.by_run.
    """
    first, rows = rows[0]["row"], scores.by_run(rows, current)
    first = first if select(rows, row=first) else rows[0]["row"]
    lengths, measures, lines = scores.lengths_of(rows), scores.measures_of(rows), []
    base = select(rows, row=first)
    for name in values(rows, "row"):
        own, cells = select(rows, row=name), []
        for length in lengths:
            pair = select(own, length=length), select(base, length=length)
            cells.append(difference_cell(scores.difference(*pair), 0))
        for measure in measures:
            cell = {"length": "", "measure": measure}
            found = scores.figure_difference(select(own, **cell), select(base, **cell))
            cells.append(difference_cell(found, decimals(select(rows, **cell))))
        if name != first:
            lines.append([name, *cells])
    corner = f"minus {first}, in points" if lengths else f"minus {first}"
    return markdown([corner, *lengths, *measures], lines)


def difference_cell(found, digits):
    """Of an Estimate, with so many digits behind the point, as in `-21 ± 4`; or of None."""
    if found is None:
        return NOTHING
    text = f"{found.value:+.{digits}f}"
    text = text if float(text) else text[1:]  # no +0 and no -0
    if found.half is None:
        return text
    text += f" {half(found.half)}" if digits == 0 else f" ± {found.half:.{digits}f}"
    return f"**{text}**" if abs(found.value) > found.half else text


# --- Some lengths, and tasks

def known_lengths(rows, lengths):
    """The lengths, all of them if none is given. Raises ValueError for one that was not asked."""
    known = scores.lengths_of(rows)
    for length in lengths:
        if length not in known:
            raise ValueError(f"nothing was asked at length {length}: use {', '.join(known)}")
    return lengths or known


def brief_table(rows, lengths):
    """The mean accuracy of each row at some lengths."""
    rows = [row for row in scores.by_run(rows) if row["length"]]

    def cell(found):
        return whole(scores.accuracy(found).mean) + of_tasks(found, rows)

    return pivot("accuracy in %", rows, "row", "length", cell, known_lengths(rows, lengths))


def task_table(rows, lengths=()):
    """The mean over seeds of each row at some lengths, task by task, and the mean over tasks."""
    rows = [row for row in scores.by_run(rows) if row["length"]]
    tasks, lines = values(rows, "task"), []
    columns = {task: [task] for task in tasks}
    five = [f"qa{i}" for i in range(1, 6)]
    if set(five) < set(tasks):
        columns["qa1-qa5"] = five
    if len(tasks) > 1:
        columns["all"] = tasks
    for name in values(rows, "row"):
        for length in known_lengths(rows, lengths):
            found, cells = scores.task_means(select(rows, row=name, length=length)), []
            for wanted in columns.values():
                asked = found.keys() >= set(wanted)
                cells.append(whole(mean(found[task] for task in wanted)) if asked else NOTHING)
            if found:
                lines.append([name, length, *cells])
    return markdown(["accuracy in %", "length", *columns], lines, left=2)
