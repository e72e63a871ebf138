"""eval_babilong.py and lib/results.py: answers, scores, results that nobody loses, tables."""
import csv
import errno
import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
from conftest import SMALL, TEXT, is_one_line
from matplotlib.figure import Figure
from test_gguf_tokenizer import sentencepiece_metadata, tokenizer_of

import eval_babilong
from data import files
from data.babi import TASKS, format_story, simulate
from data.babilong import Haystack, Question, hide_question, split_sentences
from data.curriculum import tokenizer_text
from data.text import split
from data.tokenizer import make_tokenizer
from eval_babilong import (
    EvalConfig,
    Run,
    answer_to,
    batches,
    evaluate,
    load_run,
    prompts,
    questions,
    retrieve,
)
from lib import results
from lib.origin import origin
from lib.results import TableLine, average, make_tables, markdown, names, plot

TOKENIZER = make_tokenizer("char", tokenizer_text(TEXT), 0)
HAYSTACK = Haystack(TEXT, TOKENIZER)
ON_CPU = ["--device=cpu", "--dtype=float32"]


class Scribe(torch.nn.Module):
    """A model that answers by a function of the text before it, and then goes on writing."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.texts, self.p = answer, [], torch.nn.Parameter(torch.zeros(1))

    def stream(self, idx, max_new_tokens, temperature):
        assert temperature == 0, "answers are generated greedily"
        texts = [TOKENIZER.decode(row.tolist()) for row in idx]
        self.texts += texts
        replies = [TOKENIZER.encode(f" {self.answer(text)}. John went") for text in texts]
        for i in range(max_new_tokens):
            yield torch.tensor([reply[min(i, len(reply) - 1)] for reply in replies])


class Bar:
    def update(self):
        pass


def scribe(answer):
    return Run(Scribe(answer), TOKENIZER, TOKENIZER, HAYSTACK, {})


class BytePairs:
    """In GPT-2's place: a token is two bytes of a word, and may end inside a character."""
    kind, prefix = "gpt2", ""

    def __init__(self):
        self.tokens = []

    def encode(self, text):
        words = [word.encode() for word in re.findall(" ?[^ ]*", text)]
        pairs = [word[i:i + 2] for word in words for i in range(0, len(word), 2)]
        self.tokens += dict.fromkeys(pair for pair in pairs if pair not in self.tokens)
        return [self.tokens.index(pair) for pair in pairs]

    def decode_bytes(self, ids):
        return b"".join(self.tokens[i] for i in ids)


@pytest.fixture
def gpt2(monkeypatch):
    monkeypatch.setattr(eval_babilong, "GPT2Tokenizer", BytePairs)


@pytest.fixture(scope="module")
def run(checkout):
    """The folder of a small run."""
    code, _, err = checkout.call("train.py", "--dataset=babilong", "--corpus=play.txt",
                                 "--tasks=qa1", "--lengths=0k", *SMALL, "--max_iters=1",
                                 "--out_dir=out/tiny")
    assert code == 0, err
    return "out/tiny"


@pytest.fixture
def out_dir(tmp_path):
    """A folder for results."""
    return tmp_path / "results"


@pytest.fixture
def answer(call, out_dir, monkeypatch):
    """
    Evaluate with all answers wrong but the first, which takes no time -> exit code, output, errors,
    and the (run, length, task, number of questions) that were asked.
    """
    def evaluate_with_stub(*args):
        asked = []

        def stub(config, length, task, its_questions, run, bar):
            asked.append((run.about["run"], length, task, len(its_questions)))
            return "1".ljust(len(its_questions), "0")

        monkeypatch.setattr(eval_babilong, "evaluate", stub)
        code, out, err = call("eval_babilong.py", *args, *ON_CPU, f"--out_dir={out_dir}")
        return code, out, err, asked
    return evaluate_with_stub


def copy_run(checkout, run, folder, weight=None):
    """A copy of a run; weight: a number that its final norm gets, so that it is another model."""
    shutil.copytree(checkout.folder / run, checkout.folder / folder, dirs_exist_ok=True)
    if weight is not None:
        path = checkout.folder / folder / "best.pt"
        found = torch.load(path, weights_only=True)
        found["model"]["norm.weight"].fill_(weight)
        torch.save(found, path)
    return folder


def rows_in(out_dir):
    with open(out_dir / "results.csv", newline="") as f:
        return list(csv.DictReader(f))


def write_babi(folder, n_stories, task="qa1"):
    """A bAbI file with five questions a story."""
    folder.mkdir(parents=True, exist_ok=True)
    stories = [format_story(simulate(task, random.Random(i))) for i in range(n_stories)]
    path = folder / f"{task}_some-name_test.txt"
    path.write_text("".join(stories))
    return path


def write_record(folder, **changes):
    """A BABILong file with one record."""
    record = {"input": "Mary went to the garden. The loud play.", "question": "Where is Mary?",
              "target": "garden"} | changes
    (folder / "qa1").mkdir(parents=True, exist_ok=True)
    (folder / "qa1" / "1k.json").write_text(json.dumps([record]))


# --- Questions and answers

def test_an_answer_keeps_its_spaces_with_any_tokenizer():
    spaced = tokenizer_of(sentencepiece_metadata())
    for tokenizer, text in ((TOKENIZER, " in the garden."), (spaced, "in the garden.")):
        ids = torch.tensor(tokenizer.encode(text))[:, None]
        model = SimpleNamespace(stream=lambda *_, temperature, ids=ids: ids)
        run = Run(model, tokenizer, tokenizer, None, {})
        assert answer_to(torch.zeros(1, 1), run) == [" in the garden."]


def test_answers_end_at_the_first_full_stop():
    run = scribe(lambda text: "milk,football" if "football" in text else "nothing")
    ids = torch.tensor([TOKENIZER.encode(text) for text in (" a football ", " some grass ")])
    assert answer_to(ids, run) == [" milk,football.", " nothing."]


@pytest.mark.parametrize("length", ["0k", "1k"])
def test_every_question_is_asked_once_and_its_answer_marked_at_its_place(length):
    config = EvalConfig(runs=["x"], n_samples=20, batch_size=3)
    asked = questions(config, "qa1", length)
    known = {asked[0].text: asked[0].answer}
    run = scribe(lambda text: next((a for q, a in known.items() if text.endswith(q)), "nowhere"))
    answers = evaluate(config, length, "qa1", asked, run, Bar())
    right = [known.get(question.text) == question.answer for question in asked]
    assert answers == "".join("1" if is_right else "0" for is_right in right)
    assert any(right) and not all(right)
    read = [text[text.rindex("Where"):] for text in run.model.texts]
    expected = [question.text for question in asked]
    assert sorted(read) == sorted(expected)
    assert length != "0k" or read != expected, "what is read together is not asked in a row"
    assert all(length == "0k" or len(text) == 1000 for text in run.model.texts)


def test_prompts_of_equal_length_are_read_together():
    prompts = [np.zeros(length) for length in (3, 5, 3, 3, 5, 7)]
    found = [[n for n, _ in batch] for batch in batches(prompts, 2)]
    assert found == [[0, 2], [1, 4], [3], [5]]


def test_all_runs_get_the_same_questions_and_few_are_the_first_of_many(tmp_path):
    write_babi(tmp_path, 9)
    for source in ({}, {"babi_dir": str(tmp_path)}):
        def ask(n, length="1k"):
            return questions(EvalConfig(runs=["x"], n_samples=n, **source), "qa1", length)

        assert ask(40) == ask(40) != ask(40, "2k")
        assert ask(4) == ask(40)[:4] and len(ask(40)) == 40
    assert len(ask(99)) == 45, "a file has as many as it has"


def test_facts_are_hidden_in_text_that_training_never_saw(checkout, run, monkeypatch):
    monkeypatch.chdir(checkout.folder)
    found = load_run(run, EvalConfig(runs=[run]), "cpu")
    text = found.tokenizer.decode(found.haystack.ids.tolist())
    assert text.split() == split(TEXT)[1].split()


def test_another_text_is_used_whole_whatever_became_of_that_of_the_run(checkout, run, monkeypatch):
    other = copy_run(checkout, run, "out/text-lost")
    change_text(checkout.folder / other)
    monkeypatch.chdir(checkout.folder)
    Path("books").mkdir()
    Path("books/b.txt").write_text("It goes\ton.\r\n")
    Path("books/a.txt").write_text("A\u00a0small book.")
    for corpus, expected in (("play.txt", TEXT), ("books", "A small book. It goes on.")):
        found = load_run(other, EvalConfig(runs=[other], corpus=corpus), "cpu")
        text = found.tokenizer.decode(found.haystack.ids.tolist())
        assert text.split() == expected.split()
    write_record(Path("own-text"))
    load_run(other, EvalConfig(runs=[other], babilong_dir="own-text"), "cpu")


def read_by(run, length="500", **changes):
    """Questions, and as text what a Run reads for them in as many of GPT-2's tokens."""
    config = EvalConfig(runs=["x"], n_samples=9, **changes)
    asked = questions(config, "qa1", length)
    read = [run.tokenizer.decode(ids.tolist()) for ids in prompts(config, length, asked, run)]
    return asked, read


def test_texts_counted_in_gpt2s_tokens_are_like_those_in_the_runs_own(
        checkout, run, monkeypatch, gpt2):
    monkeypatch.chdir(checkout.folder)
    config = EvalConfig(runs=[run], count="gpt2", corpus="play.txt")
    found = load_run(run, config, "cpu")
    around = " " + " ".join([*TEXT.split()] * 2)
    for question, text in zip(*read_by(found), strict=True):
        assert len(BytePairs().encode(text)) == 500
        sentences = split_sentences(text)
        assert "".join(f" {sentence}" for sentence in sentences).endswith(text)
        hidden = (*question.context, question.text)
        assert [s for s in sentences if s in hidden] == list(hidden)
        assert "".join(f" {s}" for s in sentences if s not in hidden).strip() in around
    for question, text in zip(*read_by(found, rag=1), strict=True):
        assert len(split_sentences(text)) == 2 and text.endswith(f" {question.text}")
    _, bare = read_by(found, "0k")
    assert bare == read_by(scribe(str), "0k")[1], "a bare story needs no count"


def test_under_one_count_runs_of_any_tokenizer_read_the_same():
    counter = BytePairs()
    haystack = Haystack(TEXT, counter)
    tokenizers = TOKENIZER, make_tokenizer("bpe", TEXT, 300)
    texts = [read_by(Run(None, tokenizer, counter, haystack, {})) for tokenizer in tokenizers]
    assert texts[0] == texts[1]


def test_a_tokenizer_that_puts_a_space_before_a_text_reads_the_same():
    spaced, counter = tokenizer_of(sentencepiece_metadata()), BytePairs()
    haystack = Haystack(TEXT, counter)
    for changes in ({}, {"rag": 1}):
        read, expected = (read_by(Run(None, tokenizer, counter, haystack, {}), **changes)[1]
                          for tokenizer in (spaced, TOKENIZER))
        assert read == [text.removeprefix(" ") for text in expected]
    question = Question((), "Where is Mary?", "garden")
    ids = np.array(spaced.encode(question.text))
    assert spaced.decode(retrieve(ids, question, 3, spaced).tolist()) == question.text


def test_a_character_that_the_count_cuts_in_half_is_left_out():
    tokenizer, counter = make_tokenizer("char", "äöü. Where is he?", 0), BytePairs()
    run = Run(None, tokenizer, counter, Haystack("äöüäöüäöüäö.", counter), {})
    question = Question((), "Where is he?", "here")
    for length in range(10, 20):
        ids, = prompts(EvalConfig(runs=["x"]), str(length), [question], run)
        assert tokenizer.decode(ids.tolist()).strip(" äöü.") == "Where is he?"


def test_rag_keeps_the_nearest_sentences_in_order_and_the_question():
    facts = ("Mary went back to the old office there.", "John took the milk.",
             "Mary moved to the garden.")
    question = Question(facts, "Where is Mary?", "garden")
    ids = hide_question(question, 1500, HAYSTACK, TOKENIZER, np.random.default_rng(0))
    found = TOKENIZER.decode(retrieve(ids, question, 2, TOKENIZER).tolist())
    assert found == f" {facts[0]} {facts[2]} Where is Mary?"
    assert len(retrieve(ids, question, 10_000, TOKENIZER)) >= len(ids) - 1, "a large K keeps all"


def test_a_record_is_read_with_its_own_text_and_a_story_in_ours(tmp_path):
    write_record(tmp_path)
    record = {"babilong_dir": str(tmp_path)}

    def prompt(**changes):
        config = EvalConfig(runs=["x"], n_samples=1, **changes)
        asked = questions(config, "qa1", "1k")
        ids, = prompts(config, "1k", asked, scribe(str))
        return TOKENIZER.decode(ids.tolist())

    assert prompt(**record) == " Mary went to the garden. The loud play. Where is Mary?"
    assert prompt(**record, rag=1) == " Mary went to the garden. Where is Mary?"
    assert len(prompt()) == 1000 > len(prompt(rag=1))


def test_rag_of_an_empty_context_asks_the_bare_question():
    question = Question((), "Where is Mary?", "garden")
    ids = np.array(TOKENIZER.encode(" Where is Mary?"))
    assert TOKENIZER.decode(retrieve(ids, question, 3, TOKENIZER).tolist()) == " Where is Mary?"


# --- Results

def test_an_evaluation_writes_a_table_a_row_for_each_cell_and_a_picture(call, run, out_dir):
    code, out, err = call("eval_babilong.py", run, "--tasks=qa1,qa7", "--lengths=0k,300",
                          "--n_samples=3", *ON_CPU, f"--out_dir={out_dir}")
    assert code == 0, err
    assert "| 0k | qa1 | qa7 | avg |" in out and "| 300 | qa1 | qa7 | avg |" in out
    assert "| tiny |" in out
    rows = rows_in(out_dir)
    expected = [(length, task) for length in ("0k", "300") for task in ("qa1", "qa7")]
    assert [(row["length"], row["task"]) for row in rows] == expected
    for row in rows:
        assert (row["run"], row["source"], row["seed"], row["n"]) == (run, "simulated", "1337", "3")
        for what in ("checkpoint", "questions", "corpus"):
            assert len(row[f"{what}_sha256"]) == 64
        assert (row["corpus"], row["count"]) == ("", "own")
        assert len(row["answers"]) == 3 and row["answers"].count("1") == int(row["right"])
        assert float(row["accuracy"]) == int(row["right"]) / 3
        assert row["commit"] and row["torch"] and row["trained_on"] == "qa1"
        assert row["device"] == "cpu" and row["dtype"] == "float32" and int(row["parameters"]) > 0
    assert (out_dir / "babilong.png").read_bytes().startswith(b"\x89PNG")


def test_stories_longer_than_the_length_are_told(run, answer):
    _, out, _, _ = answer(run, "--tasks=qa1", "--lengths=0k,100,3k", "--n_samples=8")
    said = [line for line in out.splitlines() if "longer by themselves" in line]
    assert len(said) == 1 and said[0].startswith(f"{run}, qa1, 100: ") and "of 8" in said[0]


def test_after_ctrl_c_the_same_command_goes_on(call, run, out_dir, monkeypatch):
    command = ["eval_babilong.py", run, "--tasks=qa1,qa2", "--lengths=0k,300", "--n_samples=2",
               *ON_CPU, f"--out_dir={out_dir}"]
    asked = []

    def evaluate_three(config, length, task, *more):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((length, task))
        return "10"

    monkeypatch.setattr(eval_babilong, "evaluate", evaluate_three)
    code, out, err = call(*command)
    assert code == 130 and err.endswith("stopped; the same command goes on\n")
    assert "Traceback" not in err
    assert [(row["length"], row["task"]) for row in rows_in(out_dir)] == asked
    monkeypatch.setattr(eval_babilong, "evaluate",
                        lambda config, length, task, *more: asked.append((length, task)) or "10")
    code, out, err = call(*command)
    assert code == 0, err
    assert len(asked) == len(set(asked)) == len(rows_in(out_dir)) == 4, "and nothing is asked twice"


@pytest.mark.parametrize("weights", [(1, 2), (1, 1)])
def test_two_runs_of_the_same_folder_name_are_both_kept(checkout, run, answer, out_dir, weights):
    a = copy_run(checkout, run, "out/a/lm2", weights[0])
    b = copy_run(checkout, run, "out/b/lm2", weights[1])
    flags = ["--tasks=qa1", "--lengths=0k"]
    assert "| lm2 |" in answer(a, *flags)[1]
    _, out, _, asked = answer(b, *flags)
    assert len(asked) == 1
    assert [row["run"] for row in rows_in(out_dir)] == [a, b]
    assert "| lm2 (out/a/lm2) |" in out and "| lm2 (out/b/lm2) |" in out


def test_a_run_that_was_trained_on_is_asked_again_and_its_old_row_kept(
        checkout, run, answer, out_dir):
    folder = copy_run(checkout, run, "out/trained", 1)
    flags = [folder, "--tasks=qa1", "--lengths=0k"]
    answer(*flags)
    copy_run(checkout, run, folder, 2)
    _, out, _, asked = answer(*flags)
    assert len(asked) == 1
    first, second = (row["checkpoint_sha256"] for row in rows_in(out_dir))
    assert f"| trained ({first[:8]}) |" in out and f"| trained ({second[:8]}) |" in out
    assert answer(*flags)[3] == []


def test_a_run_has_one_name_wherever_the_path_begins(checkout, run, answer):
    flags = ["--tasks=qa1", "--lengths=0k"]
    assert len(answer(run, *flags)[3]) == 1
    assert answer(f"./{run}/", *flags)[3] == []
    assert answer(str(checkout.folder / run), *flags)[3] == []


def test_what_was_asked_otherwise_is_asked_again_and_has_a_line_of_its_own(
        checkout, run, answer, out_dir, gpt2):
    (checkout.folder / "book.txt").write_text("A small book. It ends.")
    flags = [run, "--tasks=qa1", "--lengths=0k"]
    others = ["--rag=2", "--corpus=book.txt", "--count=gpt2"]
    for more in ([], *([other] for other in others)):
        _, out, _, asked = answer(*flags, *more)
        assert len(asked) == 1
    for name in ("tiny", "tiny + RAG (2 sentences)", "tiny in book.txt", "tiny, GPT-2's tokens"):
        assert f"| {name} |" in out
    assert len(rows_in(out_dir)) == 4


def test_a_corpus_that_changed_is_asked_again_and_has_a_line_of_its_own(
        checkout, run, answer, out_dir):
    book = checkout.folder / "changing.txt"
    book.write_text("A small book. It ends.")
    flags = [run, "--tasks=qa1", "--lengths=0k,300", "--n_samples=2"]
    assert len(answer(*flags, "--corpus=changing.txt")[3]) == 2
    assert answer(*flags, f"--corpus={book}")[3] == [], "the same one, wherever the path begins"
    book.write_text("Another book. It goes on.")
    _, out, _, asked = answer(*flags, "--corpus=changing.txt")
    assert len(asked) == 2
    first, second = dict.fromkeys(row["corpus_sha256"] for row in rows_in(out_dir))
    assert second == hashlib.sha256(book.read_bytes()).hexdigest()
    for sha256 in (first, second):
        assert out.count(f"| tiny in changing.txt ({sha256[:8]}) |") == 2
    assert [row["corpus"] for row in rows_in(out_dir)] == ["changing.txt"] * 4


def test_other_seeds_and_sources_stay_in_the_file_and_out_of_the_table(
        checkout, run, answer, out_dir):
    for folder in ("one", "same"):  # one question, so that it is the same whatever the seed
        path = write_babi(checkout.folder / folder, 0)
        path.write_text("1 Mary went to the garden.\n2 Where is Mary?\tgarden\t1\n")
    flags = [run, "--tasks=qa1"]

    def lengths(out):
        return [line.split()[1] for line in out.splitlines() if "avg" in line]

    answer(*flags, "--babi_dir=one", "--lengths=0k")
    _, out, _, _ = answer(*flags, "--babi_dir=one", "--lengths=100", "--seed=5")
    assert lengths(out) == ["100"]
    _, out, _, _ = answer(*flags, "--babi_dir=same", "--lengths=200")
    assert lengths(out) == ["200"]
    _, out, _, _ = answer(*flags, "--lengths=300", "--n_samples=1")
    assert lengths(out) == ["300"]
    found = [(row["source"], row["seed"]) for row in rows_in(out_dir)]
    assert found == [("one", "1337"), ("one", "5"), ("same", "1337"), ("simulated", "1337")]
    _, out, _, asked = answer(*flags, "--babi_dir=one", "--lengths=0k")
    assert asked == [] and lengths(out) == ["0k"]


def test_more_questions_are_asked_and_fewer_again_lose_nothing(checkout, run, answer, out_dir):
    write_babi(checkout.folder / "babi-many", 9)
    flags = [run, "--tasks=qa1", "--lengths=0k", "--babi_dir=babi-many"]
    assert answer(*flags, "--n_samples=4")[3] == [(run, "0k", "qa1", 4)]
    _, out, _, asked = answer(*flags, "--n_samples=40")
    assert asked == [(run, "0k", "qa1", 40)] and "| 40 |" in out
    _, out, _, asked = answer(*flags, "--n_samples=4")
    assert asked == [] and "| 4 |" in out
    assert [row["n"] for row in rows_in(out_dir)] == ["4", "40"]


def test_a_changed_file_is_asked_again_and_the_table_shows_the_new_answers(
        checkout, run, answer, out_dir):
    path = write_babi(checkout.folder / "babi-changed", 2)
    flags = [run, "--tasks=qa1", "--lengths=0k", "--babi_dir=babi-changed"]
    answer(*flags)
    before = path.read_text()
    path.write_text(before.replace("kitchen", "garden"))
    code, out, _, asked = answer(*flags)
    assert code == 0 and len(asked) == 1
    assert len(rows_in(out_dir)) == 2 and out.count("| tiny |") == 1
    path.write_text(before)
    assert answer(*flags)[3] == [], "the old row answers the old file"


def test_a_changed_simulator_is_asked_again(run, answer, out_dir, monkeypatch):
    flags = [run, "--tasks=qa1", "--lengths=0k,300", "--n_samples=3"]
    answer(*flags)

    def longer(task, rng):
        return [*simulate(task, rng), *simulate(task, rng)]

    monkeypatch.setattr(eval_babilong, "simulate", longer)
    code, out, _, asked = answer(*flags[:2], "--lengths=0k", "--n_samples=3")
    assert code == 0 and len(asked) == 1 and len(rows_in(out_dir)) == 3
    assert "| 300 |" not in out, "what nobody would ask any more is not shown"


def test_rows_that_another_evaluation_adds_meanwhile_are_kept(call, run, out_dir, monkeypatch):
    def evaluate_beside_another(config, length, task, asked, its_run, bar):
        if task == "qa2":
            other = results.load(out_dir / "results.csv")[0]
            results.add(out_dir / "results.csv", other | {"run": "out/other"})
        return "1" * len(asked)

    monkeypatch.setattr(eval_babilong, "evaluate", evaluate_beside_another)
    code, _, err = call("eval_babilong.py", run, "--tasks=qa1,qa2", "--lengths=0k", *ON_CPU,
                        f"--out_dir={out_dir}")
    assert code == 0, err
    assert [row["run"] for row in rows_in(out_dir)] == [run, "out/other", run]


@pytest.mark.parametrize("name, damage", [
    ("cut short", lambda text: text[:-20]),
    ("cut in the last cell", lambda text: text[:-1]),
    ("empty", lambda text: ""),
    ("foreign header", lambda text: text.replace("length", "lenght", 1)),
    ("foreign file", lambda text: "model,length,task,n,right,accuracy\nlm2,0k,qa1,1,1,1.0\n"),
    ("extra column", lambda text: text.replace("device\n", "device,note\n")),
    ("extra cell", lambda text: text.replace("cpu\n", "cpu,x\n")),
    ("no number", lambda text: text.replace(",1337,", ",many,")),
    ("no length", lambda text: text.replace(",0k,", ",near,")),
    ("no questions", lambda text: text.replace(",2,1,10,0.5,", ",0,0,,0.0,")),
    ("another accuracy", lambda text: text.replace(",2,1,10,0.5,", ",2,1,10,0.75,")),
    ("an answer too few", lambda text: text.replace(",2,1,10,0.5,", ",2,1,1,0.5,")),
    ("a right answer too many", lambda text: text.replace(",2,1,10,0.5,", ",2,1,11,0.5,")),
    ("half an answer", lambda text: text.replace(",2,1,10,0.5,", ",2,1,1?,0.5,")),
    ("open quote", lambda text: text.replace("cpu\n", '"cpu\n')),
    ("not UTF-8", lambda text: text + "\udcff"),
    ("blank line", lambda text: text + "\n"),
])
def test_a_damaged_store_is_refused_and_left_as_it_is(run, answer, out_dir, name, damage):
    flags = [run, "--tasks=qa1", "--lengths=0k", "--n_samples=2"]
    assert answer(*flags)[0] == 0
    path = out_dir / "results.csv"
    before = path.read_text()
    path.write_text(damage(before), errors="surrogateescape")
    damaged = path.read_bytes()
    assert damaged != before.encode(), "the test does damage"
    code, _, err, asked = answer(*flags, "--seed=2")
    assert code == 2 and "results.csv" in err and err.count("\n") == 1
    assert asked == [] and path.read_bytes() == damaged


def test_a_full_disk_ends_in_one_line_and_the_store_stays_whole(run, answer, out_dir, monkeypatch):
    flags = [run, "--tasks=qa1", "--n_samples=2"]
    answer(*flags, "--lengths=0k")
    before = (out_dir / "results.csv").read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    code, _, err, _ = answer(*flags, "--lengths=300")
    assert code == 2 and "results.csv" in err and "No space left" in err
    assert "Traceback" not in err and err.rstrip().rsplit("\n", 1)[-1].startswith("error: ")
    assert (out_dir / "results.csv").read_bytes() == before
    assert [path.name for path in out_dir.glob(".*")] == []


def test_an_evaluation_that_goes_on_keeps_its_dtype(call, run, out_dir, monkeypatch):
    asked = []
    monkeypatch.setattr(eval_babilong, "evaluate", lambda *args: asked.append(args) or "1" * 100)
    command = ["eval_babilong.py", run, "--tasks=qa1", "--lengths=0k", "--device=cpu",
               f"--out_dir={out_dir}"]
    for faster in ("float32", "bfloat16"):  # a busy machine times them differently
        monkeypatch.setattr(eval_babilong, "pick_dtype", lambda name, device: faster)
        assert call(*command)[0] == 0
    assert len(asked) == 1
    assert call(*command, "--dtype=bfloat16")[0] == 0
    assert len(asked) == 2, "unless it is told another one"


def test_results_do_not_need_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert origin(torch.device("cpu"))["commit"] == "unknown"


# --- What is refused at the door

@pytest.mark.parametrize("changes, missing", [
    ({"input": "Mary went to the garden. The loud pläy."}, "ä"),
    ({"question": "Where is Mary… now?"}, "…"),
])
def test_a_character_that_a_run_lacks_is_told_before_anything_is_asked(
        checkout, run, answer, changes, missing):
    write_babi(checkout.folder / "mixed", 1)
    write_record(checkout.folder / "mixed", **changes)
    shutil.copy(checkout.folder / "mixed/qa1/1k.json", checkout.folder / "mixed/qa1/2k.json")
    write_record(checkout.folder / "mixed")
    code, _, err, asked = answer(run, "--tasks=qa1", "--lengths=1k,2k", "--babilong_dir=mixed")
    assert code == 2 and err.count("\n") == 1 and asked == []
    for word in (run, "qa1", "2k", repr(missing)):
        assert word in err


@pytest.mark.parametrize("count", ["own", "gpt2"])
def test_a_corpus_with_a_character_that_a_run_lacks_is_refused(
        checkout, run, answer, out_dir, gpt2, count):
    (checkout.folder / "umlaut.txt").write_text("The loud pläy.")
    code, _, err, asked = answer(run, "--lengths=0k", "--corpus=umlaut.txt", f"--count={count}")
    assert is_one_line(code, err, run, "umlaut.txt", "'ä'", "leave it out") and asked == []
    assert not (out_dir / "results.csv").exists()


def test_gpt2s_tokens_without_a_network_are_refused(run, answer, out_dir, monkeypatch):
    def unreachable(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    code, _, err, asked = answer(run, "--lengths=0k", "--count=gpt2")
    assert is_one_line(code, err, "count=gpt2", "TIKTOKEN_CACHE_DIR", "--count=own")
    assert "--tokenizer" not in err, "which this program does not have"
    assert asked == [] and not (out_dir / "results.csv").exists()


@pytest.mark.parametrize("text", ["", "1 Mary went to the garden.\n2 John sat.\n"])
def test_a_file_without_questions_is_refused_and_stores_nothing(
        checkout, run, answer, out_dir, text):
    path = write_babi(checkout.folder / "babi-empty", 0)
    path.write_text(text)
    code, _, err, asked = answer(run, "--tasks=qa1", "--lengths=0k", "--babi_dir=babi-empty")
    assert code == 2 and path.name in err and err.count("\n") == 1
    assert asked == [] and not (out_dir / "results.csv").exists()


def damage_best(folder):
    path = folder / "best.pt"
    path.write_bytes(path.read_bytes()[:1000])


def damage_config(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["train"]["corpus"]
    (folder / "config.json").write_text(json.dumps(config))


def train_on_text(folder):
    config = json.loads((folder / "config.json").read_text())
    config["train"]["dataset"] = "shakespeare"
    (folder / "config.json").write_text(json.dumps(config))


def change_text(folder):
    config = json.loads((folder / "config.json").read_text())
    config["data"]["sha256"] = 7
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("damage, message", [
    (damage_best, "best.pt is damaged"),
    (damage_config, "config.json in out/damage_config is damaged"),
    (train_on_text, "was trained on shakespeare"),
    (change_text, "not the one of its training"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
])
def test_a_damaged_or_foreign_run_is_refused(checkout, run, answer, damage, message):
    bad = copy_run(checkout, run, f"out/{damage.__name__.strip('<>')}")
    damage(checkout.folder / bad)
    code, _, err, asked = answer(run, bad, "--tasks=qa1", "--lengths=0k")
    assert code == 2 and message in err and err.count("\n") == 1 and asked == []


@pytest.mark.parametrize("args, message", [
    ([], "runs is empty"),
    (["out/nowhere"], "out/nowhere"),
    (["RUN", "--tasks=qa12"], "task qa12"),
    (["RUN", "--tasks="], "tasks"),
    (["RUN", "--lengths=1q"], "1q"),
    (["RUN", "--lengths=1k,1000"], "1000"),
    (["RUN", "--lengths=999999999M"], "too long"),
    (["RUN", "--n_samples=0"], "n_samples=0"),
    (["RUN", "--batch_size=0"], "batch_size=0"),
    (["RUN", "--rag=-1"], "rag=-1"),
    (["RUN", "--count=words"], "count=words is not known: use own or gpt2"),
    (["RUN", "--corpus=nowhere"], "corpus=nowhere"),
    (["RUN", "--babilong_dir=a", "--corpus=play.txt"], "leave out --corpus"),
    (["RUN", "--babilong_dir=a", "--count=gpt2"], "leave out --corpus and --count"),
    (["RUN", "RUN"], "named twice"),
    (["RUN", "--tasks=qa1,qa1"], "qa1 twice"),
    (["RUN", "--lengths=1k,1000"], "1000 tokens twice"),
    (["RUN", "--tasks=,"], "lists nothing"),
    (["RUN", "./RUN/"], "named twice"),
    (["RUN", "--babi_dir=nowhere"], "nowhere"),
    (["RUN", "--babilong_dir=nowhere"], "nowhere"),
    (["RUN", "--babi_dir=a", "--babilong_dir=b"], "exclude each other"),
    (["RUN", "--tasks=qa1", "--lengths=0k", "--out_dir=play.txt"], "out_dir=play.txt"),
])
def test_bad_input_is_refused_in_one_line(call, run, args, message):
    args = [arg.replace("RUN", run) for arg in args]
    code, _, err = call("eval_babilong.py", "--out_dir=out/eval-refused", *args)
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_malformed_record_is_told_with_its_place(checkout, run, answer):
    write_record(checkout.folder / "malformed", target=7)
    code, _, err, asked = answer(run, "--tasks=qa1", "--lengths=1k", "--babilong_dir=malformed")
    assert code == 2 and "record 1" in err and err.count("\n") == 1 and asked == []


def test_lists_may_have_spaces_and_flags_stand_between_runs(checkout, run, answer):
    other = copy_run(checkout, run, "out/other", 3)
    code, _, err, asked = answer(run, "--tasks=qa1, qa2", other, "--lengths= 0k,",
                                 "--n_samples=2")
    assert code == 0, err
    expected = [(folder, "0k", task, 2) for task in ("qa1", "qa2") for folder in (run, other)]
    assert asked == expected, "and each is asked once"


def test_a_console_without_plus_minus_sees_the_table(checkout, run, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    code, out, err = checkout.run("eval_babilong.py", run, "--tasks=qa1", "--lengths=0k",
                                  "--n_samples=2", *ON_CPU, "--out_dir=out/ascii")
    assert code == 0 and "Traceback" not in err
    assert "| 0k | qa1 | avg |" in out and " ? " in out


def test_real_files_are_evaluated(checkout, call, run, out_dir):
    write_babi(checkout.folder / "real", 3)
    write_record(checkout.folder / "real")
    flags = [run, "--tasks=qa1", "--n_samples=9", *ON_CPU, f"--out_dir={out_dir}"]
    code, out, err = call("eval_babilong.py", *flags, "--babi_dir=real", "--lengths=0k,300")
    assert code == 0 and "| 300 | qa1 | avg |" in out, err
    code, out, err = call("eval_babilong.py", *flags, "--babilong_dir=real", "--lengths=1k")
    assert code == 0 and "| 1k | qa1 | avg |" in out, err
    assert [row["n"] for row in rows_in(out_dir)] == ["9", "9", "1"]


def test_no_other_program_writes_into_the_default_folder():
    assert Path(EvalConfig(runs=["x"]).out_dir) != Path("out/babilong")  # train.py's for stories


# --- Tables

def row(name="mine", **changes):
    """A row of results.csv."""
    found = {"run": f"out/{name}", "checkpoint_sha256": "a" * 64, "rag": 0, "count": "own",
             "corpus": "", "corpus_sha256": "c" * 64, "dtype": "float32", "length": "0k",
             "task": "qa1", "n": 10, "right": 9}
    return found | changes


def test_the_interval_of_an_average_is_that_of_its_tasks():
    mean, half = average([(100, 50), (100, 90)])
    shares = [52 / 104, 92 / 104]
    variance = sum(share * (1 - share) / 104 for share in shares) / 4
    assert mean == 70 and half == pytest.approx(196 * variance ** 0.5)


def test_names_tell_apart_what_differs():
    rows = [row("lm2"), row("a/rmt"), row("b/rmt"), row("lm2", rag=3),
            row("full"), row("full", checkpoint_sha256="b" * 64),
            row("half"), row("half", dtype="bfloat16"),
            row("in", corpus="a/book"), row("in", corpus="b/book"),
            row("old", corpus="play"), row("old", corpus="play", corpus_sha256="d" * 64),
            row("all", rag=3, corpus="play", count="gpt2")]
    assert list(names(rows).values()) == [
        "lm2", "rmt (out/a/rmt)", "rmt (out/b/rmt)", "lm2 + RAG (3 sentences)",
        "full (aaaaaaaa)", "full (bbbbbbbb)", "half (float32)", "half (bfloat16)",
        "in in book (a/book)", "in in book (b/book)",
        "old in play (cccccccc)", "old in play (dddddddd)",
        "all + RAG (3 sentences) in play, GPT-2's tokens"]


def test_the_largest_number_of_questions_up_to_the_wanted_one_counts():
    rows = [row(n=n, right=right) for n, right in ((40, 10), (4, 4), (100, 60))]
    for n_samples, percent in ((4, 100), (50, 25), (100, 60), (1, 60)):
        line, = make_tables(rows, n_samples, paper=False)["0k"]
        assert line.accuracy == {"qa1": percent}


@pytest.mark.parametrize("other", [{"corpus": "book.txt"}, {"corpus_sha256": "d" * 64},
                                   {"count": "gpt2"}])
def test_answers_in_different_texts_are_not_averaged(other):
    rows = [row(right=9), row(right=1, **other), row(task="qa2", right=3, **other)]
    first, second = make_tables(rows, 10, paper=False)["0k"]
    assert first.accuracy == {"qa1": 90} and second.accuracy == {"qa1": 10, "qa2": 30}


def test_the_answers_to_many_questions_are_loaded(tmp_path):
    found = dict.fromkeys(results.COLUMNS, 1) | {"length": "0k"}
    found |= {"n": 200_000, "right": 100_000, "answers": "10" * 100_000, "accuracy": 0.5}
    results.add(tmp_path / "results.csv", found)
    csv.field_size_limit(1 << 17)  # as in a new process
    assert results.load(tmp_path / "results.csv")[0]["answers"] == found["answers"]


def test_the_papers_rows_stand_beside_ours():
    rows = [row(), row(task="qa2", right=5), row(length="512")]
    rows += [row(length=length) for length in ("64k", "8000", "12k", "128k")]
    tables = make_tables(rows, 10, paper=True)
    assert list(tables) == ["0k", "512", "8000", "12k", "64k", "128k"]
    lines = {line.name: line for line in tables["0k"]}
    assert lines["paper: LM2-1.7B"].accuracy == {"qa1": 99.0, "qa2": 89.0}
    assert lines["paper: LM2-1.7B"].average == 94.0
    assert lines["mine"].accuracy == {"qa1": 90.0, "qa2": 50.0} and lines["mine"].average == 70.0
    assert [line.name for line in tables["512"]] == ["mine"]

    rows = [row(task=task) for task in reversed(TASKS)]
    far = {line.name: line for line in make_tables(rows, 10, paper=True)["0k"]}
    assert list(far["paper: LM2-1.7B"].accuracy) == TASKS, "a sum that is always the same"

    def of_paper(length):
        return {line.name: line.accuracy["qa1"] for line in tables[length]
                if "LM2" in line.name}

    assert of_paper("8000") == {"paper: LM2-1.7B": 34.0}
    assert of_paper("64k") == {"paper: LM2-1.7B": 19.0}
    assert of_paper("128k") == {"paper: LM2-1.7B": 15.0}
    assert of_paper("12k") == {"paper: LM2-1.7B (>=8k)": 23.8}, "the mean, where it has no other"
    assert "paper: LM2-1.7B" in markdown(tables)


def test_the_legend_hides_no_curve(tmp_path, monkeypatch):
    lines = [TableLine(f"a run with a long name {i}", {"qa1": 50}, 50, 10, 9) for i in range(12)]
    figures, savefig = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    plot({"0k": lines, "1k": lines[:3]}, tmp_path / "babilong.png")
    figure, = figures
    monkeypatch.undo()
    legend, = figure.legends
    axes, = figure.axes
    assert len(legend.get_texts()) == 12
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    assert axes.get_window_extent().height > 200, "and leaves room for them"
    error_bars = [container for container in axes.containers if container.has_yerr]
    assert len(error_bars) == 12


def test_the_picture_is_replaced_by_a_whole_one_only(tmp_path, monkeypatch):
    path = tmp_path / "babilong.png"
    path.write_bytes(b"old")

    def savefig(self, f, **more):
        f.write(b"half a pict")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(OSError):
        plot({"0k": [TableLine("x", {"qa1": 50}, 50, 10, 9)]}, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
