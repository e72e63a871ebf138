"""eval_babilong.py: answers, scores, tables, files, the RAG baseline."""
import copy
import csv
import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import SMALL, TEXT

import eval_babilong
from data import tokenizer as tokenizers
from data.babi import format_story, simulate
from data.babilong import Haystack, Sample, evaluation_sample
from data.curriculum import tokenizer_text
from data.text import split
from eval_babilong import (
    EvalConfig,
    average,
    bm25,
    describe,
    evaluate,
    questions,
    retrieve,
    rows_by_length,
    sharpen_gates,
    write_answers,
)
from lm2 import LM2, LM2Config

TOKENIZER = tokenizers.build("char", tokenizer_text(TEXT), 0)


class Scribe(torch.nn.Module):
    """A model that answers by a function of what it read, and then goes on writing."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.read, self.p = answer, [], torch.nn.Parameter(torch.zeros(1))

    def stream(self, idx, max_new_tokens, temperature):
        assert temperature == 0, "answers are generated greedily"
        self.read += [TOKENIZER.decode(row.tolist()) for row in idx]
        texts = [TOKENIZER.encode(f" {self.answer(text)}. John went") for text in self.read[-len(idx):]]
        for i in range(max_new_tokens):
            yield torch.tensor([text[min(i, len(text) - 1)] for text in texts])


@pytest.fixture(scope="module")
def run(checkout):
    """The folder of a small run."""
    code, _, err = checkout.run("train.py", "--dataset=babilong", "--corpus=play.txt", "--tasks=qa1", "--lengths=0k", *SMALL, "--max_iters=1",
                                "--out_dir=out/tiny", "--overwrite")
    assert code == 0, err
    return "out/tiny"


def test_answers_end_at_the_first_full_stop():
    model = Scribe(lambda text: "milk,football" if "football" in text else "nothing")
    ids = torch.tensor([TOKENIZER.encode(text) for text in (" a football ", " some grass ")])
    assert write_answers(model, TOKENIZER, ids) == [" milk,football.", " nothing."]


@pytest.mark.parametrize("length", ["0k", "1k"])
def test_every_question_is_asked_once_and_the_right_answers_are_counted(length):
    config = EvalConfig(runs=["x"], n_samples=20, batch_size=3)
    asked = questions(config, "qa1", length)
    known = {sample.question: sample.answer for sample in asked[:1]}
    model = Scribe(lambda text: next((a for q, a in known.items() if text.endswith(q)), "nowhere"))
    bar = type("Bar", (), {"update": lambda self: None})()
    n, right = evaluate(config, "qa1", length, model, TOKENIZER, Haystack(TEXT, TOKENIZER), bar)
    expected = sum(known.get(sample.question) == sample.answer for sample in asked)
    assert (n, right) == (20, expected) and right >= 1
    assert len(model.read) == 20 and all(length == "0k" or len(text) == 1000 for text in model.read)


def test_all_models_get_the_same_questions():
    config = EvalConfig(runs=["x"], n_samples=5)
    assert questions(config, "qa2", "1k") == questions(config, "qa2", "1k") != questions(config, "qa2", "2k")


def test_facts_are_hidden_in_text_that_training_never_saw(checkout, run, monkeypatch):
    monkeypatch.chdir(checkout.folder)
    _, tokenizer, haystack, _ = describe(run, EvalConfig(runs=[run], device="cpu"))
    assert tokenizer.decode(haystack.ids.tolist()).split() == split(TEXT)[1].split()


def test_bm25_by_hand():
    sentences = ["Mary went to the office.", "The cat sat.", "The milk is in the office of Mary."]
    idf = lambda n: math.log(1 + (3 - n + 0.5) / (n + 0.5))
    term = lambda n, count, size: idf(n) * count * 2.5 / (count + 1.5 * (0.25 + 0.75 * size / (16 / 3)))
    expected = [term(2, 1, 5), 0, term(2, 1, 8) + term(1, 1, 8)]
    np.testing.assert_allclose(bm25(sentences, "Mary milk?"), expected)


def test_rag_keeps_the_nearest_sentences_in_order_and_the_question():
    sample = Sample(("Mary went back to the old office there.", "John took the milk.", "Mary moved to the garden."), "Where is Mary?", "garden")
    ids = evaluation_sample(sample, 1500, Haystack(TEXT, TOKENIZER), TOKENIZER, np.random.default_rng(0))
    assert TOKENIZER.decode(retrieve(ids, sample, 2, TOKENIZER).tolist()) == " Mary went back to the old office there. Mary moved to the garden. Where is Mary?"
    assert len(retrieve(ids, sample, 10_000, TOKENIZER)) >= len(ids) - 1, "K beyond the context keeps all of it"


def test_interval_of_an_average():
    mean, half = average({"qa1": (100, 50), "qa2": (100, 90)})
    p = [52 / 104, 92 / 104]
    assert mean == 70 and half == pytest.approx(1.96 * math.sqrt(sum(x * (1 - x) / 104 for x in p)) / 2 * 100)


def test_paper_rows_stand_beside_ours():
    results = {"runs": {"mine": {"cells": {"0k": {"qa1": [10, 9], "qa2": [10, 5]}, "64k": {"qa1": [10, 1]}, "512": {"qa1": [10, 3]}}}}}
    tables = rows_by_length(results, paper=True)
    assert list(tables) == ["0k", "512", "64k"]
    rows = {name: (accuracy, mean) for name, accuracy, mean, _ in tables["0k"]}
    assert rows["paper: LM2-1.7B"] == ({"qa1": 99.0, "qa2": 89.0}, 94.0) and rows["mine"] == ({"qa1": 90.0, "qa2": 50.0}, 70.0)
    assert "paper: LM2-1.7B" in {row[0] for row in tables["64k"]} and len(tables["512"]) == 1


def test_evaluation_writes_its_files_and_goes_on_where_it_stopped(checkout, call, run, monkeypatch):
    flags = ["--tasks=qa1,qa7", "--lengths=0k,300", "--n_samples=3", "--out_dir=out/eval", "--device=cpu", "--dtype=float32"]
    cells, evaluate_cell = [], eval_babilong.evaluate

    def interrupted(*args):
        if len(cells) == 3:
            raise KeyboardInterrupt
        cells.append(args[1:3])
        return evaluate_cell(*args)
    monkeypatch.setattr(eval_babilong, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call("eval_babilong.py", run, *flags)
    monkeypatch.setattr(eval_babilong, "evaluate", lambda *args: cells.append(args[1:3]) or evaluate_cell(*args))
    code, out, err = call("eval_babilong.py", run, *flags)
    assert code == 0, err
    assert len(cells) == len(set(cells)) == 4, "nothing was evaluated twice"
    assert "| 0k | qa1 | qa7 | avg |" in out and "| tiny |" in out
    folder = checkout.folder / "out/eval"
    results = json.loads((folder / "results.json").read_text())
    assert results["seed"] == 1337 and results["source"] == "simulated"
    about = results["runs"]["tiny"]
    assert len(about["checkpoint_sha256"]) == 64 and about["commit"] and len(about["corpus_sha256"]) == 64
    with open(folder / "results.csv", newline="") as f:
        assert [(row["length"], row["task"], row["n"]) for row in csv.DictReader(f)] == [(l, t, "3") for l in ("0k", "300") for t in ("qa1", "qa7")]
    assert (folder / "babilong.png").read_bytes().startswith(b"\x89PNG")


def test_rag_rows_join_the_table(call, run):
    code, out, err = call("eval_babilong.py", run, "--rag=2", "--tasks=qa1", "--lengths=300", "--n_samples=2", "--out_dir=out/eval-rag")
    assert code == 0 and "| tiny + RAG (2 sentences) |" in out, err


def test_sharper_gates_have_their_logits_times_a_factor():
    model = LM2(LM2Config(vocab_size=9, n_embd=32))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    sharper = copy.deepcopy(model)
    sharpen_gates(sharper, 2.0)
    x = torch.randn(3, 5, 32)
    for block, other in zip(model.blocks, sharper.blocks):
        for gate, sharp in zip(block.memory.gates(x, x), other.memory.gates(x, x)):
            torch.testing.assert_close(sharp.logit(), 2 * gate.logit(), rtol=1e-3, atol=1e-3)
    changed = {name.split(".")[-2] for (name, p), q in zip(model.named_parameters(), sharper.parameters()) if not torch.equal(p, q)}
    assert changed == {"w_in", "w_forget"}, "and nothing else"


def test_a_memory_with_sharper_gates_has_a_row_of_its_own(checkout, call, run, monkeypatch):
    flags = ["--tasks=qa1", "--lengths=0k", "--n_samples=2", "--out_dir=out/eval-sharp"]
    assert call("eval_babilong.py", run, *flags)[0] == 0
    code, out, err = call("eval_babilong.py", run, "--gate_sharpness=2", *flags)
    assert code == 0 and "| tiny |" in out and "| tiny + gates x 2 |" in out, err
    monkeypatch.chdir(checkout.folder)
    biases = [describe(run, EvalConfig(runs=[run], gate_sharpness=factor))[0].blocks[0].memory.w_forget.bias for factor in (1.0, 2.0)]
    assert torch.equal(2 * biases[0], biases[1])


def test_gates_of_a_model_without_memory_are_refused(call):
    code, _, err = call("train.py", "--dataset=babilong", "--corpus=play.txt", "--tasks=qa1", "--lengths=0k", *SMALL, "--max_iters=0",
                        "--memory=none", "--out_dir=out/bare", "--overwrite")
    assert code == 0, err
    code, _, err = call("eval_babilong.py", "out/bare", "--gate_sharpness=2", "--out_dir=out/eval-refused")
    assert code == 2 and "memory=none" in err and err.count("\n") == 1


def test_real_babi_files_are_evaluated(checkout, call, run):
    folder = checkout.folder / "babi"
    folder.mkdir()
    (folder / "qa1_single-supporting-fact_test.txt").write_text("".join(format_story(simulate("qa1", random.Random(i))) for i in range(3)))
    code, out, err = call("eval_babilong.py", run, "--tasks=qa1", "--lengths=0k,300", "--n_samples=9", "--babi_dir=babi", "--out_dir=out/eval-babi")
    assert code == 0 and "| 300 | qa1 | avg |" in out, err
    assert json.loads((checkout.folder / "out/eval-babi/results.json").read_text())["runs"]["tiny"]["cells"]["0k"]["qa1"][0] == 9


def test_real_babilong_records_are_evaluated(checkout, call, run):
    folder = checkout.folder / "records" / "qa1"
    folder.mkdir(parents=True)
    (folder / "1k.json").write_text(json.dumps([{"input": "Mary went to the garden. The loud play.", "question": "Where is Mary?", "target": "garden"}]))
    code, out, err = call("eval_babilong.py", run, "--tasks=qa1", "--lengths=1k", "--babilong_dir=records", "--out_dir=out/eval-records")
    assert code == 0 and "| 1k | qa1 | avg |" in out, err


@pytest.mark.parametrize("args, message", [
    ([], "runs is empty"),
    (["out/nowhere"], "out/nowhere"),
    (["RUN", "--tasks=qa12"], "task qa12"),
    (["RUN", "--lengths=1q"], "1q"),
    (["RUN", "--n_samples=0"], "n_samples=0"),
    (["RUN", "--gate_sharpness=0"], "gate_sharpness=0"),
    (["RUN", "--gate_sharpness=nan"], "gate_sharpness=nan"),
    (["RUN", "RUN"], "different names"),
    (["RUN", "--babi_dir=nowhere"], "nowhere"),
    (["RUN", "--babi_dir=a", "--babilong_dir=b"], "exclude each other"),
    (["RUN", "--tasks=qa1", "--lengths=0k", "--out_dir=play.txt"], "out_dir=play.txt"),
])
def test_bad_input_is_refused_in_one_line(call, run, args, message):
    code, _, err = call("eval_babilong.py", "--out_dir=out/eval-refused", *(run if arg == "RUN" else arg for arg in args))
    assert code == 2 and message in err and err.count("\n") == 1


def test_results_for_other_questions_are_not_mixed(call, run):
    flags = ["--tasks=qa1", "--lengths=0k", "--n_samples=1", "--out_dir=out/eval-mixed"]
    assert call("eval_babilong.py", run, *flags)[0] == 0
    code, _, err = call("eval_babilong.py", run, *flags, "--seed=5")
    assert code == 2 and "seed=1337, not 5" in err
