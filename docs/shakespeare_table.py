"""
The README's Shakespeare table: `python docs/shakespeare_table.py`.

Trains config/shakespeare_nanogpt.toml with and without memory, three seeds each, and prints a Markdown table. The seconds are
those of the whole command, start, evaluations and sample included. Finished runs lie in out/table and are not repeated.
"""
import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).parent.parent
SEEDS = (1, 2, 3)
ROWS = {"LM2": ("lm2", []), "the same without memory": ("none", ["--memory=none"])}  # row of the table: folder of its runs, flags


def run(folder, flags, seed):
    """Train once, unless it was done before -> last row of the log, configuration, seconds."""
    out_dir = ROOT / "out" / "table" / f"{folder}-{seed}"
    if not (out_dir / "seconds").exists():
        start = time.time()
        subprocess.run([sys.executable, "train.py", "--config=config/shakespeare_nanogpt.toml", f"--out_dir={out_dir}", f"--seed={seed}",
                        "--overwrite", *flags], cwd=ROOT, check=True, stdout=sys.stderr)
        (out_dir / "seconds").write_text(str(time.time() - start))
    with open(out_dir / "log.csv", newline="") as f:
        last = list(csv.DictReader(f))[-1]
    return last, json.loads((out_dir / "config.json").read_text()), float((out_dir / "seconds").read_text())


lines = ["| model | parameters | validation loss | each seed | as one stream | seconds |", "| --- | --- | --- | --- | --- | --- |"]
for name, (folder, flags) in ROWS.items():
    logs, configs, seconds = zip(*(run(folder, flags, seed) for seed in SEEDS))
    val, stream = ([float(log[column]) for log in logs] for column in ("val_loss", "stream_loss"))
    lines.append(f"| {name} | {configs[0]['parameters']:,} | {mean(val):.3f} | {' '.join(f'{v:.3f}' for v in val)} "
                 f"| {mean(stream):.3f} | {mean(seconds):.0f} |")
data = configs[0]["data"]
lines += ["", f"Text: {data['source']} (sha256 {data['sha256'][:12]}), {data['tokens']['train']:,} training characters."]
print("\n".join(lines))
