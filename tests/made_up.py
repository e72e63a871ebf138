"""Rows of results/NAME.csv that nobody measured, for tests of what is made from them."""
from lib.measured import COLUMNS

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def answered(name, seed, answers, task="qa1", length="4k", **more):
    """A row of answers, a text of 0 and 1; more: other columns."""
    right = answers.count("1")
    return cell(name, seed, measure="accuracy", task=task, length=length, n=str(len(answers)),
                right=str(right), answers=answers, value=f"{right / len(answers):.4f}", **more)


def figure(name, seed, value, measure="val_loss", **more):
    """A row of another measure; value: text."""
    return cell(name, seed, measure=measure, value=value, **more)


def cell(name, seed, **more):
    about = {"experiment": "made_up", "row": name, "seed": str(seed), "parameters": "1334400",
             "minutes": "12.0", "run": "aaaaaaaa", "commit": COMMIT, "device": "cpu",
             "dtype": "float32", "torch": "2.13.0"}
    return dict.fromkeys(COLUMNS, "") | about | more
