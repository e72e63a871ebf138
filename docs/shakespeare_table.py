"""
The Shakespeare table, trained from nothing: python docs/shakespeare_table.py

Trains config/shakespeare_nanogpt.toml with and without memory, three seeds each, and prints a
Markdown table. The seconds are those of the whole command, start, evaluations and sample included.
Finished runs lie in out/table and are not repeated; a run that was not finished begins anew.
"""
import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (1, 2, 3)
ROWS = {"LM2": "lm2", "the same without memory": "none"}  # of the table: the flag --memory


def train(memory, seed):
    """Train, unless it was done before -> the folder of the run."""
    out_dir = ROOT / "out" / "table" / f"{memory}-{seed}"
    done = out_dir / "seconds"
    if done.exists():
        return out_dir
    start = time.time()
    command = [sys.executable, "train.py", "--config=config/shakespeare_nanogpt.toml",
               f"--memory={memory}", f"--seed={seed}", f"--out_dir={out_dir}", "--overwrite"]
    finished = subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
    if finished.returncode:  # it said why
        sys.exit(finished.returncode)
    done.write_text(str(time.time() - start))
    return out_dir


def last_row(out_dir):
    """The last row of a run's log, with its evaluation."""
    with open(out_dir / "log.csv", newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))[-1]


def main():
    lines = ["| model | parameters | validation loss | each seed | as one stream | seconds |",
             "| --- | ---: | ---: | --- | ---: | ---: |"]
    for name, memory in ROWS.items():
        runs = [train(memory, seed) for seed in SEEDS]
        rows = [last_row(run) for run in runs]
        val_losses = [float(row["val_loss"]) for row in rows]
        stream_loss = mean(float(row["stream_loss"]) for row in rows)
        seconds = mean(float((run / "seconds").read_text()) for run in runs)
        about = json.loads((runs[0] / "config.json").read_text(encoding="utf-8"))
        each = " ".join(f"{loss:.3f}" for loss in val_losses)
        lines.append(f"| {name} | {about['parameters']:,} | {mean(val_losses):.3f} | {each} "
                     f"| {stream_loss:.3f} | {seconds:.0f} |")
    data = about["data"]
    print("\n".join(lines))
    print(f"\nText: {data['source']} (sha256 {data['sha256'][:12]}), "
          f"{data['tokens']['train']:,} training characters.")


if __name__ == "__main__":
    main()
