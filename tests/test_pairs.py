"""data/pairs.py: texts of keys and values, batches of them, the curriculum of numbers of pairs."""
import csv
import json
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL

from data.pairs import ASKED, KEYS, KINDS, UNIT, open_pairs, write_text
from lm2 import LM2, LM2Config

CONFIG = SimpleNamespace(pairs="4, 16,50,", tokenizer="char", batch_size=6, n_segments=4,
                         block_size=64, gradient_accumulation_steps=1, seed=1, eval_iters=4,
                         max_iters=100, advance_at=0.9, rehearse=0.3)


@pytest.fixture
def data():
    return open_pairs(CONFIG)


def changed(**values):
    return SimpleNamespace(**vars(CONFIG) | values)


def read(text):
    """A reader of its own: pairs (key, value) and questions (key, answer) of a text, in order."""
    assert re.fullmatch(r"( [A-Z][a-z][0-9])+(\?[A-Z][a-z][0-9])+ *", text), text
    units = [text[i:i + 4] for i in range(0, len(text.rstrip()), 4)]
    pairs = [(unit[1:3], unit[3]) for unit in units if unit[0] == " "]
    questions = [(unit[1:3], unit[3]) for unit in units if unit[0] == "?"]
    return pairs, questions


def texts(data, x):
    return [data.tokenizer.decode(row) for row in x.tolist()]


# --- Texts

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 3, 10, 50, 500, len(KEYS)])
def test_answers_are_the_last_values_of_their_keys(kind, n):
    for seed in range(5):
        pairs, questions = read(write_text(kind, n, np.random.default_rng(seed)))
        last = {}
        for key, value in pairs:
            last[key] = value
        assert len(pairs) == n and questions
        assert all(last[key] == answer for key, answer in questions)
        asked = {key for key, _ in questions}
        assert len(asked) == len(questions) == min(16, len(last)), "no question comes twice"


def test_keys_of_remember_differ_and_those_of_rewrite_come_again():
    for n in (2, 10, 50, 500):
        pairs, questions = read(write_text("remember", n, np.random.default_rng(n)))
        assert len({key for key, _ in pairs}) == n
        pairs, questions = read(write_text("rewrite", n, np.random.default_rng(n)))
        times = [sum(key == asked for key, _ in pairs) for asked, _ in questions]
        assert min(times) >= 2 and sum(times) == n, "it asks for all its keys"
        assert len(questions) == min(16, n // 2)


def test_old_values_are_no_answers():
    stale = 0
    for seed in range(50):
        pairs, questions = read(write_text("rewrite", 50, np.random.default_rng(seed)))
        first = dict(reversed(pairs))
        stale += sum(first[key] == answer for key, answer in questions)
    assert stale / (50 * 16) < 0.15, "about one in ten, as a guess"


def test_a_guess_is_right_in_one_of_ten_and_place_and_kind_tell_nothing():
    answers, places = [], []
    for seed in range(400):
        pairs, questions = read(write_text(KINDS[seed % 2], 50, np.random.default_rng(seed)))
        answers += [int(answer) for _, answer in questions]
        if seed % 2 == 0:
            places += [[key for key, _ in pairs].index(asked) for asked, _ in questions]
    assert np.abs(np.bincount(answers, minlength=10) / len(answers) - 0.1).max() < 0.02
    assert np.abs(np.bincount(places, minlength=50) / len(places) - 0.02).max() < 0.01


# --- Batches

def test_targets_are_the_answers_and_nothing_else(data):
    for stage in range(3):
        data.progress = [stage, 0]
        x, y, repeats = data.batch(changed(rehearse=0), 0, 0)
        assert repeats is None and x.dtype == y.dtype == torch.int64 and x.shape == y.shape
        for text, row, targets in zip(texts(data, x), x.tolist(), y.tolist()):
            marked = [t for t, target in enumerate(targets) if target != -1]
            assert [t - 2 for t in marked] == [t for t, c in enumerate(text) if c == "?"]
            assert [targets[t] for t in marked] == [row[t + 1] for t in marked]
            _, questions = read(text)
            assert data.tokenizer.decode([targets[t] for t in marked]) == "".join(
                answer for _, answer in questions)


def test_no_pair_lies_across_a_border_of_segments(data):
    x, _, _ = data.batch(CONFIG, 0, 0)
    assert x.size(1) % UNIT == 0
    for block_size in (16, 32, 64):
        for text in texts(data, x):
            segments = [text[i:i + block_size] for i in range(0, len(text), block_size)]
            assert all(segment[0] in " ?" for segment in segments)


def test_batch_is_a_function_of_seed_step_part_and_progress(data):
    x, y, _ = data.batch(CONFIG, 3, 0)
    np.random.seed(5)
    again_x, again_y, _ = open_pairs(CONFIG).batch(CONFIG, 3, 0)
    assert torch.equal(x, again_x) and torch.equal(y, again_y)
    others = [data.batch(CONFIG, 4, 0), data.batch(CONFIG, 3, 1), data.batch(changed(seed=2), 3, 0)]
    data.progress = [2, 0]
    others.append(data.batch(changed(rehearse=0), 3, 0))
    assert not any(set(texts(data, x)) & set(texts(data, other)) for other, _, _ in others)


def test_parts_are_together_what_a_larger_batch_is(data):
    rows = 7  # odd, so that kinds go on from part to part
    whole = data.draw(16, 2 * rows, 0, 1, 3)
    parts = [data.draw(16, rows, 0, 1, 3, part) for part in (0, 1)]
    assert texts(data, whole[0]) == sum((texts(data, x) for x, _, _ in parts), [])
    assert whole[2] == parts[0][2] + parts[1][2]


def test_a_batch_has_as_many_texts_as_fit_and_half_are_of_each_kind(data):
    x, _, _ = data.batch(CONFIG, 0, 0)
    assert x.size(1) == 4 * (4 + 4) and len(x) == 6 * 4 * 64 // x.size(1)
    again = [len({key for key, _ in read(text)[0]}) < 4 for text in texts(data, x)]
    assert sum(again) == len(again) / 2
    data.progress = [2, 0]
    small = changed(batch_size=1, n_segments=1, rehearse=0)
    again = []
    for step in range(10):
        x, _, _ = data.batch(small, step, 0)
        assert x.shape == (1, 4 * (50 + 16)), "at least one"
        again.append(len({key for key, _ in read(*texts(data, x))[0]}) < 50)
    assert sum(again) == 5


# --- The curriculum

def test_curriculum_trains_at_its_number_and_rehearses_the_smaller_ones(data):
    def n_pairs(step, config=CONFIG):
        x, _, _ = data.batch(config, step, 0)
        return len(read(texts(data, x)[0])[0])
    assert {n_pairs(step) for step in range(20)} == {4}
    data.progress = [2, 0]
    found = [n_pairs(step) for step in range(200)]
    assert set(found) == {4, 16, 50} and 0.7 < np.mean(np.array(found) == 50) < 0.9
    assert {n_pairs(step, changed(rehearse=0.0)) for step in range(20)} == {50}


def test_curriculum_moves_on_when_a_number_is_learned_or_its_budget_is_spent(data):
    for step, accuracy, progress, n in [
            (0, 1.0, [0, 0], 4),       # nothing was trained yet
            (10, 0.89, [0, 0], 4),
            (20, 0.9, [1, 20], 16),    # learned
            (59, 0.1, [1, 20], 16),
            (60, 0.1, [2, 60], 50),    # half of the 80 steps that were left
            (99, 1.0, [2, 60], 50)]:   # the last number stays
        data.advance(step, {"accuracy": accuracy}, CONFIG)
        assert data.progress == progress and data.position() == {"pairs": n}


# --- Evaluation

def test_evaluation_is_of_the_current_number_and_of_the_fixed_ones(data):
    tokens = CONFIG.batch_size * CONFIG.n_segments * CONFIG.block_size
    for stage, n in enumerate((4, 16, 50)):
        data.progress = [stage, 0]
        batches = list(data.evaluation_batches(CONFIG))
        for batch in batches[:CONFIG.eval_iters]:
            assert batch.column == "val_loss" and set(batch.tasks) == set(KINDS)
            assert {len(read(text)[0]) for text in texts(data, batch.x)} == {n}
        answers, seen = Counter(), []
        for batch in batches[CONFIG.eval_iters:]:
            assert batch.column == "asked_loss" and len(batch.tasks) == len(batch.x)
            assert len(batch.x) == 1 or batch.x.numel() <= tokens, "it fits where training does"
            for text, task, targets in zip(texts(data, batch.x), batch.tasks, batch.y):
                pairs, questions = read(text)
                kind = "remember" if len(dict(pairs)) == len(pairs) else "rewrite"
                assert task == f"{kind}_{len(pairs)}"
                assert int((targets != -1).sum()) == len(questions)
                answers[task] += len(questions)
                seen.append(text)
        assert set(answers) == {f"{kind}_{number}" for kind in KINDS for number in ASKED}
        assert min(answers.values()) >= 16 * CONFIG.eval_iters and len(set(seen)) == len(seen)
    assert {batch.column for batch in batches} < set(data.columns)
    assert {task for batch in batches for task in batch.tasks} < set(data.columns)


def test_evaluation_is_the_same_each_time_and_never_a_training_text(data):
    data.numbers = [50]  # of which one in ASKED as well
    first, again = (list(data.evaluation_batches(CONFIG)) for _ in range(2))
    assert all(torch.equal(one.x, other.x) for one, other in zip(first, again))
    evaluated = [text for batch in first for text in texts(data, batch.x)]
    assert len(set(evaluated)) == len(evaluated)
    trained = [text for step in range(60) for text in texts(data, data.batch(CONFIG, step, 0)[0])]
    assert not set(trained) & set(evaluated)


def test_report_names_number_loss_and_accuracies(data):
    row = {"pairs": 16, "val_loss": 0.5, "accuracy": 0.75, "rewrite": 0.75}
    row |= {f"{kind}_{n}": n / 1000 for kind in KINDS for n in ASKED}
    assert data.report(row) == (
        "16 pairs: validation loss 0.5000, accuracy 0.750 (rewrite 0.750); 10 20 50 100 200 500 "
        "pairs: remember 0.01 0.02 0.05 0.10 0.20 0.50, rewrite 0.01 0.02 0.05 0.10 0.20 0.50")


def test_example_shows_pairs_a_question_the_models_answer_and_the_right_one(data):
    model = LM2(LM2Config(data.tokenizer.n_vocab, n_layer=1, n_embd=16, n_head=2, block_size=8,
                          mem_slots=4)).eval()
    text, right = data.example(model, torch.device("cpu")).rsplit(" (right: ", 1)
    pairs = re.fullmatch(r"( [A-Z][a-z][0-9]){4}\?", text[:-3])[0]
    assert f" {text[-3:-1]}{right[:-1]}" in pairs
    wanted = data.tokenizer.encode(right[0])[0]
    with torch.no_grad():  # a model that gives the right answer is shown with it
        model.head.weight[wanted] = 10 * torch.sign(model.features(torch.tensor(
            [data.tokenizer.encode(text[:-1])]))[0][0, -1])
    assert data.example(model, torch.device("cpu")) == f"{text[:-1]}{right[0]} (right: {right}"


# --- Opening

def test_pairs_are_opened_as_the_flags_say(data):
    assert data.numbers == [4, 16, 50] and data.last_is_best
    assert data.tokenizer.kind == data.meta["tokenizer"] == "char"
    assert data.meta["vocab_size"] == data.tokenizer.n_vocab == 26 + 26 + 10 + 2
    assert data.meta["tokens"] == {"train": 100 * 1536, "val": 4 * 1536}
    assert set(json.loads(json.dumps(data.meta))) == {
        "source", "sha256", "tokenizer", "vocab_size", "tokens"}
    assert data.meta["sha256"] == open_pairs(changed(seed=2, pairs="9")).meta["sha256"]


def test_a_run_that_goes_on_keeps_its_tokenizer(data):
    assert open_pairs(CONFIG, tokenizer=data.tokenizer).tokenizer is data.tokenizer
    other = type(data.tokenizer)("abc")
    with pytest.raises(ValueError, match="not in the vocabulary"):
        open_pairs(CONFIG, tokenizer=other)


@pytest.mark.parametrize("field, value, message", [
    ("pairs", "", "pairs= lists nothing"),
    ("pairs", "4,many", "many in pairs=4,many must be a number from 2 to 676"),
    ("pairs", "4,-8", "-8 in pairs"),
    ("pairs", "4.5", "4.5 in pairs"),
    ("pairs", "²", "must be a number"),
    ("pairs", "0", "0 in pairs=0 must be a number from 2"),
    ("pairs", "1", "from 2 to 676"),
    ("pairs", "677", "from 2 to 676, as there are so many keys"),
    ("pairs", "9" * 5000, "from 2 to 676"),
    ("pairs", "4,4", "lists 4 twice"),
    ("pairs", "4,04", "lists 4 twice"),
    ("tokenizer", "bpe", "tokenizer=bpe is not for pairs: use char")])
def test_pairs_that_cannot_be_are_refused_in_one_line(field, value, message):
    with pytest.raises(ValueError, match=message) as error:
        open_pairs(changed(**{field: value}))
    assert "\n" not in str(error.value)


# --- Training on pairs

def test_training_on_pairs_resumes_bit_for_bit_and_asks_beyond_its_pairs(checkout, call):
    def run(out_dir, *more):
        code, out, err = call("train.py", "--dataset=pairs", "--pairs=2,4", *SMALL,
                              "--block_size=4", "--eval_interval=2", "--advance_at=0",
                              f"--out_dir={out_dir}", *more)
        assert code == 0, err
        return out
    out = run("out/pairs", "--max_iters=4")
    assert "step 4: 4 pairs: validation loss" in out and "(right: " in out
    run("out/pairs2", "--max_iters=3", "--lr_decay_iters=4")
    run("out/pairs2", "--resume", "--max_iters=4")
    whole, resumed = (list(csv.DictReader(checkout.log(f"out/{name}").splitlines()))
                      for name in ("pairs", "pairs2"))
    assert [row["loss"] for row in whole] == [row["loss"] for row in resumed]
    assert 0 <= float(whole[-1]["rewrite_500"]) < 0.5 and float(whole[-1]["accuracy"]) < 0.5


@pytest.mark.parametrize("flag, message", [("--pairs=1", "1 in pairs=1 must be a number from 2"),
                                           ("--tokenizer=bpe", "tokenizer=bpe is not for pairs"),
                                           ("--vocab_size=9", "for this text: leave it out\n")])
def test_bad_flags_are_refused_in_one_line(call, flag, message):
    code, _, err = call("train.py", "--dataset=pairs", *SMALL, "--out_dir=out/refused", flag)
    assert code == 2 and message in err and err.count("\n") == 1
