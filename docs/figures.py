"""
Draw the figures of README and docs anew, from the CSV files in results/:

    python -m docs.figures

compare.py draws those of the experiments that it measures, and docs/look.md says how docs/look.png
was drawn.
"""
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from lib import experiment, tables
from lib.config import parse, user_errors
from lib.figure import plot, plot_bars
from lib.measured import read_log, read_results

CAPABILITIES = {  # as Figure 3 of the paper groups the tasks
    "one fact\nqa1": ["qa1"],
    "two or three facts\nqa2, qa3": ["qa2", "qa3"],
    "relations\nqa4, qa5": ["qa4", "qa5"],
    "yes or no, how many\nqa6 to qa8": ["qa6", "qa7", "qa8"],
    "negation, maybe\nqa9, qa10": ["qa9", "qa10"],
}
LENGTH = "4k"  # of their texts: all models read so far, and the short ones are easy


@dataclass
class FiguresConfig:
    out: str = "results"  # folder of the pictures


def experiments():
    """Names of those in results/ with a TOML file in experiments/: not those of a reader's own."""
    return [name for name in tables.experiments()
            if (tables.ROOT / "experiments" / f"{name}.toml").exists()]


def draw_experiment(name, path):
    """The picture that compare.py draws of an experiment."""
    results = tables.ROOT / "results"
    about = experiment.load(tables.ROOT / "experiments" / f"{name}.toml")
    rows, log = read_results(results / f"{name}.csv"), read_log(results, name)
    plot(rows, path, about.title, log, about.curve)


def draw_capabilities(path):
    """The ten tasks at one length, by what they ask for: a bar for each model."""
    bars = {row: {capability: mean(found[task] for task in tasks)
                  for capability, tasks in CAPABILITIES.items()}
            for row, found in tables.task_means("ten", LENGTH).items()}
    plot_bars(bars, path, "What can a model answer?",
              f"BABILong, ten tasks in one model, at {LENGTH} tokens; mean of a group's tasks")


def main():
    config, _ = parse(FiguresConfig, __doc__)
    with user_errors():
        for name in experiments():
            path = Path(config.out) / f"{name}.png"
            draw_experiment(name, path)
            print(path)
        path = Path(config.out) / "capabilities.png"
        draw_capabilities(path)
        print(path)


if __name__ == "__main__":
    main()
