"""
The README's BABILong tables: `python docs/babilong_table.py qa1` (three seeds) and `python docs/babilong_table.py long` (all ten tasks, one
model; `ten` is the same before its last part of training; `gpu` is all ten tasks where there is a GPU, which the runs share).

Trains config/babilong_qa1.toml (..._ten.toml, ...) as LM2, as RMT and as the decoder without memory (window and full attention), one core
a run, all with as many parameters as LM2 and on the same data; evaluates them, LM2 with sharper gates than in training, and RAG on the
full-attention decoder; prints accuracy by length. A run of ten or gpu begins with the weights of its run of qa1, one of long with those
of its run of ten. Finished runs and answers lie in out/qa1, out/ten and so on and are not repeated.
"""
import json
import os
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parent.parent
SEEDS = {"qa1": (1, 2, 3), "ten": (1,), "long": (1,), "gpu": (1,)}
BEFORE = {"ten": "qa1", "long": "ten", "gpu": "qa1"}  # whose weights a run begins with
QUESTIONS = {"qa1": {"0k,1k,2k,4k": 100, "8k": 50, "16k": 25, "32k,64k,128k": 10},  # of each task, by length: long ones take long
             **dict.fromkeys(("ten", "long", "gpu"), {"0k,1k,2k,4k": 50, "8k": 20, "16k": 10, "32k": 10, "64k": 5, "128k": 3})}
FULL = ("0k,1k,2k,4k", "8k", "16k")  # full attention is quadratic, so it reads no further (RAG does: it shows it ten sentences)
if len(sys.argv) != 2 or sys.argv[1] not in SEEDS:
    print(f"error: name the table: python docs/babilong_table.py {' or '.join(SEEDS)}", file=sys.stderr)
    sys.exit(2)
TABLE = sys.argv[1]
PRESET, OUT = str(ROOT / "config" / "babilong_{}.toml"), ROOT / "out" / TABLE
TASKS = tomllib.loads(Path(PRESET.format(TABLE)).read_text())["tasks"]
MATCH = f"--match_params={OUT}/size"
MODELS = {"LM2": ("lm2", []), "vanilla, window": ("window", ["--memory=none", MATCH]),
          "RMT": ("rmt", ["--memory=rmt", "--mem_slots=16", MATCH]),
          "vanilla, full attention": ("full", ["--memory=none", "--attention=full", MATCH])}
SHARPNESS = {"qa1": 2, "ten": 1.5, "long": 2, "gpu": 2}[TABLE]  # chosen on other stories, see docs/experiments.md
SHARP = f"LM2, gates x {SHARPNESS}"
OTHERWISE = {("gpu", "rmt"): ["--batch_size=192", "--max_iters=4000", "--eval_iters=2", "--eval_interval=50"]}  # as much data, half the updates
VARIANTS = {SHARP: ("lm2", f"--gate_sharpness={SHARPNESS}", f" + gates x {SHARPNESS}"),  # a run, a flag, and what it adds to the run's name
            "RAG on full attention": ("full", "--rag=10", " + RAG (10 sentences)")}


def call(*args):
    """Run a program of the project on one thread; where it fails, its last line ends this one."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr.strip().split("\n")[-1], file=sys.stderr)
        sys.exit(done.returncode)


def train(folder, flags, seed, table=TABLE):
    """Train, unless it was done before -> the seconds it took, those of the run whose weights it began with included."""
    out_dir, before = ROOT / "out" / table / f"{folder}-{seed}", 0
    if not (out_dir / "seconds").exists():
        if table in BEFORE:
            before = train(folder, flags, seed, BEFORE[table])
            flags = [*flags, f"--init_from={ROOT}/out/{BEFORE[table]}/{folder}-{seed}", *OTHERWISE.get((table, folder), [])]
        start, stories = time.time(), seed + (table == "long")  # long: other stories than those of ten
        call("train.py", f"--config={PRESET.format(table)}", f"--out_dir={out_dir}", f"--seed={stories}", "--overwrite", *flags)
        (out_dir / "seconds").write_text(str(before + time.time() - start))
        print(f"{out_dir}: trained", file=sys.stderr)
    return float((out_dir / "seconds").read_text())


def evaluate(folder, seed, *flags):
    """The answers of a run. Each has a folder of its own, so that several are evaluated at once."""
    for lengths, n in QUESTIONS[TABLE].items():
        if folder != "full" or flags or lengths in FULL:
            call("eval_babilong.py", f"{OUT}/{folder}-{seed}", f"--tasks={TASKS}", f"--lengths={lengths}", f"--n_samples={n}",
                 f"--out_dir={OUT}/results/{folder}-{seed}", *flags)
    print(f"{folder}-{seed} {' '.join(flags)}: evaluated", file=sys.stderr)


def results(folder, suffix=""):
    """What results.json says of the run of each seed."""
    return [json.loads((OUT / "results" / f"{folder}-{seed}" / "results.json").read_text())["runs"][f"{folder}-{seed}{suffix}"] for seed in SEEDS[TABLE]]


def percent(cell):
    n, right = cell
    return 100 * right / n


def row(name, folder, suffix=""):
    """A row of the table: parameters, minutes of training, accuracy at each length (average over tasks), mean and deviation over seeds."""
    runs = results(folder, suffix)
    minutes = mean(float((OUT / f"{folder}-{seed}" / "seconds").read_text()) for seed in SEEDS[TABLE]) / 60
    cells = []
    for length in LENGTHS:
        found = [mean(map(percent, run["cells"][length].values())) for run in runs if length in run["cells"]]
        cells.append("" if not found else f"{mean(found):.0f}" + (f" ± {stdev(found):.0f}" if len(found) > 1 else ""))
    return f"| {name} | {runs[0]['parameters']:,} | {minutes:.0f} | {' | '.join(cells)} |"


call("train.py", f"--config={PRESET.format(TABLE)}", f"--out_dir={OUT}/size", "--max_iters=0", "--overwrite")  # LM2's parameters, for the others to match
with ThreadPoolExecutor(os.cpu_count()) as pool:
    list(pool.map(lambda job: train(*MODELS[job[0]], job[1]), [(name, seed) for name in MODELS for seed in SEEDS[TABLE]]))
    list(pool.map(lambda job: evaluate(*job), [(folder, seed) for folder, _ in MODELS.values() for seed in SEEDS[TABLE]]))
    list(pool.map(lambda job: evaluate(*job), [(folder, seed, flag) for folder, flag, _ in VARIANTS.values() for seed in SEEDS[TABLE]]))

LENGTHS = ",".join(QUESTIONS[TABLE]).split(",")
print("\n".join([f"| accuracy in % | parameters | minutes | {' | '.join(LENGTHS)} |", "| --- | ---: | ---: |" + " ---: |" * len(LENGTHS),
                 *(row(name, folder) for name, (folder, _) in MODELS.items()),
                 *(row(name, folder, suffix) for name, (folder, _, suffix) in VARIANTS.items())]))
if TABLE != "qa1":  # and LM2's accuracy task by task
    tasks = TASKS.split(",")
    for name, suffix in (("LM2", ""), (SHARP, VARIANTS[SHARP][2])):
        cells = results("lm2", suffix)[0]["cells"]
        print(f"\n| {name} | {' | '.join(tasks)} | qa1-qa5 | all |\n| --- |" + " ---: |" * (len(tasks) + 2))
        for length in LENGTHS:
            found = [percent(cells[length][task]) for task in tasks]
            print(f"| {length} | {' | '.join(f'{a:.0f}' for a in (*found, mean(found[:5]), mean(found)))} |")
