"""
The table of the claim, for the README: `python docs/qa1_table.py`.

Trains config/babilong_qa1.toml as LM2, as RMT and as the decoder without memory (window and full attention), three seeds each, one core
a run, all with as many parameters as LM2 and on the same data; evaluates them and RAG on the full-attention decoder; prints mean and
standard deviation over the seeds. Finished runs and answers lie in out/qa1 and are not repeated.
"""
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parent.parent
OUT = ROOT / "out" / "qa1"
SEEDS = (1, 2, 3)
MATCH = f"--match_params={OUT}/lm2-1"
MODELS = {"LM2": ("lm2", []), "vanilla, window": ("window", ["--memory=none", MATCH]),
          "RMT": ("rmt", ["--memory=rmt", "--mem_slots=16", MATCH]),
          "vanilla, full attention": ("full", ["--memory=none", "--attention=full", MATCH])}
LENGTHS = {"0k,1k,2k,4k": 100, "8k": 50, "16k": 25}  # and the questions for each


def call(*args):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *args], cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def train(folder, flags, seed):
    """Train, unless it was done before, and keep the seconds it took."""
    out_dir = OUT / f"{folder}-{seed}"
    if (out_dir / "seconds").exists():
        return
    start = time.time()
    call("train.py", "--config=config/babilong_qa1.toml", f"--out_dir={out_dir}", f"--seed={seed}", "--overwrite", *flags)
    (out_dir / "seconds").write_text(str(time.time() - start))
    print(f"{out_dir}: trained", file=sys.stderr)


def evaluate(folder, seed, *flags):
    """The answers of a run. Each has a folder of its own, so that several are evaluated at once."""
    for lengths, n in LENGTHS.items():
        call("eval_babilong.py", f"{OUT}/{folder}-{seed}", "--tasks=qa1", f"--lengths={lengths}", f"--n_samples={n}",
             f"--out_dir={OUT}/results/{folder}-{seed}", *flags)
    print(f"{folder}-{seed} {' '.join(flags)}: evaluated", file=sys.stderr)


def row(name, folder, suffix=""):
    """A row of the table: parameters, minutes of training, and mean and standard deviation of the accuracy at each length."""
    runs = [json.loads((OUT / "results" / f"{folder}-{seed}" / "results.json").read_text())["runs"][f"{folder}-{seed}{suffix}"] for seed in SEEDS]
    minutes = mean(float((OUT / f"{folder}-{seed}" / "seconds").read_text()) for seed in SEEDS) / 60
    accuracy = [[100 * right / n for n, right in (run["cells"][length]["qa1"] for run in runs)] for length in ",".join(LENGTHS).split(",")]
    return f"| {name} | {runs[0]['parameters']:,} | {minutes:.0f} | " + " | ".join(f"{mean(a):.0f} ± {stdev(a):.0f}" for a in accuracy) + " |"


with ThreadPoolExecutor(os.cpu_count()) as pool:
    list(pool.map(lambda job: train(*MODELS[job[0]], job[1]), [(name, seed) for name in MODELS for seed in SEEDS]))
    list(pool.map(lambda job: evaluate(*job), [(folder, seed) for folder, _ in MODELS.values() for seed in SEEDS]))
    list(pool.map(lambda seed: evaluate("full", seed, "--rag=10"), SEEDS))

lengths = ",".join(LENGTHS).split(",")
print("\n".join([f"| qa1, accuracy in % | parameters | minutes | {' | '.join(lengths)} |", "| --- | ---: | ---: |" + " ---: |" * len(lengths),
                 *(row(name, folder) for name, (folder, _) in MODELS.items()),
                 row("RAG on full attention", "full", " + RAG (10 sentences)")]))
