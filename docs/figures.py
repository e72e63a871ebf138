"""
Draw the figures of README and docs anew, from the CSV files in results/:

    python -m docs.figures

compare.py draws those of the experiments that it measures. docs/look.png is of a run of qa1 with
seed 1: python look.py out/qa1 --task=qa1 --length=4k --seed=3 --out_dir=docs
"""
from dataclasses import dataclass
from pathlib import Path

from lib import experiment, tables
from lib.config import parse, user_errors
from lib.figure import plot
from lib.measured import read_results


@dataclass
class FiguresConfig:
    out: str = "results"  # folder of the pictures


def main():
    config, _ = parse(FiguresConfig, __doc__)
    with user_errors():
        for name in tables.experiments():
            title = experiment.load(tables.ROOT / "experiments" / f"{name}.toml").title
            path = Path(config.out) / f"{name}.png"
            plot(read_results(tables.ROOT / "results" / f"{name}.csv"), path, title)
            print(path)


if __name__ == "__main__":
    main()
