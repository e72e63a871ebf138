"""
Does the memory work? Accuracy on BABILong (Kuratov et al. 2024, arXiv 2406.10149): bAbI's facts hidden in a long text.

    python eval_babilong.py out/lm2 out/rmt out/vanilla --tasks=qa1,qa2 --lengths=0k,1k,4k --n_samples=100
    python eval_babilong.py out/vanilla_full --rag=10                 # the RAG baseline: the 10 sentences nearest to the question
    python eval_babilong.py out/lm2 --lengths=64k --gate_sharpness=2  # a memory that fades less than it did in training
    python eval_babilong.py out/lm2 --lengths=0k --babi_dir=tasks_1-20_v1-2/en
    python eval_babilong.py out/lm2 --babilong_dir=babilong/data

Prints a table for each length and writes results.csv, results.json and babilong.png into --out_dir. What stands in results.json is
not evaluated again: an interrupted evaluation goes on, and further models, tasks and lengths join the tables.
"""
import csv
import hashlib
import json
import math
import random
import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

from data.babi import LABELS, TASKS, Line, read_babi, simulate
from data.babilong import (
    Haystack,
    encode_line,
    evaluation_sample,
    find_file,
    is_correct,
    parse_length,
    read_babilong,
    samples,
    split_sentences,
)
from data.curriculum import parse_tasks
from data.files import atomic_open, write_json
from data.text import read_text, split
from lib import checkpoint
from lib.config import parse, user_errors
from lib.device import autocast, pick_device, pick_dtype

PAPER = Path(__file__).parent / "data" / "paper_babilong.csv"  # Table 1 of the LM2 paper, arXiv 2502.06049
ANSWER_TOKENS = 24  # the longest answer, three objects and a full stop, even if every letter were a token


@dataclass
class EvalConfig:
    runs: list = field(default_factory=list)  # folders of the runs to evaluate
    tasks: str = ",".join(TASKS)   # tasks, as in qa1,qa2
    lengths: str = "0k,1k,2k,4k"   # lengths in tokens, as in 0k,512,1k,128k,1M; 0k is the bare story
    n_samples: int = 100           # questions of each task and length
    rag: int = 0                   # K: instead of the whole context, the model sees the K sentences nearest to the question
    gate_sharpness: float = 1.0    # lm2: times the logits of the input and forget gates; above 1 the memory fades less
    babi_dir: str = ""             # folder of bAbI v1.2 files: their questions instead of simulated ones
    babilong_dir: str = ""         # folder of BABILong's records: their questions and contexts instead of simulated ones
    paper: bool = False            # the paper's rows beside ours
    out_dir: str = "out/babilong"  # folder of the results
    batch_size: int = 8            # contexts read at once
    seed: int = 1337               # of the stories and of the text around them
    device: str = "auto"           # auto, cpu, cuda, cuda:N or mps
    dtype: str = "auto"            # auto (the faster), float32 or bfloat16

    def __post_init__(self):
        if not self.runs:
            raise ValueError("runs is empty: name the folder of at least one run, as in python eval_babilong.py out/lm2")
        for name in ("n_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("rag", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 < self.gate_sharpness < math.inf:
            raise ValueError(f"gate_sharpness={self.gate_sharpness} must be above 0, and finite")
        if self.babi_dir and self.babilong_dir:
            raise ValueError("babi_dir and babilong_dir exclude each other: choose one")
        parse_tasks(self.tasks)
        for length in self.lengths.split(","):
            parse_length(length)


def questions(config, task, length):
    """The Samples of a task: simulated, or from real files. The same ones for every model."""
    rng = random.Random(f"evaluation {config.seed} {task} {length}")
    if config.babilong_dir:
        found = read_babilong(find_file(config.babilong_dir, task, length))
    elif config.babi_dir:
        found = [sample for story in read_babi(find_file(config.babi_dir, task)) for sample in samples(story)]
    else:
        return [rng.choice(samples(simulate(task, rng))) for _ in range(config.n_samples)]
    return rng.sample(found, min(config.n_samples, len(found)))


def bm25(sentences, question, k1=1.5, b=0.75):
    """Okapi BM25 of each sentence for a question (Robertson and Zaragoza 2009): an array of scores."""
    words = [Counter(re.findall(r"\w+", sentence.lower())) for sentence in sentences]
    sizes = np.array([sum(w.values()) for w in words], dtype=float)
    scores = np.zeros(len(sentences))
    for word in set(re.findall(r"\w+", question.lower())):
        counts = np.array([w[word] for w in words], dtype=float)
        idf = math.log(1 + (len(words) - (counts > 0).sum() + 0.5) / ((counts > 0).sum() + 0.5))
        scores += idf * counts * (k1 + 1) / (counts + k1 * (1 - b + b * sizes / sizes.mean()))
    return scores


def retrieve(ids, sample, k, tokenizer):
    """The prompt of the RAG baseline: the k sentences of a context nearest to the question, in original order, then the question."""
    question = encode_line(Line(sample.question), tokenizer)[0]
    sentences = split_sentences(tokenizer.decode(ids[:len(ids) - len(question)].tolist()))
    nearest = np.sort(np.argsort(-bm25(sentences, sample.question), kind="stable")[:k])
    return np.array(tokenizer.encode("".join(f" {sentences[i]}" for i in nearest) + f" {sample.question}"))


def prompts(config, task, length, haystack, tokenizer):
    """Samples of a task and the token ids that the model reads for each."""
    rng = np.random.default_rng([config.seed, *length.encode()])
    for sample in questions(config, task, length):
        ids = evaluation_sample(sample, 0 if config.babilong_dir else parse_length(length), haystack, tokenizer, rng)
        yield sample, retrieve(ids, sample, config.rag, tokenizer) if config.rag else ids


def write_answers(model, tokenizer, ids):
    """ids (B, L) -> what the model writes behind each row, greedily, to its first full stop."""
    texts = [""] * len(ids)
    for token in model.stream(ids, ANSWER_TOKENS, temperature=0):
        texts = [text + ("" if "." in text else tokenizer.decode([t])) for text, t in zip(texts, token.tolist())]
        if all("." in text for text in texts):
            break
    return texts


def evaluate(config, task, length, model, tokenizer, haystack, bar):
    """-> number of questions, number of right answers. Rows of equal length are read together, batch_size at a time."""
    device, n, right, waiting = next(model.parameters()).device, 0, 0, {}

    def answer(group):
        nonlocal n, right
        ids = torch.from_numpy(np.stack([ids for _, ids in group]).astype(np.int64)).to(device)
        for (sample, _), text in zip(group, write_answers(model, tokenizer, ids)):
            n, right = n + 1, right + is_correct(text, sample.answer, sample.question, LABELS[task])
            bar.update()

    for sample, ids in prompts(config, task, length, haystack, tokenizer):
        group = waiting.setdefault(len(ids), [])
        group.append((sample, ids))
        if len(group) == config.batch_size:
            answer(waiting.pop(len(ids)))
    for group in waiting.values():
        answer(group)
    return n, right


@torch.no_grad()
def sharpen_gates(model, factor):
    """
    Multiply the logits of the input and forget gates (Eq. 4-5). A number of the bank that keeps 99.9% a segment, enough for the few dozen
    segments of training, keeps 14% over the two thousand of 128k tokens; with twice the logit it keeps 99.9999% a segment, 99.8% over all.
    """
    for bank in (block.memory for block in model.blocks if block.memory):
        for p in (*bank.w_in.parameters(), *bank.w_forget.parameters()):
            p.mul_(factor)


def describe(run, config):
    """A run's model, tokenizer, haystack of the text that training never saw, and what results.json says of it."""
    model, tokenizer, saved = checkpoint.load(run, config.device)
    if config.gate_sharpness != 1:
        if model.config.memory != "lm2":
            raise ValueError(f"{run} has memory={model.config.memory}, which has no gates: leave out --gate_sharpness={config.gate_sharpness:g}")
        sharpen_gates(model, config.gate_sharpness)
    if saved["train"]["dataset"] != "babilong":
        raise ValueError(f"{run} was trained on {saved['train']['dataset']}: train it with --dataset=babilong")
    text, sha, _, _ = read_text(saved["train"]["corpus"])
    if sha != saved["data"]["sha256"]:
        raise ValueError(f"the text {saved['train']['corpus']} is not the one {run} was trained on: its sha256 is not {saved['data']['sha256'][:12]}")
    about = {"checkpoint_sha256": hashlib.sha256((Path(run) / "best.pt").read_bytes()).hexdigest(), "parameters": saved["parameters"],
             "trained_on": saved["train"]["tasks"], "corpus": saved["data"]["source"], "corpus_sha256": sha}
    return model, tokenizer, Haystack(split(text)[1], tokenizer), about


def commit():
    """The commit of this code, or "unknown" outside of git."""
    found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def average(cells):
    """cells {task: (n, right)} -> mean accuracy over the tasks in %, half its 95% interval (normal, each p as Agresti and Coull)."""
    shrunk = [((right + 2) / (n + 4), n + 4) for n, right in cells.values()]
    return (100 * sum(right / n for n, right in cells.values()) / len(cells),
            196 * math.sqrt(sum(p * (1 - p) / n for p, n in shrunk)) / len(cells))


def rows_by_length(results, paper):
    """{length: [(model, {task: % right}, average, half interval or None)]}, shortest first; paper: with the paper's rows."""
    tables = {}
    for name, run in results["runs"].items():
        for length, cells in run["cells"].items():
            tables.setdefault(length, []).append((name, {t: 100 * right / n for t, (n, right) in cells.items()}, *average(cells)))
    tables = dict(sorted(tables.items(), key=lambda item: parse_length(item[0])))
    if paper:
        with open(PAPER, newline="") as f:
            for row in csv.DictReader(f):
                for length, rows in tables.items():
                    if row["length"] == length or row["length"] == ">=8k" and parse_length(length) >= 8000:
                        accuracy = {task: float(row[task]) for task in TASKS if any(task in ours for _, ours, _, _ in rows)}
                        rows.append((f"paper: {row['model']}", accuracy, sum(accuracy.values()) / len(accuracy), None))
    return tables


def markdown(tables):
    """One table for each length, in the paper's layout: a row per model, a column per task, the average with its 95% interval."""
    lines = []
    for length, rows in tables.items():
        tasks = [task for task in TASKS if any(task in accuracy for _, accuracy, _, _ in rows)]
        lines += [f"| {length} | {' | '.join(tasks)} | avg |", "| --- |" + " ---: |" * (len(tasks) + 1)]
        for name, accuracy, mean, half in rows:
            numbers = [f"{accuracy[task]:.0f}" if task in accuracy else "" for task in tasks]
            lines.append(f"| {name} | {' | '.join(numbers)} | {mean:.1f}{'' if half is None else f' ± {half:.1f}'} |")
        lines.append("")
    return "\n".join(lines)


def write_files(folder, results, tables):
    """results.csv (a row per model, length and task) and babilong.png (accuracy over length, a line per model)."""
    with atomic_open(folder / "results.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(("model", "length", "task", "n", "right", "accuracy"))
        for name, run in results["runs"].items():
            for length, cells in run["cells"].items():
                writer.writerows((name, length, task, n, right, right / n) for task, (n, right) in cells.items())
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in dict.fromkeys(row[0] for rows in tables.values() for row in rows):
        points = [(place, row[2], row[3] or 0) for place, rows in enumerate(tables.values()) for row in rows if row[0] == name]
        x, y, half = zip(*points)
        axes.errorbar(x, y, yerr=half, marker="o", ms=3, capsize=2, label=name, ls=":" if name.startswith("paper") else "-")
    axes.set(xticks=range(len(tables)), xticklabels=tables, ylim=(0, 102), xlabel="length of the context, tokens", ylabel="accuracy, % (average over tasks)")
    axes.legend(fontsize="small")
    with atomic_open(folder / "babilong.png") as f:
        figure.savefig(f, dpi=120, format="png")
    plt.close(figure)


def load_results(path, config, source):
    """results.json, or an empty one. Raises ValueError where it holds other questions."""
    if not path.exists():
        return {"source": source, "seed": config.seed, "runs": {}}
    try:
        results = json.loads(path.read_text())
        found = {key: results[key] for key in ("source", "seed", "runs")}
    except (ValueError, KeyError):
        raise ValueError(f"{path} is damaged: delete it, or use another --out_dir") from None
    for key, wanted in (("source", source), ("seed", config.seed)):
        if found[key] != wanted:
            raise ValueError(f"{path} holds answers for {key}={found[key]}, not {wanted}: use another --out_dir")
    return found


def main():
    config, _ = parse(EvalConfig, __doc__)
    tasks, lengths, out_dir = config.tasks.split(","), config.lengths.split(","), Path(config.out_dir)
    source = config.babi_dir or config.babilong_dir or "simulated"
    with user_errors():
        device = pick_device(config.device)
        context = autocast(pick_dtype(config.dtype, device), device)
        results = load_results(out_dir / "results.json", config, source)
        runs = {}
        for run in config.runs:
            name = Path(run).name + (f" + RAG ({config.rag} sentences)" if config.rag else "")
            name += f" + gates x {config.gate_sharpness:g}" if config.gate_sharpness != 1 else ""
            if name in runs:
                raise ValueError(f"two runs are named {name}: the folders need different names")
            runs[name] = describe(run, config)
        for task in tasks:
            for length in lengths:
                questions(config, task, length)  # a file that is missing or malformed is told before hours of work
        checkpoint.make_folder(out_dir)
    for name, (model, tokenizer, haystack, about) in runs.items():
        if results["runs"].get(name, {}).get("checkpoint_sha256") != about["checkpoint_sha256"]:
            results["runs"][name] = {"cells": {}}
        run = results["runs"][name]
        run |= about | {"commit": commit()}
        todo = [(length, task) for length in lengths for task in tasks
                if run["cells"].get(length, {}).get(task, [0])[0] < (config.n_samples if source == "simulated" else 1)]
        with tqdm(total=len(todo) * config.n_samples, unit="question", desc=name) as bar, context, torch.no_grad():
            for length, task in todo:
                cell = evaluate(config, task, length, model, tokenizer, haystack, bar)
                run["cells"].setdefault(length, {})[task] = cell
                write_json(out_dir / "results.json", results)
    tables = rows_by_length(results, config.paper)
    write_files(out_dir, results, tables)
    print(markdown(tables))
    print(f"{out_dir}/results.json, {out_dir}/results.csv, {out_dir}/babilong.png")


if __name__ == "__main__":
    main()
