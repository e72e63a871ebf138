"""
The BABILong tables, trained and evaluated from nothing:

    python docs/babilong_table.py qa1    # one task, three seeds
    python docs/babilong_table.py ten    # all ten tasks in one model, from the weights of qa1
    python docs/babilong_table.py long   # from the weights of ten on, to longer texts
    python docs/babilong_table.py gpu    # all ten tasks on a GPU, which the runs share

Trains config/babilong_TABLE.toml as LM2, as RMT and without memory (attention over a window, and
full), one core a run, with as many parameters as LM2 and the same data. Evaluates them, LM2 with
sharper gates as well, and RAG on full attention. Prints accuracy by length; out/TABLE/table.csv
has it by task, in the columns of results/. What is finished lies in out/TABLE and is not repeated.
"""
import csv
import os
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import product
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
PRESET = "config/babilong_{}.toml"
SEEDS = {"qa1": (1, 2, 3), "ten": (1,), "long": (1,), "gpu": (1,)}
BEFORE = {"ten": "qa1", "long": "ten", "gpu": "qa1"}  # whose weights a run begins with
SHARPNESS = {"qa1": 2, "ten": 1.5, "long": 2, "gpu": 2}  # chosen on other stories
# questions of each task by length: long texts take long
ONE_TASK = {"0k,1k,2k,4k": 100, "8k": 50, "16k": 25, "32k,64k,128k": 10}
TEN_TASKS = {"0k,1k,2k,4k": 50, "8k": 20, "16k": 10, "32k": 10, "64k": 5, "128k": 3}
FOR_FULL = ("0k,1k,2k,4k", "8k", "16k")  # full attention is quadratic, it reads no further
NAMES = {"lm2": "LM2", "window": "window", "rmt": "RMT", "full": "full attention"}
FLAGS = {"lm2": [], "window": ["--memory=none"], "rmt": ["--memory=rmt", "--mem_slots=16"],
         "full": ["--memory=none", "--attention=full"]}
KEPT = ("parameters", "length", "task", "commit", "device", "dtype", "torch")  # of results.csv
HALF_THE_STEPS = ["--batch_size=192", "--max_iters=4000", "--eval_iters=2", "--eval_interval=50"]


def call(*args):
    """Run a program of the project on one thread; where it fails, its last line ends this one."""
    done = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        print(done.stderr.strip().split("\n")[-1], file=sys.stderr)
        sys.exit(done.returncode)


def folder_of(table, model, seed):
    return ROOT / "out" / table / f"{model}-{seed}"


def train(table, model, seed, size):
    """
    Train, unless it was done before -> seconds, those of the run whose weights it begins with
    included. size: folder of a run that has as many parameters.
    """
    out_dir = folder_of(table, model, seed)
    done = out_dir / "seconds"
    if done.exists():
        return float(done.read_text())
    before, flags = 0, list(FLAGS[model])
    if model != "lm2":
        flags.append(f"--match_params={size}")
    if table in BEFORE:
        before = train(BEFORE[table], model, seed, size)
        flags.append(f"--init_from={folder_of(BEFORE[table], model, seed)}")
    if (table, model) == ("gpu", "rmt"):
        flags += HALF_THE_STEPS  # on as much data
    stories = seed + 1 if table == "long" else seed  # others than those of ten
    flags += [f"--config={PRESET.format(table)}", f"--out_dir={out_dir}", f"--seed={stories}"]
    start = time.time()
    call("train.py", "--overwrite", *flags)
    done.write_text(str(before + time.time() - start))
    print(f"{out_dir}: trained", file=sys.stderr)
    return float(done.read_text())


def evaluate(table, model, seed, rag=0, gate_sharpness=1):
    """Ask a run the questions of a table -> lines of table.csv. Its answers have a folder."""
    run = folder_of(table, model, seed)
    results = ROOT / "out" / table / "results" / f"{run.name}-rag{rag}-gates{gate_sharpness}"
    tasks = tomllib.loads((ROOT / PRESET.format(table)).read_text())["tasks"]
    questions = ONE_TASK if table == "qa1" else TEN_TASKS
    for lengths, n in questions.items():
        if model != "full" or rag or lengths in FOR_FULL:
            call("eval_babilong.py", str(run), f"--tasks={tasks}", f"--lengths={lengths}",
                 f"--n_samples={n}", f"--rag={rag}", f"--gate_sharpness={gate_sharpness}",
                 f"--out_dir={results}")
    print(f"{results}: evaluated", file=sys.stderr)
    name = f"LM2, gates x {gate_sharpness}" if gate_sharpness != 1 else NAMES[model]
    about = {"experiment": table, "model": "RAG" if rag else name, "seed": seed,
             "minutes": round(float((run / "seconds").read_text()) / 60),
             "command": f"python docs/babilong_table.py {table}"}
    weights = sha256((run / "best.pt").read_bytes()).hexdigest()
    with open(results / "results.csv", newline="", encoding="utf-8") as f:
        rows = [row for row in csv.DictReader(f) if row["checkpoint_sha256"] == weights]
    newest = {(row["length"], row["task"]): row for row in rows}.values()
    return [about | {"questions": row["n"], "accuracy": 100 * int(row["right"]) / int(row["n"])}
            | {column: row[column] for column in KEPT} for row in newest]


def accuracy(lines):
    """Mean over tasks, as mean and deviation over seeds; "" without lines."""
    seeds = dict.fromkeys(line["seed"] for line in lines)
    means = [mean(line["accuracy"] for line in lines if line["seed"] == seed) for seed in seeds]
    spread = f" ± {stdev(means):.0f}" if len(means) > 1 else ""
    return f"{mean(means):.0f}{spread}" if means else ""


def print_table(lines):
    """A row for each model, with its accuracy at each length."""
    lengths = dict.fromkeys(line["length"] for line in lines)
    print(f"| accuracy in % | {' | '.join(lengths)} |\n| --- |" + " ---: |" * len(lengths))
    for model in dict.fromkeys(line["model"] for line in lines):
        own = [line for line in lines if line["model"] == model]
        cells = [accuracy([line for line in own if line["length"] == n]) for n in lengths]
        print(f"| {model} | {' | '.join(cells)} |")


def main():
    if len(sys.argv) != 2 or sys.argv[1] not in SEEDS:
        print(f"error: name the table, one of {', '.join(SEEDS)}", file=sys.stderr)
        sys.exit(2)
    table = sys.argv[1]
    seeds, out = SEEDS[table], ROOT / "out" / table
    size = out / "size"  # LM2's parameters, for the others to match
    config = f"--config={PRESET.format(table)}"
    call("train.py", config, f"--out_dir={size}", "--max_iters=0", "--overwrite")
    runs = list(product([table], NAMES, seeds))
    variants = [(table, "lm2", seed, 0, SHARPNESS[table]) for seed in seeds]
    variants += [(table, "full", seed, 10) for seed in seeds]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda run: train(*run, size), runs))
        lines = sum(pool.map(lambda job: evaluate(*job), runs + variants), [])
    with open(out / "table.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    print_table(lines)
    print(f"\n{out}/table.csv")


if __name__ == "__main__":
    main()
