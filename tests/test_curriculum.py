"""data/curriculum.py: batches of stories, the curriculum of lengths; and training on them."""
import csv
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from babi_figures import RECORDED
from babi_solver import solve, template
from conftest import SMALL, TEXT
from test_babilong import TEXT as KINGS
from test_gguf_tokenizer import sentencepiece_metadata, tokenizer_of

from baselines.rmt import RMT
from data import curriculum, text
from data.babi import TASKS, simulate
from data.babilong import Haystack, split_sentences
from data.curriculum import (
    Stories,
    dilation,
    open_stories,
    parse_curriculum,
    right_answers,
    tokenizer_text,
    training_batch,
)
from data.text import split
from data.tokenizer import make_tokenizer
from lib import checkpoint
from lm2 import LM2

CONFIG = SimpleNamespace(batch_size=4, n_segments=2, block_size=64, seed=1, eval_iters=6,
                         max_iters=100, advance_at=0.9, rehearse=0.3, memory="lm2",
                         mem_write="attend")
BABILONG = ["--dataset=babilong", "--corpus=play.txt", "--tasks=qa1,qa6", "--lengths=0k,256"]


@pytest.fixture(autouse=True)
def fewer_lessons(monkeypatch):
    """Enough for a tokenizer, and seconds less in each test."""
    monkeypatch.setattr(curriculum, "LESSONS", 40)


@pytest.fixture(scope="module")
def bpe():
    rng = random.Random(7)
    facts = [line.text for task in TASKS for _ in range(5) for line in simulate(task, rng)]
    return make_tokenizer("bpe", KINGS + "\n" + " ".join(facts), 400)


@pytest.fixture(scope="module")
def haystack(bpe):
    return Haystack(KINGS, bpe)


@pytest.fixture(scope="module")
def stories():
    train, val = split(TEXT)
    tokenizer = make_tokenizer("char", tokenizer_text(TEXT), 0)
    train, val = Haystack(train, tokenizer), Haystack(val, tokenizer)
    return lambda lengths: Stories(["qa1", "qa6"], parse_curriculum(lengths), train, val, tokenizer,
                                   {})


# --- Batches

@pytest.mark.parametrize("length", [0, 400])
def test_training_batch_is_a_function_of_seed_step_and_part(length, bpe, haystack):
    def batch(*args, size=2):
        return training_batch(["qa1", "qa5"], length, haystack, bpe, size, *args)
    x, y, told, tasks = batch(1, 2)
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape
    assert x.shape[1] % 16 == 0 and len(tasks) == 2
    random.seed(5)
    np.random.seed(5)
    again = batch(1, 2)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and tasks == again[3]
    assert torch.equal(told, again[2]) and told.shape == x.shape and told.dtype == torch.bool
    for other in ((2, 2), (1, 3), (1, 2, 1)):
        assert not torch.equal(x[0, :40], batch(*other)[0][0, :40])
    both_x, both_y, _, both_tasks = batch(1, 2, size=4)
    parts = [batch(1, 2, part) for part in (0, 1)]
    assert both_tasks == parts[0][3] + parts[1][3]
    for part, (x, y, _, _) in enumerate(parts):
        n = min(x.shape[1], both_x.shape[1])
        rows = slice(2 * part, 2 * part + 2)
        assert torch.equal(x[:, :n], both_x[rows, :n]) and torch.equal(y[:, :n], both_y[rows, :n])


@pytest.mark.parametrize("length, asking", [
    (0, "along"), (300, "along"), (1000, "along"), (0, "own"), (1000, "own"), (0, "all"),
    (1000, "all")])
def test_loss_is_on_right_answers_alone(length, asking, bpe, haystack):
    x, y, _, tasks = training_batch(TASKS, length, haystack, bpe, 30, seed=1, step=0, asking=asking)
    assert len(set(tasks)) > 5 and x.shape[1] <= max(length + 63, 256)
    for row, targets, task in zip(x.tolist(), y.tolist(), tasks):
        marked = [t for t, target in enumerate(targets) if target >= 0]
        assert marked and all(targets[t] == row[t + 1] for t in marked)
        ends = [t for t in marked if t + 1 not in marked]
        for end in ends:  # the text before: facts, corpus, earlier questions with their answers
            begin = next(t for t in range(end, -1, -1) if t - 1 not in marked)
            answer = bpe.decode(row[begin + 1:end + 2])
            assert answer[0] == " " and answer[-1] == "."
            context = split_sentences(bpe.decode(row[:begin + 1]))
            facts = [s for s in context if template(s) in RECORDED[task]["facts"]]
            assert solve(facts, context[-1]) == answer[1:-1], context
        total = length or len(np.trim_zeros(row, "b"))
        assert ends[-1] + 2 == total or length == 0


def test_story_that_does_not_fit_is_shortened_or_drawn_again(bpe, haystack):
    x, y, _, _ = training_batch(["qa2"], 150, haystack, bpe, 20, seed=1, step=0)
    assert x.shape == (20, 160) and (y >= 0).any(1).all()
    assert (x[:, 150:] == 0).all() and (y[:, 149:] == -1).all()
    assert training_batch(["qa1"], 0, None, bpe, 2, seed=1, step=0)[0].shape[0] == 2
    with pytest.raises(ValueError, match="within 8 tokens"):
        training_batch(["qa1"], 8, haystack, bpe, 2, seed=1, step=0)


def test_char_tokenizer_serves_as_well():
    tokenizer = make_tokenizer("char", tokenizer_text(KINGS), 0)
    haystack = Haystack(KINGS, tokenizer)
    x, y, _, _ = training_batch(["qa1"], 700, haystack, tokenizer, 2, seed=0, step=0)
    for row, targets in zip(x, y):
        answers = tokenizer.decode(targets[targets >= 0].tolist())
        assert answers.count(".") == tokenizer.decode(row[:700].tolist()).count("?")


def test_batch_is_a_function_of_seed_step_and_part(stories):
    data = stories("512")
    x, y, repeats = data.batch(CONFIG, 3, 0)
    assert repeats is None, "without time dilation"
    assert x.shape == y.shape == (1, 512), "as many tokens as batch_size * n_segments * block_size"
    again_x, again_y, _ = stories("512").batch(CONFIG, 3, 0)
    assert torch.equal(x, again_x) and torch.equal(y, again_y)
    for step, part in ((4, 0), (3, 1)):
        assert not torch.equal(x, data.batch(CONFIG, step, part)[0])


@pytest.mark.parametrize("length", [0, 512])
def test_most_stories_ask_at_their_end(stories, length):
    data, found = stories(str(length)), 0
    for step in range(100):
        x, y, _ = data.batch(CONFIG, step, 0)
        begins = np.flatnonzero(np.diff((y[0] != -1).int(), prepend=0) == 1)  # of the answers
        before = data.tokenizer.decode(x[0, :begins[-1] + 1].tolist())
        found += before[-40:].count("?") > 1  # the last question stands behind another
    assert 40 < found < 75, "70% do, and some stories give only one question"


def asks_for_both(data, x):
    """Of each row, whether it has questions of both qa1 and qa6."""
    texts = [data.tokenizer.decode(row) for row in x.tolist()]
    return [" Where is " in text and " Is " in text for text in texts]


def test_each_task_asks_what_the_others_would_in_training_alone(stories):
    data = stories("512")
    trained = [asks_for_both(data, data.batch(CONFIG, step, 0)[0]) for step in range(60)]
    assert 0.5 < np.mean(trained) < 0.8, "the share of stories that ask at their end"
    evaluated = [asks_for_both(data, batch.x) for batch in data.evaluation_batches(CONFIG)]
    assert len(evaluated) == CONFIG.eval_iters and not np.any(evaluated)


# --- The curriculum

def test_curriculum_trains_at_its_length_and_rehearses_the_shorter_ones(stories):
    data = stories("256,384,512,768")
    assert {data.batch(CONFIG, step, 0)[0].size(1) for step in range(20)} == {256}
    data.progress = [2, 0]
    widths = [data.batch(CONFIG, step, 0)[0].size(1) for step in range(200)]
    assert set(widths) == {256, 384, 512} and 0.7 < np.mean(np.array(widths) == 512) < 0.9
    never = SimpleNamespace(**vars(CONFIG) | {"rehearse": 0.0})
    assert {data.batch(never, step, 0)[0].size(1) for step in range(20)} == {512}


def test_what_a_step_rehearses_says_nothing_of_the_text_of_its_rows(stories):
    data, places = stories("256,512"), []
    data.progress = [1, 0]

    def mix(pieces, length, rng):  # notes a number of a row's own stream
        places.append((length, rng.integers(1 << 20) / (1 << 20)))
        return original(pieces, length, rng)

    original, data.train.mix = data.train.mix, mix
    config = SimpleNamespace(**vars(CONFIG) | {"batch_size": 1, "rehearse": 0.9})
    for step in range(200):
        data.batch(config, step, 0)
    del data.train.mix
    for length in (256, 512):
        drawn = [place for long, place in places if long == length]
        assert len(drawn) > 50 and min(drawn) < 0.1 and max(drawn) > 0.9


def test_curriculum_moves_on_when_a_length_is_learned_or_its_budget_is_spent(stories):
    data = stories("0,256,512")
    for step, accuracy, progress, length in [
            (0, 1.0, [0, 0], 0),        # nothing was trained yet
            (10, 0.89, [0, 0], 0),
            (20, 0.9, [1, 20], 256),    # learned
            (59, 0.1, [1, 20], 256),
            (60, 0.1, [2, 60], 512),    # half of the 80 steps that were left
            (99, 1.0, [2, 60], 512)]:   # the last length stays
        data.advance(step, {"accuracy": accuracy}, CONFIG)
        assert data.progress == progress and data.position() == {"length": length}


# --- Time dilation

def test_told_marks_the_tokens_of_the_story(bpe, haystack):
    x, _, told, _ = training_batch(["qa1"], 700, haystack, bpe, 4, 1, 0)
    for row, own in zip(x, told):
        sentences = split_sentences(bpe.decode(row[own].tolist()))
        assert sentences[0].split()[0] in ("John", "Mary", "Sandra", "Daniel")
        assert all(word in split_sentences(KINGS) for word in
                   split_sentences(bpe.decode(row[~own].tolist()))[2:-2])
    bare = training_batch(["qa1"], 0, None, bpe, 4, 1, 0)
    assert torch.equal(bare[2], bare[0] != 0)


def test_empty_segments_share_what_the_text_is_to_count():
    told = torch.zeros(3, 10, dtype=torch.bool)  # segments of 4, 4 and 2 tokens
    told[0, 1] = told[0, 9] = told[1, 8] = True
    told[2, :] = True
    repeats = dilation(told, 400, 4)
    torch.testing.assert_close(repeats, torch.tensor([[1.0, 98, 1], [49.5, 49.5, 1], [1, 1, 1]]))
    assert (dilation(told, 8, 4) == 1).all(), "never less than once"


def test_a_dilated_length_counts_as_more_tokens_than_it_has(stories):
    data = stories("512,32k/2k")
    data.progress = [1, 0]
    batches = [data.batch(CONFIG, step, 0) for step in range(20)]
    for x, y, repeats in batches:
        assert (y != -1).any() and x.shape == (1, 512 if repeats is None else 2000)
        if repeats is not None:
            assert repeats.shape == (1, 32) and repeats.sum() == pytest.approx(32_000 / 64)
    plain = sum(repeats is None for _, _, repeats in batches)
    assert 0 < plain < 10, "rehearsal mixes in plain texts"
    assert data.position() == {"length": 32_000}
    for batch in data.evaluation_batches(CONFIG):
        assert batch.x.size(1) == 2000 and batch.repeats.sum() == pytest.approx(32_000 / 64)


@pytest.mark.parametrize("change", [dict(memory="rmt"), dict(memory="none"),
                                    dict(mem_write="aligned")], ids=str)
def test_time_dilation_is_refused_where_a_segment_cannot_count_often(config, change):
    vars(config).update(change, lengths="0k,4k/512")
    with pytest.raises(ValueError, match="lengths=0k,4k/512 has time dilation, which needs"):
        open_stories(config)
    config.lengths = "0k,512"
    open_stories(config)


# --- Evaluation

def test_evaluation_is_at_the_current_length_in_text_that_training_never_sees(stories):
    data = stories("256,512")
    train, val = split(TEXT)
    for haystack, part in ((data.train, train), (data.val, val)):
        assert data.tokenizer.decode(haystack.ids.tolist()).split() == part.split()
    data.train = None  # and it does not miss it
    for length in (256, 512):
        batches = list(data.evaluation_batches(CONFIG))
        assert len(batches) == CONFIG.eval_iters
        for batch in batches:
            assert batch.column == "val_loss" and not batch.continues
            assert batch.x.shape == batch.y.shape and batch.x.size(1) == length
            assert len(batch.tasks) == len(batch.x) and set(batch.tasks) <= {"qa1", "qa6"}
        data.progress = [1, 0]


def test_evaluation_is_the_same_each_time_and_not_a_training_batch(stories):
    data = stories("256")
    first, again = (list(data.evaluation_batches(CONFIG)) for _ in range(2))
    for one, other in zip(first, again):
        assert torch.equal(one.x, other.x) and torch.equal(one.y, other.y)
    for step, batch in enumerate(first):  # other stories than those of the same step in training
        for asking in ("along", "own"):
            x, _, _, _ = data.draw(data.val, data.lengths[0], CONFIG, CONFIG.seed, step, 0, asking)
            assert not torch.equal(batch.x, x)


def test_every_second_batch_of_an_evaluation_asks_at_the_end(stories):
    data = stories("512")
    config = SimpleNamespace(**vars(CONFIG) | {"eval_iters": 20})
    at_end = []
    for batch in data.evaluation_batches(config):
        *texts, answer = data.tokenizer.decode(batch.x[0].tolist()).split("?")
        at_end.append(len(texts[-1]) < 40)  # between the last question and the one before
    assert sum(at_end[1::2]) > 6 and sum(at_end[::2]) < 3


def test_answers_are_told_apart():
    y = torch.tensor([[-1, 4, 5, -1, 6, -1], [7, -1, -1, -1, 8, 9], [-1, -1, -1, -1, -1, -1]])
    found = torch.tensor([[0, 4, 5, 0, 0, 0], [7, 0, 0, 0, 8, 0], [1, 1, 1, 1, 1, 1]])
    assert right_answers(found, y) == [[True, False], [True, False], []]
    assert right_answers(y, y) == [[True, True], [True, True], []]


def test_report_names_length_loss_and_accuracies(stories):
    row = {"length": 256, "val_loss": 0.5, "accuracy": 0.75, "qa6": 0.25}
    data, figures = stories("256,128k/2k"), "validation loss 0.5000, accuracy 0.750 (qa6 0.250)"
    assert data.report(row) == f"256 tokens: {figures}"
    data.progress = [1, 0]
    assert data.report(row) == f"2,000 tokens that count as 128,000: {figures}"


def test_an_example_shows_the_whole_answer_also_where_a_letter_is_a_token():
    characters, said = make_tokenizer("char", tokenizer_text(TEXT), 0), " apple football milk. Mary"

    def generate(ids, n, temperature):
        return torch.cat((ids, torch.tensor([characters.encode(said)[:n]])), 1)

    data = Stories(["qa8"], [(0, 0)], None, None, characters, {})
    example = data.example(SimpleNamespace(generate=generate), "cpu")
    assert "? apple football milk. (right: " in example


def test_an_example_has_a_space_before_its_answer_with_any_tokenizer(bpe):
    for tokenizer, said in ((bpe, " office. Mary"),
                            (tokenizer_of(sentencepiece_metadata()), "office. Mary")):
        said = torch.tensor([tokenizer.encode(said)])
        model = SimpleNamespace(generate=lambda ids, *_, said=said, **__: torch.cat((ids, said), 1))
        data = Stories(["qa1"], [(0, 0)], None, None, tokenizer, {})
        assert "? office. (right: " in data.example(model, "cpu")


# --- Opening

@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "DATA_DIR", tmp_path / "data")
    (tmp_path / "play.txt").write_text(TEXT)
    return SimpleNamespace(**vars(CONFIG), tasks="qa1, qa6,", lengths="0k, 256,",
                           corpus=str(tmp_path / "play.txt"), tokenizer="char", vocab_size=512)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_stories_are_opened_as_the_flags_say(config, kind):
    config.tokenizer = kind
    data = open_stories(config)
    assert data.tasks == ["qa1", "qa6"] and data.lengths == [(0, 0), (256, 256)]
    assert data.columns == ("length", "val_loss", "accuracy", "qa1", "qa6")
    assert data.tokenizer.kind == data.meta["tokenizer"] == kind
    assert data.meta["vocab_size"] == data.tokenizer.n_vocab
    assert data.meta["tokens"] == {"train": len(data.train.ids), "val": len(data.val.ids)}
    json.dumps(data.meta)


def test_a_run_that_goes_on_keeps_its_tokenizer(config):
    config.tokenizer = "bpe"
    its_own = make_tokenizer("bpe", tokenizer_text(TEXT) + "another trainer " * 999, 512)
    assert open_stories(config).tokenizer.to_json() != its_own.to_json()
    data = open_stories(config, tokenizer=its_own)
    assert data.tokenizer is its_own and data.meta["vocab_size"] == 512
    x, _, _ = data.batch(config, 0, 0)
    assert "Mary" in its_own.decode(x[0].tolist()) or "John" in its_own.decode(x[0].tolist())


@pytest.mark.parametrize("field, value, message", [
    ("tasks", "qa1,qa11", "task qa11 in tasks=qa1,qa11 is not known"),
    ("tasks", "qa1,qa1", "lists qa1 twice"),
    ("lengths", "", "lengths= lists nothing"),
    ("lengths", "0k,long", "long"),
    ("lengths", "0k,9", "within 9 tokens"),
    ("lengths", "0k,76", "within 76 tokens"),  # a question on the way fits, all at the end do not
    ("lengths", "0k,0", "lists 0 twice"),
    ("lengths", "256,4k/256,4000/256", "lists 4000/256 twice"),
    ("lengths", "256/4k", "256/4k in lengths=256/4k must count as more tokens than it has"),
    ("lengths", "4k/4k", "must count as more tokens"),
    ("lengths", "4k/0k", "must count as more tokens"),
    ("lengths", "4k/", "length '' is not known"),
    ("lengths", "4k/2k/1k", "length '2k/1k' is not known"),
    ("lengths", "0k,999999M", "at most 100M"),
    ("tokenizer", "word", "tokenizer=word is not known"),
    ("vocab_size", 1 << 40, "use at most"),
    ("corpus", "nowhere.txt", "^corpus=nowhere.txt is not there"),
    ("corpus", "babilong", "^corpus=babilong is not there")])
def test_stories_that_cannot_be_are_refused_in_one_line(config, field, value, message):
    if field == "vocab_size":
        config.tokenizer = "bpe"
    setattr(config, field, value)
    with pytest.raises((ValueError, OSError), match=message) as error:
        open_stories(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["a", "x", "Only one sentence."])
def test_a_tiny_corpus_serves_or_is_refused_in_one_line(config, tmp_path, content):
    (tmp_path / "play.txt").write_text(content)
    if content == "Only one sentence.":
        assert open_stories(config).batch(config, 0, 0)[0].size(1) > 0
    else:
        with pytest.raises(ValueError, match="no sentence: give it some text$"):
            open_stories(config)


# --- Training on stories

def test_training_on_stories_resumes_bit_for_bit_across_a_change_of_length(checkout, call):
    def run(out_dir, *more):
        code, out, err = call("train.py", *BABILONG, "--lengths=0k,2k/256", "--eval_interval=3",
                              "--advance_at=0", *SMALL, f"--out_dir={out_dir}", *more)
        assert code == 0, err
        return out
    out = run("out/stories", "--max_iters=8")
    assert "step 3: 0 tokens" in out and "(right: " in out
    assert "step 6: 256 tokens that count as 2,000: " in out
    run("out/stories2", "--max_iters=5", "--lr_decay_iters=8")
    run("out/stories2", "--resume", "--max_iters=8")
    whole, resumed = (list(csv.DictReader(checkout.log(f"out/{name}").splitlines()))
                      for name in ("stories", "stories2"))
    assert [row["loss"] for row in whole] == [row["loss"] for row in resumed]
    assert set(whole[3]) >= {"length", "accuracy", "qa1", "qa6"}


def test_run_that_ends_does_not_move_on(checkout, call):
    code, out, err = call("train.py", *BABILONG, *SMALL, "--advance_at=0", "--max_iters=1",
                          "--out_dir=out/short", "--overwrite")
    assert code == 0, err
    ckpt = torch.load(checkout.folder / "out/short/ckpt.pt", weights_only=True)
    assert ckpt["progress"] == [0, 0]


def test_of_stories_the_last_step_is_the_best_whatever_its_loss(checkout, call):
    code, _, err = call("train.py", *BABILONG, *SMALL, "--max_iters=2", "--eval_interval=1",
                        "--adam_lr=30", "--out_dir=out/last", "--overwrite")
    rows = list(csv.DictReader(checkout.log("out/last").splitlines()))
    assert code == 0 and float(rows[2]["val_loss"]) > float(rows[0]["val_loss"]), err
    assert torch.load(checkout.folder / "out/last/best.pt", weights_only=True)["step"] == 2


@pytest.mark.parametrize("memory", ["rmt", "none"])
def test_match_params_widens_the_mlp_to_the_size_of_a_run(checkout, call, memory):
    for out_dir, flags in [("out/wanted", []),
                           (f"out/{memory}", [f"--memory={memory}", "--match_params=out/wanted"])]:
        code, _, err = call("train.py", *BABILONG, *SMALL, "--n_embd=32", "--max_iters=0", *flags,
                            f"--out_dir={out_dir}", "--overwrite")
        assert code == 0, err
    wanted, found = (
        json.loads((checkout.folder / "out" / name / "config.json").read_text())["parameters"]
        for name in ("wanted", memory))
    assert abs(found - wanted) <= 0.02 * wanted
    model, _, _ = checkpoint.load(checkout.folder / "out" / memory, "cpu")
    assert type(model) is (RMT if memory == "rmt" else LM2)


@pytest.mark.parametrize("flag, message", [
    ("--tasks=qa1,qa11", "task qa11 in tasks=qa1,qa11 is not known"),
    ("--lengths=0k,long", "long"),
    ("--lengths=0k,9", "within 9 tokens"),
    ("--corpus=nowhere.txt", "nowhere.txt is not there"),
    ("--match_params=out/nothing", "out/nothing"),
])
def test_bad_input_is_refused_in_one_line(call, flag, message):
    code, _, err = call("train.py", *BABILONG, *SMALL, "--out_dir=out/refused", flag)
    assert code == 2 and message in err and err.count("\n") == 1
