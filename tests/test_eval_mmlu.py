"""eval_mmlu.py: likelihoods of choices, and results that nobody loses."""
import csv
import json
import shutil
import string
from copy import copy
from pathlib import Path

import pytest
import torch
from conftest import SMALL, is_one_line
from test_mmlu import questions, write_csvs

import eval_mmlu
from data.mmlu import Item, Question, make_prompt
from data.tokenizer import CharTokenizer
from eval_mmlu import Run, encode, evaluate, score
from lib import checkpoint
from lm2 import LM2Config

TINY = Path(__file__).parent / "tiny_llama"
TOKENIZER = CharTokenizer(string.printable)
ON_CPU = ["--device=cpu", "--dtype=float32"]
THREE = ("anatomy", "college_physics", "sociology")
PROMPTS = [make_prompt("anatomy", Item(questions("x", 2), question), cloze)
           for question in (Question("Why?", ("a", "be", "see it", "dear"), 2),
                            Question("And how long is it?", ("yes", "no", "no!", "1002"), 0))
           for cloze in (False, True)]


class Bar:
    def update(self):
        pass


def random_model(**changes):
    """A small model whose weights, those of the banks included, are not the ones it starts with."""
    torch.manual_seed(1)
    config = {"n_layer": 2, "n_embd": 16, "n_head": 2, "block_size": 8, "mem_slots": 8} | changes
    model = checkpoint.make_model(LM2Config(vocab_size=TOKENIZER.n_vocab, **config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model.double()  # so that only what is computed differently differs


def naive(model, prompt, continuation):
    """The log-likelihood of a continuation, from one forward pass over the whole text."""
    n, ids = len(TOKENIZER.encode(prompt)), TOKENIZER.encode(prompt + continuation)
    with torch.inference_mode():
        log_probs = model(torch.tensor([ids]))[0][0].log_softmax(-1)
    return sum(log_probs[i - 1, ids[i]].item() for i in range(n, len(ids)))


# --- Likelihoods

def test_letters_are_not_rounded_to_be_equally_likely():
    """Of logits near 20 bfloat16 tells apart those that differ by 0.06 and more."""
    model = random_model().float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        x, state = eval_mmlu.feed(model, TOKENIZER.encode("Answer:"))
        x = x * 20 / model.head(x).max()
        found = eval_mmlu.log_likelihoods(model, x, state, [[i] for i in range(TOKENIZER.n_vocab)])
    exact = (x.float() @ model.head.weight.T)[0].log_softmax(-1)
    assert found == pytest.approx(exact.tolist(), abs=1e-4)


@pytest.mark.parametrize("changes", [
    {}, {"attention": "full"}, {"mem_write": "aligned"}, {"mem_layers": 1}, {"memory": "none"},
    {"memory": "rmt"}, {"n_kv_head": 1},
], ids=str)
def test_likelihoods_are_those_of_a_forward_pass_over_each_whole_text(changes, monkeypatch):
    monkeypatch.setattr(eval_mmlu, "TOKENS_AT_ONCE", 7)
    model = random_model(**changes)
    for prompts in (PROMPTS, PROMPTS[:1], [("Answer:", ["A", "B", "C", "D"])], PROMPTS[1::2]):
        found = list(score(model, TOKENIZER, prompts))
        expected = [[naive(model, prompt, each) for each in continuations]
                    for prompt, continuations in prompts]
        found, expected = (torch.tensor(x, dtype=torch.float64) for x in (found, expected))
        assert found.allclose(expected, rtol=1e-9)


def test_what_all_prompts_begin_with_goes_through_the_model_once(monkeypatch):
    model, seen = random_model(), []
    features = model.features

    def count(idx, state=None):
        seen.append((len(idx), idx.size(1)))
        return features(idx, state)

    monkeypatch.setattr(model, "features", count)
    prompts = [(f"The same beginning. {end}", [" A", " B", " C", " D"]) for end in ("x?", "yes?")]
    list(score(model, TOKENIZER, prompts))
    assert seen == [(1, len("The same beginning. ")), (1, 2), (4, 1), (1, 4), (4, 1)]


class Joining:
    """Its tokens are single characters, but a space belongs to what stands before it."""
    begin = ()

    def encode(self, text):
        pieces = text.replace(" ", " \0").split("\0")
        return [token for piece in pieces for token in
                ([*piece[:-2], piece[-2:]] if piece.endswith(" ") else [*piece])]


def test_a_token_across_the_end_of_the_prompt_belongs_to_the_continuation():
    prompt, continuations = "Why?\nAnswer:", [" A", " Be", " A"]
    for tokenizer, n in ((Joining(), 11), (TOKENIZER, 12)):
        ids, after = encode(tokenizer, prompt, continuations)
        assert len(ids) == n
        assert [ids + each for each in after] == [tokenizer.encode(prompt + each)
                                                  for each in continuations]
        tokenizer = copy(tokenizer)
        tokenizer.begin = (7,)
        assert encode(tokenizer, prompt, continuations) == ([7, *ids], after)


def test_the_likeliest_letter_is_the_answer_and_the_likeliest_byte_of_a_text(monkeypatch):
    likelihoods = [[-5.0, -4.0, -7.0, -8.0], [-3.0, -5.0, -3.0, -9.0]]
    monkeypatch.setattr(eval_mmlu, "score", lambda *args: likelihoods)
    texts = ("a", "bbbb", "ä" * 6, "d"), ("aa", "b", "c", "d" * 40)
    for cloze, expected in ((False, (1, 0)), (True, (2, 3))):
        items = [[Item([], Question("?", four, answer)) for four, answer in zip(texts, answers)]
                 for answers in (expected, (3, 2), (expected[0], 2))]
        found = [evaluate(Run(None, None, {}), "anatomy", some, cloze, Bar()) for some in items]
        assert found == ["11", "00", "10"]


# --- Runs

@pytest.fixture(scope="module")
def runs(checkout):
    """A pretrained Llama, with untrained banks and without; and a folder of MMLU."""
    exam = {split: {subject: questions(f"{subject} {split}", 6) for subject in THREE}
            for split in ("test", "dev")}
    write_csvs(checkout.folder / "mmlu", exam)
    banks = "--mem_slots=8", "--block_size=16"
    for name, flags in (("with", banks), ("bare", ["--memory=none"])):
        code, _, err = checkout.call("pretrained.py", str(TINY / "grouped"), *flags,
                                     f"--out_dir=out/{name}", "--overwrite")
        assert code == 0, err
    return "out/with", "out/bare"


@pytest.fixture
def ask(call, tmp_path):
    """Evaluate -> exit code, standard output, standard error."""
    def ask_with(*args, mmlu_dir="mmlu"):
        return call("eval_mmlu.py", *args, *ON_CPU, f"--mmlu_dir={mmlu_dir}",
                    f"--out_dir={tmp_path / 'results'}")
    return ask_with


@pytest.fixture
def asked(monkeypatch):
    """Let runs answer at once, all wrong but the first -> a list that gets (run, subject, n)."""
    found = []

    def stub(run, subject, items, cloze, bar):
        found.append((run.about["run"], subject, len(items)))
        return "1".ljust(len(items), "0")

    monkeypatch.setattr(eval_mmlu, "evaluate", stub)
    return found


def rows_in(tmp_path):
    with open(tmp_path / "results/results.csv", newline="") as f:
        return list(csv.DictReader(f))


def test_untrained_banks_change_no_likelihood_by_a_single_bit(checkout, runs):
    found = []
    for run in runs:
        model, tokenizer, _ = checkpoint.load(checkout.folder / run, "cpu")
        found.append(list(score(model, tokenizer, PROMPTS)))
    assert found[0] == found[1] and len({value for row in found[0] for value in row}) > 8


@pytest.mark.parametrize("flags", [[], ["--cloze"], ["--shots=0"]], ids=str)
def test_each_run_and_subject_becomes_a_row_and_each_run_a_line(ask, runs, tmp_path, flags):
    code, out, err = ask(*runs, *flags, "--n_questions=3")
    assert code == 0, err
    rows = rows_in(tmp_path)
    assert [(row["subject"], row["run"]) for row in rows] == [
        (subject, run) for subject in THREE for run in runs]
    for row, twin in zip(rows[::2], rows[1::2]):
        assert row["answers"] == twin["answers"] and len(row["answers"]) == 3
        assert row["questions_sha256"] == twin["questions_sha256"]
        assert row["checkpoint_sha256"] != twin["checkpoint_sha256"]
    for row in rows:
        assert (row["source"], row["n"]) == ("mmlu", "3")
        assert (row["dtype"], row["device"]) == ("float32", "cpu")
        assert (row["shots"], row["cloze"]) == ("0" if "--shots=0" in flags else "5",
                                                str("--cloze" in flags))
        assert int(row["right"]) == row["answers"].count("1") and row["commit"] and row["torch"]
    in_json = json.loads((tmp_path / "results/results.json").read_text())
    assert [{name: str(value) for name, value in row.items()} for row in in_json] == rows
    lines = {line.split(" | ")[0]: line.split(" | ")[1:] for line in out.splitlines()}
    assert lines["| out/with"] == lines["| out/bare"] and lines["| out/with"][-1] == "9 |"
    assert out.startswith("9 questions of mmlu, ") and ("cloze" in out) == ("--cloze" in flags)


def test_results_of_another_program_are_kept(ask, runs, tmp_path):
    path = tmp_path / "results/results.json"
    path.parent.mkdir()
    path.write_text("mine")
    code, _, err = ask(*runs)
    assert is_one_line(code, err, "results.json", "--out_dir") and path.read_text() == "mine"


def test_after_ctrl_c_the_same_command_goes_on_to_the_same_rows(ask, runs, tmp_path, monkeypatch):
    code, whole, err = ask(*runs)
    assert code == 0, err
    expected = rows_in(tmp_path)
    shutil.rmtree(tmp_path / "results")
    calls = []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(eval_mmlu, "evaluate", stopped)
    code, _, err = ask(*runs)
    assert code == 130 and "the same command goes on" in err
    assert rows_in(tmp_path) == expected[:3]
    assert ask(*runs)[:2] == (0, whole) and rows_in(tmp_path) == expected
    assert len(calls) == 7
    assert ask(*runs)[:2] == (0, whole) and len(calls) == 7, "and then nothing is left to ask"


def test_changed_weights_are_asked_anew_and_no_row_is_dropped(checkout, ask, runs, asked, tmp_path):
    shutil.copytree(checkout.folder / runs[1], checkout.folder / "out/changing", dirs_exist_ok=True)
    assert ask("out/changing")[0] == 0 and len(asked) == 3
    before = rows_in(tmp_path)
    path = checkout.folder / "out/changing/best.pt"
    found = torch.load(path, weights_only=True)
    found["model"]["norm.weight"].fill_(3)
    torch.save(found, path)
    code, out, _ = ask("out/changing")
    after = rows_in(tmp_path)
    assert code == 0 and len(asked) == 6 and after[:3] == before
    for row in after[2:4]:
        assert f"| out/changing ({row['checkpoint_sha256'][:8]}, float32) |" in out


@pytest.mark.parametrize("change", ["--shots=2", "--cloze", "--n_questions=2", "--mmlu_dir=other"])
def test_other_questions_are_asked_anew_and_have_a_table_of_their_own(
        checkout, ask, runs, asked, change):
    shutil.copytree(checkout.folder / "mmlu", checkout.folder / "other", dirs_exist_ok=True)
    assert ask(runs[0], "--subjects=anatomy")[0] == 0
    flags = [] if "mmlu_dir" in change else [change]
    code, out, err = ask(runs[1], "--subjects=anatomy", *flags,
                         mmlu_dir="other" if "mmlu_dir" in change else "mmlu")
    assert code == 0, err
    assert [run for run, *_ in asked] == [*runs] and runs[1] in out and runs[0] not in out


def test_selected_subjects_and_questions_are_asked_and_others_join_the_table(ask, runs, asked):
    assert ask(runs[0], "--subjects=sociology, anatomy", "--n_questions=2")[0] == 0
    assert asked == [(runs[0], "sociology", 2), (runs[0], "anatomy", 2)]
    code, out, _ = ask(*runs, "--n_questions=2")
    assert code == 0 and len(asked) == 6, "each once"
    assert out.count("| 50.0 (18.8–81.2) | 6 |") == 2


# --- Refusals

@pytest.mark.parametrize("args, named", [
    ([], "runs is empty"), (["RUN", "RUN/"], "named twice"), (["out/nowhere"], "out/nowhere"),
    (["RUN", "--shots=6"], "shots=6"), (["RUN", "--shots=-1"], "shots=-1"),
    (["RUN", "--n_questions=-1"], "n_questions=-1"),
    (["RUN", "--subjects=anatomi"], "did you mean anatomy?"),
    (["RUN", "--subjects=virology"], "has no questions of virology"),
    (["RUN", "--subjects=anatomy,anatomy"], "anatomy twice"),
    (["RUN", "--mmlu_dir=nowhere"], "mmlu_dir=nowhere"),
    (["RUN", "--mmlu_dir=out"], "no files of MMLU"), (["RUN", "--out_dir=play.txt"], "play.txt"),
    (["RUN", "--dtype=int8"], "dtype=int8"),
], ids=str)
def test_bad_input_is_refused_in_one_line(call, runs, args, named):
    args = [arg.replace("RUN", runs[1]) for arg in args]
    code, _, err = call("eval_mmlu.py", "--mmlu_dir=mmlu", "--out_dir=out/refused", *args)
    assert is_one_line(code, err, named)


@pytest.mark.parametrize("split, change, named", [
    ("test", "a,b,c\n", "anatomy_test.csv:7"), ("dev", None, "has 0 dev questions of anatomy"),
])
def test_damaged_files_are_refused_before_anything_is_asked(
        checkout, ask, runs, asked, split, change, named):
    folder = checkout.folder / "damaged"
    shutil.copytree(checkout.folder / "mmlu", folder, dirs_exist_ok=True)
    path = folder / split / f"anatomy_{split}.csv"
    path.write_text(path.read_text() + change) if change else path.unlink()
    code, _, err = ask(runs[1], mmlu_dir="damaged")
    assert is_one_line(code, err, named) and asked == []


def test_a_text_that_a_run_cannot_read_is_refused_in_one_line(checkout, ask, runs):
    checkout.train("out/chars", *SMALL, "--max_iters=0", "--overwrite")
    code, _, err = ask("out/chars")
    assert is_one_line(code, err, "out/chars, anatomy: character")


@pytest.mark.parametrize("damage", [
    lambda text: text.replace("run,", "model,"), lambda text: text.replace("100000", "10000"),
    lambda text: text[:-30], lambda text: text.replace("False", "perhaps"),
])
def test_damaged_results_are_told_and_kept(ask, runs, asked, tmp_path, damage):
    assert ask(runs[1])[0] == 0
    path = tmp_path / "results/results.csv"
    path.write_text(damage(path.read_text()))
    before = path.read_text()
    code, _, err = ask(*runs)
    assert is_one_line(code, err, "results.csv, line") and path.read_text() == before
    assert len(asked) == 3
