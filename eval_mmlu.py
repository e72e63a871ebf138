"""
Does the memory do harm? Accuracy on MMLU (Hendrycks et al. 2021, arXiv 2009.03300): knowledge of 57
subjects, asked in questions with four choices.

    python eval_mmlu.py out/smollm2 out/trained --mmlu_dir=data    # the original's unpacked archive
    python eval_mmlu.py out/smollm2 --mmlu_dir=mmlu --paper        # Parquet files as in cais/mmlu
    python eval_mmlu.py out/smollm2 --subjects=anatomy,virology --n_questions=20   # a quick look
    python eval_mmlu.py out/smollm2 --cloze     # the answers' texts instead of their letters

Without --mmlu_dir the archive is fetched into data/mmlu; where it cannot be reached, the questions
that lm-eval's prompts carry, and the table says so. Remove data/mmlu to try again.

Prompts are the original's: a heading, five questions with answers, the question. The likeliest of
" A", " B", " C", " D" counts as the answer; with --cloze the likeliest text, per byte.

The table has the columns of the paper's Table 2 (arXiv 2502.06049), with 95% Wilson intervals.
`average` is the mean of the eight columns, as it is in the paper; `all questions` is what the
original program reports, the share of all questions that are answered right.

--out_dir gets results.csv, to which rows are added and none is dropped, and results.json with the
same. What a row answers is not asked again: a stopped evaluation goes on.
"""
import sys
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data.babilong import parse_list
from data.files import sha256_of, write_json
from data.mmlu import SUBJECTS, Item, find_exam, make_prompt
from data.tokenizer import check_text, prompt_ids
from eval_babilong import check_runs, choose_dtype, folder_name, sha256_of_questions
from lib import checkpoint, results
from lib.config import at_least, parse, user_errors
from lib.device import autocast, pick_device
from lib.mmlu_table import COLUMNS, make_table
from lib.origin import origin
from lm2 import wide

MOST_SHOTS = 5            # MMLU has so many dev questions of each subject
TOKENS_AT_ONCE = 1024     # of a prompt, so that a long one needs no more memory


@dataclass
class MMLUConfig:
    runs: list = field(default_factory=list)  # folders of the runs to evaluate
    # questions
    mmlu_dir: str = ""            # folder of MMLU's files, "": data/mmlu, which is fetched
    subjects: str = ""            # as in anatomy,virology; "": all
    n_questions: int = 0          # of each subject the first so many, 0: all
    shots: int = 5                # questions with answers before each one
    cloze: bool = False           # score the answers' texts, and do not show the choices
    # machine
    device: str = "auto"          # auto, cpu, cuda, cuda:N or mps
    dtype: str = "auto"           # auto (that of earlier results, or the faster), float32, bfloat16
    # output
    paper: bool = False           # the paper's rows beside ours
    out_dir: str = "out/eval_mmlu"  # folder of the results

    def __post_init__(self):
        check_runs(self.runs, "python eval_mmlu.py out/smollm2")
        at_least(self, 0, "n_questions", "shots")
        if self.shots > MOST_SHOTS:
            raise ValueError(f"shots={self.shots} must be at most {MOST_SHOTS}")
        self.named  # raises for subjects that are not known

    @property
    def named(self):
        """The subjects in --subjects, [] for all. Raises ValueError."""
        found = parse_list("subjects", self.subjects) if self.subjects else []
        for subject in found:
            if subject not in SUBJECTS:
                near, = get_close_matches(subject, SUBJECTS, n=1, cutoff=0)
                raise ValueError(f"subject {subject} in subjects={self.subjects} is not known: "
                                 f"did you mean {near}?")
        return found


# --- Questions and prompts

def choose_items(config, exam):
    """{subject: Items to ask}. Raises ValueError where the exam lacks something."""
    missing = [subject for subject in config.named if not exam.questions.get(subject)]
    if missing:
        raise ValueError(f"{exam.source} has no questions of {missing[0]}: leave it out")
    found = {}
    for subject in config.named or sorted(exam.questions):
        questions = exam.questions[subject][:config.n_questions or None]
        found[subject] = [Item(exam.shots_of(subject, number, config.shots), question)
                          for number, question in enumerate(questions)]
    return found


def n_common(lists):
    """With how many equal elements lists begin."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*lists)))


def encode(tokenizer, prompt, continuations):
    """
    Token ids of a prompt, and of each continuation. They are encoded together: where a tokenizer
    joins the end of the prompt with what follows, that token is part of what follows.
    """
    whole = [prompt_ids(tokenizer, prompt + continuation) for continuation in continuations]
    n = n_common([prompt_ids(tokenizer, prompt), *whole])
    return whole[0][:n], [ids[n:] for ids in whole]


# --- Likelihoods

def expand(state, n):
    """A State of one sequence as that of n sequences, without copies."""
    if isinstance(state, torch.Tensor):
        return state.expand(n, *state.shape[1:])
    if isinstance(state, (list, tuple)):
        parts = [expand(part, n) for part in state]
        return state._make(parts) if hasattr(state, "_make") else parts
    return state  # a position, or None in a block without memory


def feed(model, ids, state=None):
    """Put ids, one or more, through the model -> features of the last (1, D), the State after."""
    idx = torch.tensor([ids], device=model.head.weight.device)
    for piece in idx.split(TOKENS_AT_ONCE, dim=1):
        x, state = model.features(piece, state)
    return x[:, -1], state


def log_likelihoods(model, x, state, continuations):
    """
    The logarithm of each continuation's probability, a list. x (1, D): features of the token before
    them; state: after it; continuations: lists of ids.
    """
    device, n = x.device, len(continuations)
    targets = pad_sequence([torch.tensor(ids, device=device) for ids in continuations],
                           batch_first=True, padding_value=-1)          # (n, L)
    features = x.expand(n, 1, -1)
    if targets.size(1) > 1:
        given = targets[:, :-1].clamp(min=0)  # what is padded comes last: nothing else sees it
        more, _ = model.features(given, expand(state, n))
        features = torch.cat((features, more), dim=1)                   # (n, L, D)
    with torch.autocast(device.type, enabled=False):  # in bfloat16 answers would be equally likely
        logits = model.head(wide(features))                             # (n, L, vocab_size)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1,
                             reduction="none")
    return (-losses.view(n, -1).sum(dim=1)).tolist()


@torch.inference_mode()
def score(model, tokenizer, prompts):
    """
    For each (prompt, continuations) the log-likelihoods of its continuations, a list. The tokens
    with which all prompts begin, such as heading and shots, go through the model once.
    """
    encoded = [encode(tokenizer, *prompt) for prompt in prompts]
    shortest = min(len(ids) for ids, _ in encoded)
    shared = min(n_common([ids for ids, _ in encoded]), shortest - 1)  # a token is left to each
    state = feed(model, encoded[0][0][:shared])[1] if shared else None
    for ids, continuations in encoded:
        x, after = feed(model, ids[shared:], state)
        yield log_likelihoods(model, x, after, continuations)


def evaluate(run, subject, items, cloze, bar):
    """Ask a Run all Items of a subject -> "0110", in their order: 1 where it answers right."""
    prompts, answers = [make_prompt(subject, item, cloze) for item in items], ""
    found = score(run.model, run.tokenizer, prompts)
    for item, (_, continuations), values in zip(items, prompts, found):
        if cloze:  # per byte, since a long text is less likely than a short one
            values = [v / len(text.encode()) for v, text in zip(values, continuations)]
        answers += "1" if values.index(max(values)) == item.question.answer else "0"
        bar.update()
    return answers


# --- The program

class Run(NamedTuple):
    """A trained model, and what belongs to it."""
    model: torch.nn.Module
    tokenizer: object
    about: dict  # columns of results.csv


def load_run(folder, device):
    """The Run of a folder. Raises ValueError, OSError."""
    model, tokenizer, _ = checkpoint.load(folder, device)
    return Run(model, tokenizer, {"run": folder_name(folder),
                                  "checkpoint_sha256": sha256_of(Path(folder) / "best.pt")})


def check_characters(run, subject, items, cloze):
    """Raises ValueError where a run's tokenizer lacks a character of what it is asked."""
    characters = set()
    for item in items:
        prompt, continuations = make_prompt(subject, item, cloze)
        characters.update(prompt, *continuations)
    try:
        check_text(run.tokenizer, "".join(characters))
    except ValueError as e:
        raise ValueError(f"{run.about['run']}, {subject}: {e}") from None


def main():
    config, _ = parse(MMLUConfig, __doc__)
    out_dir = Path(config.out_dir)
    store = out_dir / "results.csv"
    with user_errors():  # what can go wrong is found here, before hours of work
        device = pick_device(config.device)
        rows = results.load(store, COLUMNS)
        if store.with_suffix(".json").exists() and not store.exists():
            raise ValueError(f"{store.with_suffix('.json')} is there without its results.csv: "
                             "move it away, too, or use another --out_dir")
        dtype = choose_dtype(config, device, rows)
        runs = [load_run(folder, device) for folder in config.runs]
        exam = find_exam(config.mmlu_dir, config.mmlu_dir and folder_name(config.mmlu_dir))
        items = choose_items(config, exam)
        asked = {subject: {"source": exam.source, "subject": subject, "n": len(some),
                           "questions_sha256": sha256_of_questions(some),
                           "shots": config.shots, "cloze": config.cloze}
                 for subject, some in items.items()}
        todo = [(subject, run, run.about | {"dtype": dtype} | asked[subject])
                for subject in items for run in runs]
        todo = [work for work in todo if not results.answered(rows, work[-1])]
        for subject, run, _ in todo:
            check_characters(run, subject, items[subject], config.cloze)
        checkpoint.make_folder(out_dir)

    with user_errors(OSError):
        try:
            n = sum(key["n"] for *_, key in todo)
            with tqdm(total=n, unit="question", disable=not todo) as bar:
                for subject, run, key in todo:
                    bar.set_postfix_str(f"{run.about['run']} {subject}")
                    with autocast(dtype, device):
                        answers = evaluate(run, subject, items[subject], config.cloze, bar)
                    found = {"right": answers.count("1"), "answers": answers}
                    results.add(store, key | found | origin(device), COLUMNS)
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            sys.exit(130)

    with user_errors():
        rows = results.load(store, COLUMNS)
        write_json(store.with_suffix(".json"), rows)
        rows = [row for row in rows if any(key.items() <= row.items() for key in asked.values())]
        print(f"{make_table(rows, config.paper)}\n")
        print(f"{store}, {store.with_suffix('.json')}")


if __name__ == "__main__":
    main()
