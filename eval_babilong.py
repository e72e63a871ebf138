"""
Does the memory work? Accuracy on BABILong (Kuratov et al. 2024, arXiv 2406.10149): bAbI's facts
hidden in a long text, and a question at its end.

    python eval_babilong.py out/lm2 out/rmt --tasks=qa1,qa2 --lengths=0k,1k,4k --n_samples=100
    python eval_babilong.py out/full --rag=10           # the 10 sentences nearest to the question
    python eval_babilong.py out/lm2 --corpus=book.txt --count=gpt2   # in a book, GPT-2's tokens
    python eval_babilong.py out/lm2 --lengths=0k --babi_dir=tasks_1-20_v1-2/en
    python eval_babilong.py out/lm2 --babilong_dir=babilong/data

Prints a table for each length, and writes results.csv and babilong.png into --out_dir. Rows are
added to results.csv as they are found, and none is dropped. What a row answers is not asked again:
an interrupted evaluation goes on, and further runs, tasks and lengths join the tables.
"""
import hashlib
import json
import os
import random
import sys
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from baselines.rag import nearest_sentences
from data.babi import LABELS, TASKS, read_babi, simulate
from data.babilong import (
    ANSWER_TOKENS,
    Haystack,
    find_file,
    hide_question,
    is_correct,
    parse_length,
    parse_lengths,
    parse_tasks,
    questions_of,
    read_babilong,
    split_sentences,
)
from data.files import sha256_of
from data.text import read_text, split
from data.tokenizer import GPT2Tokenizer, check_text, decode_inside, encode_inside
from lib import checkpoint, results
from lib.config import at_least, parse, user_errors
from lib.device import autocast, pick_device, pick_dtype
from lib.origin import device_name, origin


@dataclass
class EvalConfig:
    runs: list = field(default_factory=list)  # folders of the runs to evaluate
    # questions
    tasks: str = ",".join(TASKS)  # tasks, as in qa1,qa2
    lengths: str = "0k,1k,2k,4k"  # in tokens, as in 0k,512,1k,128k,1M; 0k is the bare story
    count: str = "own"            # whose tokens: own, those of the run, or gpt2, as in BABILong
    corpus: str = ""              # text to hide facts in, as in train.py; "": the run's, unseen 10%
    n_samples: int = 100          # questions of each task and length
    seed: int = 1337              # of the stories and of the text around them
    babi_dir: str = ""            # folder of bAbI v1.2 files, to ask their questions
    babilong_dir: str = ""        # folder of BABILong's records, to ask theirs in their contexts
    # answers
    rag: int = 0                  # K: the model sees only the K sentences nearest to the question
    # machine
    batch_size: int = 8           # contexts read at once
    device: str = "auto"          # auto, cpu, cuda, cuda:N or mps
    dtype: str = "auto"           # auto (that of earlier results, or the faster), float32, bfloat16
    # output
    paper: bool = False           # the paper's rows beside ours
    out_dir: str = "out/eval_babilong"  # folder of the results

    def __post_init__(self):
        check_runs(self.runs, "python eval_babilong.py out/lm2")
        at_least(self, 1, "n_samples", "batch_size")
        at_least(self, 0, "rag", "seed")
        if self.count not in ("own", "gpt2"):
            raise ValueError(f"count={self.count} is not known: use own or gpt2")
        if self.babi_dir and self.babilong_dir:
            raise ValueError("babi_dir and babilong_dir exclude each other: choose one")
        if self.babilong_dir and (self.corpus or self.count != "own"):
            raise ValueError("the records of babilong_dir have their own text and lengths: "
                             "leave out --corpus and --count")
        self.cells  # raises for tasks and lengths that are not known

    @property
    def cells(self):
        """The (length, task) to evaluate. Raises ValueError."""
        tasks = parse_tasks(self.tasks)
        return [(length, task) for length in parse_lengths(self.lengths) for task in tasks]

    @property
    def source(self):
        """Where the questions come from."""
        folder = self.babi_dir or self.babilong_dir
        return folder_name(folder) if folder else "simulated"


def check_runs(runs, example):
    """Raises ValueError where no run is named, or one twice. example: a command that names one."""
    if not runs:
        raise ValueError(f"runs is empty: name at least one, {example}")
    folders = [folder_name(run) for run in runs]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise ValueError(f"the run {twice[0]} is named twice: name it once")


def folder_name(folder):
    """One name for out/lm2, ./out/lm2/ and its absolute path: from the working directory on."""
    path, here = Path(os.path.abspath(folder)), Path.cwd()
    return (path.relative_to(here) if here in path.parents else path).as_posix()


# --- Questions and prompts

def questions(config, task, length):
    """
    The Questions of a task, simulated or from real files, the same for every run. Fewer of them
    are the first of more. Raises ValueError, OSError where a file has none.
    """
    rng = random.Random(f"evaluation {config.seed} {task} {length}")
    if config.babilong_dir:
        found = read_babilong(find_file(config.babilong_dir, task, length))
    elif config.babi_dir:
        stories = read_babi(find_file(config.babi_dir, task))
        found = [question for story in stories for question in questions_of(story)]
    else:
        stories = (simulate(task, rng) for _ in range(config.n_samples))
        return [rng.choice(questions_of(story)) for story in stories]
    rng.shuffle(found)
    return found[:config.n_samples]


def sha256_of_questions(asked):
    """sha256 of Questions: which ones a result is of."""
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def retrieve(ids, question, k, tokenizer):
    """RAG: from a context with its question only the nearest k sentences, and the question."""
    context = tokenizer.decode(ids.tolist()).removesuffix(question.text)
    nearest = nearest_sentences(split_sentences(context), question.text, k)
    text = "".join(f" {sentence}" for sentence in (*nearest, question.text))
    return np.array(encode_inside(tokenizer, text))


def prompts(config, length, asked, run):
    """The token ids that the run reads for each Question."""
    rng = np.random.default_rng([config.seed, *length.encode()])
    hidden_in = 0 if config.babilong_dir else parse_length(length)  # records have their own text
    for question in asked:
        ids = hide_question(question, hidden_in, run.haystack, run.counter, rng)
        if run.counter is not run.tokenizer:
            in_bytes = run.counter.decode_bytes(ids.tolist())
            text = in_bytes.decode(errors="ignore")  # its first letter may be cut in half
            ids = np.array(encode_inside(run.tokenizer, text), dtype=np.int32)
        yield retrieve(ids, question, config.rag, run.tokenizer) if config.rag else ids


# --- Answers

class Run(NamedTuple):
    """A trained model, and what belongs to it."""
    model: torch.nn.Module
    tokenizer: object
    counter: object            # the tokenizer whose tokens lengths are counted in
    haystack: Haystack | None  # None for records, which have their own text
    about: dict                # columns of results.csv


def make_counter(config, tokenizer):
    """The tokenizer that counts the lengths for a run with a tokenizer. Raises ValueError."""
    if config.count == "own":
        return tokenizer
    try:
        return GPT2Tokenizer()
    except ValueError:
        raise ValueError(
            "count=gpt2 needs GPT-2's tokenizer, which cannot be downloaded: go online once, set "
            "TIKTOKEN_CACHE_DIR to a folder that has its files, or use --count=own") from None


def text_around(config, corpus, sha256):
    """
    The text to hide facts in: all of --corpus, or what training never saw of a run's own corpus,
    which had this sha256 -> text, sha256 of the whole corpus; "", "" for records, which have their
    own text. Raises ValueError, OSError.
    """
    if config.babilong_dir:
        return "", ""
    if config.corpus:
        found = read_text(config.corpus, "corpus")
        return found.text, found.sha256
    found = read_text(corpus, "corpus")
    if found.sha256 != sha256:
        raise ValueError(f"corpus={corpus} is not the one of its training: "
                         "bring that one back, name another --corpus, or train again")
    return split(found.text)[1], sha256


def load_run(folder, config, device):
    """The Run of a folder. Raises ValueError, OSError where it cannot be evaluated."""
    model, tokenizer, saved = checkpoint.load(folder, device)
    try:
        train, sha256 = saved["train"], saved["data"]["sha256"]
        dataset, corpus, tasks = (str(train[name]) for name in ("dataset", "corpus", "tasks"))
    except (KeyError, TypeError) as e:
        raise ValueError(f"config.json in {folder} is damaged ({e}): "
                         "copy the whole folder again") from None
    if dataset != "babilong":
        raise ValueError(f"{folder} was trained on {dataset}: train it with --dataset=babilong")
    counter = make_counter(config, tokenizer)
    try:
        text, corpus_sha256 = text_around(config, corpus, sha256)
    except (ValueError, OSError) as e:
        raise ValueError(f"{folder}: {e}") from None
    try:
        check_text(tokenizer, " ".join(text.split()))  # whitespace becomes spaces in a Haystack
        haystack = Haystack(text, counter) if text else None
    except ValueError as e:
        raise ValueError(f"corpus={config.corpus or corpus} for {folder}: {e}") from None
    about = {"run": folder_name(folder), "checkpoint_sha256": sha256_of(Path(folder) / "best.pt"),
             "corpus": config.corpus and folder_name(config.corpus),
             "corpus_sha256": corpus_sha256,
             "parameters": sum(p.numel() for p in model.parameters()), "trained_on": tasks}
    return Run(model, tokenizer, counter, haystack, about)


def answer_to(ids, run):
    """ids (B, L) -> what the run writes behind each row, greedily, to its first full stop."""
    texts = [""] * len(ids)
    for tokens in run.model.stream(ids, ANSWER_TOKENS, temperature=0):
        pieces = [decode_inside(run.tokenizer, [token]) for token in tokens.tolist()]
        texts = [text if "." in text else text + piece for text, piece in zip(texts, pieces)]
        if all("." in text for text in texts):
            break
    return texts


def batches(prompts, batch_size):
    """Prompts of equal length are read together -> lists of at most batch_size (number, ids)."""
    waiting = defaultdict(list)
    for number, ids in enumerate(prompts):
        batch = waiting[len(ids)]
        batch.append((number, ids))
        if len(batch) == batch_size:
            yield waiting.pop(len(ids))
    yield from waiting.values()


def evaluate(config, length, task, asked, run, bar):
    """Ask a run all Questions of a task -> "0110", in their order: 1 where it answers right."""
    answers, device = ["0"] * len(asked), next(run.model.parameters()).device
    for batch in batches(prompts(config, length, asked, run), config.batch_size):
        ids = torch.from_numpy(np.stack([ids for _, ids in batch]).astype(np.int64)).to(device)
        for (number, _), text in zip(batch, answer_to(ids, run)):
            question = asked[number]
            if is_correct(text, question.answer, question.text, LABELS[task]):
                answers[number] = "1"
            bar.update()
    return "".join(answers)


# --- The program

def choose_dtype(config, device, rows):
    """auto is that of the last row from this device: timed anew, the faster could be the other."""
    earlier = [row["dtype"] for row in rows if row["device"] == device_name(device)]
    if config.dtype == "auto" and earlier:
        return earlier[-1]
    return pick_dtype(config.dtype, device)


def key_of(config, run, dtype, length, task, asked):
    """The key of a result, see lib/results.py: who answers, how, and which questions."""
    about = {name: value for name, value in run.about.items() if name in results.KEY}
    return about | {"rag": config.rag, "count": config.count, "dtype": dtype,
                    "source": config.source, "seed": config.seed, "length": length, "task": task,
                    "questions_sha256": sha256_of_questions(asked), "n": len(asked)}


def unanswered(config, runs, dtype, rows):
    """
    Make all questions, and check that each run can read them -> those that no row answers yet, a
    list of (length, task, run, number of questions). Raises ValueError, OSError.
    """
    found = []
    for length, task in config.cells:
        asked = questions(config, task, length)
        for run in runs:
            try:
                for question in asked:
                    check_text(run.tokenizer, " ".join(("", *question.context, question.text)))
            except ValueError as e:
                raise ValueError(f"{run.about['run']}, {task}, {length}: {e}") from None
            if not results.answered(rows, key_of(config, run, dtype, length, task, asked)):
                found.append((length, task, run, len(asked)))
                if n := n_longer(config, length, asked, run):
                    print(f"{run.about['run']}, {task}, {length}: {n} of {len(asked)} stories are "
                          "longer by themselves, and stand alone")
    return found


def n_longer(config, length, asked, run):
    """How many of the Questions have a story of more tokens than the length that is asked for."""
    if config.babilong_dir or not parse_length(length):
        return 0  # these are not mixed with text of ours
    stories = (hide_question(question, 0, None, run.counter, None) for question in asked)
    return sum(len(ids) > parse_length(length) for ids in stories)


def current(rows, config):
    """Of the rows with this call's source and seed, those whose questions are still the same."""
    groups = defaultdict(list)
    for row in rows:
        if (row["source"], row["seed"]) == (config.source, config.seed):
            groups[row["length"], row["task"]].append(row)
    found = []
    for (length, task), group in groups.items():
        most = replace(config, n_samples=max(row["n"] for row in group))
        try:
            made = questions(most, task, length)
        except (ValueError, OSError):  # a file of an earlier call that is no longer there
            continue
        for row in group:
            if row["questions_sha256"] == sha256_of_questions(made[:row["n"]]):
                found.append(row)
    return found


def main():
    config, _ = parse(EvalConfig, __doc__)
    out_dir = Path(config.out_dir)
    store = out_dir / "results.csv"
    with user_errors():  # what can go wrong is found here, before hours of work
        device = pick_device(config.device)
        rows = results.load(store)
        dtype = choose_dtype(config, device, rows)
        runs = [load_run(folder, config, device) for folder in config.runs]
        todo = unanswered(config, runs, dtype, rows)
        checkpoint.make_folder(out_dir)

    with user_errors(OSError):
        try:
            with tqdm(total=sum(n for *_, n in todo), unit="question", disable=not todo) as bar:
                for length, task, run, _ in todo:
                    bar.set_postfix_str(f"{run.about['run']} {length} {task}")
                    asked = questions(config, task, length)
                    with autocast(dtype, device):
                        answers = evaluate(config, length, task, asked, run, bar)
                    key = key_of(config, run, dtype, length, task, asked)
                    right = answers.count("1")
                    found = {"right": right, "answers": answers, "accuracy": right / len(asked)}
                    results.add(store, run.about | key | found | origin(device))
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            sys.exit(130)

    with user_errors():
        rows = current(results.load(store), config)
        tables = results.make_tables(rows, config.n_samples, config.paper)
        print(results.markdown(tables))
        results.plot(tables, out_dir / "babilong.png")
        print(f"{store}, {out_dir / 'babilong.png'}")


if __name__ == "__main__":
    main()
