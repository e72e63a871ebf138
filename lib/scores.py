"""
What the rows of results/NAME.csv amount to: means over tasks and seeds, and how sure they are.

Two things are left to chance: the seed of a run, and which questions were asked. Seeds are few, so
they are shown as they are: the worst, the best. Questions are many. From how much their outcomes
differ follows a 95% interval: what other questions might have given to the same runs.

Rows are dicts of text, one a measured cell (lib/measured.py has the columns). Accuracies are in %.
"""
import math
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np

from data.babilong import parse_length

NORMAL = 1.96  # 95% of a normal distribution lie within so many standard deviations
# The same for Student's t with 1 to 9 degrees of freedom. With more, the last is a little too wide.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# Questions that are thought of in addition, so that 30 right ones of 30 do not look like certainty:
# {outcome: how many}. For one model after Agresti and Coull, for a pair after Agresti and Min.
EXTRA_ANSWERS = {1: 2, 0: 2}
EXTRA_PAIRS = {1: 0.5, -1: 0.5, 0: 1}


class Estimate(NamedTuple):
    """A figure, and half of its 95% interval, None where that is not known."""
    value: float
    half: float | None


class Accuracy(NamedTuple):
    """In %, at one length: the mean over tasks and seeds, and the mean over tasks of each seed."""
    mean: float
    half: float  # of the 95% interval that the choice of questions leaves open
    seeds: list


# --- Rows

def values(rows, column):
    """The different values of a column, in the order of their first row."""
    return list(dict.fromkeys(row[column] for row in rows))


def select(rows, **wanted):
    """The rows that have the wanted values, as in select(rows, model="LM2", length="4k")."""
    return [row for row in rows if all(row[column] == value for column, value in wanted.items())]


def lengths_of(rows):
    """The lengths at which questions were asked, the shortest first."""
    return sorted(filter(None, values(rows, "length")), key=parse_length)


def measures_of(rows):
    """What was measured besides answers: a loss, or minutes until a loss was reached."""
    return values(select(rows, length=""), "measure")


def short(commit):
    """A commit as people write it: 7 digits, and whether files were changed since."""
    return commit.partition("-")[0][:7] + ("-dirty" if commit.endswith("-dirty") else "")


def by_run(rows, current=None):
    """
    The rows, where what other code or flags gave has a name of its own: "LM2 (as of 1f0c9a2)". The
    plain name is for the run in current, {row: run}; without it for a row's only one.
    """
    runs = {(row["row"], row["run"]): short(row["commit"]) for row in rows}
    names = [name for name, _ in runs]
    plain = {name: run for name, run in runs if names.count(name) == 1} | (current or {})
    older = {(name, run): commit for (name, run), commit in runs.items() if plain.get(name) != run}
    names = {}
    for (name, run), commit in older.items():
        twins = [key for key, other in older.items() if (key[0], other) == (name, commit)]
        more = f", run {run}" if len(twins) > 1 else ""
        names[name, run] = f"{name} (as of {commit}{more})"
    return [row | {"row": names.get((row["row"], row["run"]), row["row"])} for row in rows]


# --- Answers to questions

def outcomes(rows):
    """
    {task: {seed: the outcome of each question, 1.0 right, 0.0 wrong}} of rows of one name and one
    length. Raises ValueError where answers are not as many as the row says.
    """
    found = {}
    for row in rows:
        answers = np.array([float(answer) for answer in row["answers"]])
        if (len(answers), answers.sum()) != (int(row["n"]), int(row["right"])):
            raise ValueError(f"{row['row']}, seed {row['seed']}, {row['task']}, {row['length']}: "
                             f"the answers are not {row['right']} right ones of {row['n']}")
        found.setdefault(row["task"], {})[row["seed"]] = answers
    return found


def over_seeds(seeds):
    """
    The outcome of each question, over the seeds that were asked it, and its weight in the mean: a
    seed that was asked fewer questions has as much weight as another. -> two arrays (n,)
    """
    seeds = list(seeds)
    weights = np.zeros((len(seeds), max(map(len, seeds))))
    right = weights.copy()
    for i, answers in enumerate(seeds):
        weights[i, :len(answers)] = 1 / (len(seeds) * len(answers))
        right[i, :len(answers)] = answers
    weight = weights.sum(axis=0)
    return (weights * right).sum(axis=0) / weight, weight


def variance(outcome, weight, extra):
    """
    Of the mean of outcomes with weights that add up to 1. extra: {outcome: how many} of questions
    that are thought of in addition.
    """
    n = 1 / (weight ** 2).sum()  # so many questions of equal weight would say as much
    outcome = np.append(outcome, list(extra))
    weight = np.append(n * weight, list(extra.values()))
    center = (weight * outcome).sum() / weight.sum()
    return (weight * (outcome - center) ** 2).sum() / weight.sum() ** 2


def interval(variances):
    """Half of the 95% interval of the mean over tasks, in %. variances: of each task's mean."""
    return 100 * NORMAL * math.sqrt(sum(variances)) / len(variances)


def accuracy(rows):
    """
    The Accuracy of the rows of one name at one length. Tasks weigh alike, and so do seeds; a seed
    that was not asked all tasks is in the mean alone. Raises ValueError.
    """
    tasks = outcomes(rows)
    pooled = [over_seeds(seeds.values()) for seeds in tasks.values()]
    means = [(outcome * weight).sum() for outcome, weight in pooled]
    of_seeds = []
    for seed in values(rows, "seed"):
        if all(seed in seeds for seeds in tasks.values()):
            of_seeds.append(100 * mean(seeds[seed].mean() for seeds in tasks.values()))
    half = interval([variance(outcome, weight, EXTRA_ANSWERS) for outcome, weight in pooled])
    return Accuracy(100 * float(np.mean(means)), half, of_seeds)


def task_means(rows):
    """{task: mean over seeds, in %} of the rows of one name at one length. Raises ValueError."""
    return {task: accuracy(select(rows, task=task)).mean for task in values(rows, "task")}


def difference(rows, base):
    """
    The Estimate of the accuracy of rows minus that of base, each the rows of one name at the same
    length, in points, over the tasks of both; None where there are none. Question by question,
    over the first questions, which all were asked, and the seeds of both, if there are any.
    """
    ours, theirs = outcomes(rows), outcomes(base)
    differences = []
    for task in (task for task in ours if task in theirs):
        a, b = ours[task], theirs[task]
        common = [seed for seed in a if seed in b]
        a = [a[seed] for seed in common or a]
        b = [b[seed] for seed in common or b]
        n = min(map(len, a + b))
        differences.append(np.mean([answers[:n] for answers in a], axis=0)
                           - np.mean([answers[:n] for answers in b], axis=0))
    if not differences:
        return None
    variances = [variance(pairs, np.full(len(pairs), 1 / len(pairs)), EXTRA_PAIRS)
                 for pairs in differences]
    return Estimate(100 * mean(pairs.mean() for pairs in differences), interval(variances))


# --- Other figures

def figures(rows):
    """{seed: its figure} of the rows of one name and one measure; None where there is none."""
    return {row["seed"]: float(row["value"]) if row["value"] else None for row in rows}


def figure_difference(rows, base):
    """
    The Estimate of a figure of rows minus that of base, seed by seed where both have seeds, with
    Student's interval from two on; else of their means. None where a figure is missing.
    """
    ours, theirs = figures(rows), figures(base)
    if not ours or not theirs or None in (*ours.values(), *theirs.values()):
        return None
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not pairs:
        return Estimate(mean(ours.values()) - mean(theirs.values()), None)
    half = None
    if len(pairs) > 1:
        student = STUDENT[min(len(pairs) - 1, len(STUDENT)) - 1]
        half = student * stdev(pairs) / math.sqrt(len(pairs))
    return Estimate(mean(pairs), half)
