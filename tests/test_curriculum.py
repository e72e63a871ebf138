"""data/curriculum.py: batches of stories, their accuracy, the curriculum of lengths; and training on them."""
import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, TEXT

from baselines.rmt import RMT
from data import tokenizer as tokenizers
from data.babilong import Haystack
from data.curriculum import Stories, answers, tokenizer_text
from data.text import split
from lib import checkpoint
from lm2 import LM2

CONFIG = SimpleNamespace(batch_size=4, n_segments=2, block_size=64, seed=1, eval_iters=2, max_iters=100, advance_at=0.9, rehearse=0.3)
BABILONG = ["--dataset=babilong", "--corpus=play.txt", "--tasks=qa1,qa6", "--lengths=0k,256"]


@pytest.fixture(scope="module")
def stories():
    train, val = split(TEXT)
    tokenizer = tokenizers.build("char", tokenizer_text(TEXT), 0)
    return lambda *lengths: Stories(["qa1", "qa6"], list(lengths), Haystack(train, tokenizer), Haystack(val, tokenizer), tokenizer, {})


class Oracle(torch.nn.Module):
    """A model that knows a share of the answers: the likeliest token is the target in the first rows of a batch only."""

    def __init__(self, n_vocab, share):
        super().__init__()
        self.n_vocab, self.share = n_vocab, share

    def forward(self, x, y):
        known = torch.arange(len(y))[:, None] < self.share * len(y)
        return torch.nn.functional.one_hot(torch.where(known, y.clamp(min=0), 0), self.n_vocab).float(), torch.tensor(0.5), None


def test_batch_is_a_function_of_seed_step_and_part(stories):
    data = stories(512)
    x, y = data.batch(CONFIG, 3, 0)
    assert x.shape == y.shape == (1, 512), "as many tokens as batch_size * n_segments * block_size"
    assert all(torch.equal(a, b) for a, b in zip((x, y), stories(512).batch(CONFIG, 3, 0)))
    assert not torch.equal(x, data.batch(CONFIG, 4, 0)[0]) and not torch.equal(x, data.batch(CONFIG, 3, 1)[0])


def test_curriculum_trains_at_its_length_and_rehearses_the_shorter_ones(stories):
    data = stories(256, 384, 512, 768)
    widths = [data.batch(CONFIG, step, 0)[0].size(1) for step in range(20)]
    assert set(widths) == {256}
    data.place = [2, 0]
    widths = [data.batch(CONFIG, step, 0)[0].size(1) for step in range(200)]
    assert set(widths) == {256, 384, 512} and 0.7 < np.mean(np.array(widths) == 512) < 0.9
    never = SimpleNamespace(**vars(CONFIG) | {"rehearse": 0.0})
    assert {data.batch(never, step, 0)[0].size(1) for step in range(20)} == {512}


@pytest.mark.parametrize("length", [0, 512])
def test_most_stories_ask_at_their_end(stories, length):
    data, found = stories(length), 0
    for step in range(100):
        x, y = data.batch(CONFIG, step, 0)
        *_, last = np.flatnonzero(np.diff((y[0] != -1).int(), prepend=0) == 1)  # where the last answer begins
        found += data.tokenizer.decode(x[0, :last + 1].tolist())[-40:].count("?") > 1  # behind another question
    assert 40 < found < 75, "70% do, and some stories give only one question"


def test_each_task_asks_what_the_others_would_in_training_and_its_own_questions_in_evaluation(stories):
    data, evaluated = stories(512), []
    both = lambda rows: [" Where is " in text and " Is " in text for text in (data.tokenizer.decode(row) for row in rows.tolist())]
    trained = [found for step in range(60) for found in both(data.batch(CONFIG, step, 0)[0])]
    assert 0.5 < np.mean(trained) < 0.8, "the share of stories that ask at their end"

    class Witness(Oracle):
        def forward(self, x, y):
            evaluated.extend(both(x))
            return super().forward(x, y)

    data.evaluate(Witness(data.tokenizer.n_vocab, 1), SimpleNamespace(**vars(CONFIG) | {"eval_iters": 10}), "cpu")
    assert len(evaluated) == 10 and not any(evaluated)


def test_curriculum_moves_on_when_a_length_is_learned_or_its_budget_is_spent(stories):
    data = stories(0, 256, 512)
    assert not data.advance(0, {"accuracy": 1.0}, CONFIG), "nothing was trained yet"
    assert not data.advance(10, {"accuracy": 0.89}, CONFIG)
    assert data.advance(20, {"accuracy": 0.9}, CONFIG) and data.place == [1, 20]
    assert not data.advance(59, {"accuracy": 0.1}, CONFIG)
    assert data.advance(60, {"accuracy": 0.1}, CONFIG) and data.place == [2, 60], "half of the 80 updates that were left"
    assert not data.advance(99, {"accuracy": 1.0}, CONFIG), "the last length stays"


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_accuracy_counts_answers_that_are_right_to_the_last_token(stories, share):
    data = stories(256)
    row = data.evaluate(Oracle(data.tokenizer.n_vocab, share), CONFIG, "cpu")
    assert set(row) == {"length", "val_loss", "accuracy", "qa1", "qa6"} and row["length"] == 256
    assert (row["accuracy"] == share) if share != 0.5 else (0.1 < row["accuracy"] < 0.9)


def test_each_answer_counts_the_same_whatever_its_task(stories, monkeypatch):
    data = stories(256)
    monkeypatch.setattr(data, "draw", lambda *_: (torch.zeros(2, 4, dtype=torch.long), torch.tensor([[1, -1, 1, -1], [-1, -1, 0, -1]]), ["qa1", "qa6"]))
    row = data.evaluate(Oracle(data.tokenizer.n_vocab, 0), CONFIG, "cpu")
    assert (row["qa1"], row["qa6"], row["accuracy"]) == (0, 1, pytest.approx(1 / 3))


def test_answers_are_told_apart():
    y = torch.tensor([[-1, 4, 5, -1, 6, -1], [7, -1, -1, -1, 8, 9]])
    assert answers(torch.tensor([[0, 4, 5, 0, 0, 0], [7, 0, 0, 0, 8, 0]]), y) == [[True, False], [True, False]]


def test_evaluation_hides_facts_in_text_that_training_never_sees(stories):
    data = stories(256)
    train, val = split(TEXT)
    assert train + val == TEXT
    assert data.tokenizer.decode(data.val.ids.tolist()).split() == val.split()
    assert data.tokenizer.decode(data.train.ids.tolist()).split() == train.split()
    data.train = None
    data.evaluate(Oracle(data.tokenizer.n_vocab, 1), CONFIG, "cpu")


def test_training_on_stories_resumes_bit_for_bit_across_a_change_of_length(checkout):
    args = [*BABILONG, "--eval_interval=3", "--advance_at=0", *SMALL]
    run = lambda *more: checkout.run("train.py", *args, *more)
    code, out, err = run("--out_dir=out/stories", "--max_iters=8")
    assert code == 0, err
    assert "step 3: 0 tokens" in out and "step 6: 256 tokens" in out and "(right: " in out
    run("--out_dir=out/stories2", "--max_iters=5", "--lr_decay_iters=8")
    code, _, err = run("--out_dir=out/stories2", "--resume", "--max_iters=8")
    assert code == 0, err
    rows = [list(csv.DictReader(checkout.log(f"out/{name}").splitlines())) for name in ("stories", "stories2")]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert set(rows[0][3]) >= {"length", "accuracy", "qa1", "qa6"}


def test_run_that_ends_does_not_move_on(checkout, call):
    code, out, err = call("train.py", *BABILONG, *SMALL, "--advance_at=0", "--max_iters=1", "--out_dir=out/short", "--overwrite")
    assert code == 0, err
    assert torch.load(checkout.folder / "out/short/ckpt.pt", weights_only=True)["place"] == [0, 0]


def test_of_stories_the_last_step_is_the_best_whatever_its_loss(checkout, call):
    code, _, err = call("train.py", *BABILONG, *SMALL, "--max_iters=2", "--eval_interval=1", "--adam_lr=30", "--out_dir=out/last", "--overwrite")
    losses = [float(row["val_loss"]) for row in csv.DictReader(checkout.log("out/last").splitlines())]
    assert code == 0 and losses[2] > losses[0], err
    assert torch.load(checkout.folder / "out/last/best.pt", weights_only=True)["step"] == 2


@pytest.mark.parametrize("memory", ["rmt", "none"])
def test_match_params_widens_the_mlp_to_the_size_of_a_run(checkout, call, memory):
    code, _, err = call("train.py", *BABILONG, *SMALL, "--n_embd=32", "--max_iters=0", "--out_dir=out/wanted", "--overwrite")
    assert code == 0, err
    code, _, err = call("train.py", *BABILONG, *SMALL, "--n_embd=32", "--max_iters=0", f"--memory={memory}", "--match_params=out/wanted",
                        f"--out_dir=out/as-large-{memory}", "--overwrite")
    assert code == 0, err
    wanted, found = (json.loads((checkout.folder / "out" / name / "config.json").read_text())["parameters"] for name in ("wanted", f"as-large-{memory}"))
    assert abs(found - wanted) <= 0.02 * wanted
    model, _, _ = checkpoint.load(checkout.folder / "out" / f"as-large-{memory}", "cpu")
    assert type(model) is (RMT if memory == "rmt" else LM2)


@pytest.mark.parametrize("flag, message", [
    ("--tasks=qa1,qa11", "task qa11 in tasks=qa1,qa11 is not known"),
    ("--lengths=0k,long", "long"),
    ("--lengths=0k,9", "within 9 tokens"),
    ("--corpus=nowhere.txt", "nowhere.txt is not there"),
    ("--match_params=out/nothing", "is not the folder of a run"),
])
def test_bad_input_is_refused_in_one_line(call, flag, message):
    code, _, err = call("train.py", *BABILONG, *SMALL, "--out_dir=out/refused", flag)
    assert code == 2 and message in err and err.count("\n") == 1
