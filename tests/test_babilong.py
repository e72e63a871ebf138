"""data/babilong.py: questions, haystack, records, lengths and scores are as promised."""
import json
import re

import numpy as np
import pytest
import tiktoken
from babi_solver import solve
from test_babi import asked, simulated
from test_gguf_tokenizer import sentencepiece_metadata, tokenizer_of
from test_tokenizer import TINY, stand_in_for_gpt2

from data.babi import LABELS, TASKS, Line
from data.babilong import (
    Haystack,
    Question,
    encode_line,
    encode_text,
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
from data.tokenizer import GPT2Tokenizer, HFTokenizer, make_tokenizer

DEEDS = ("slept", "sang", "said: nothing", "rode")
TEXT = " ".join(f"In year {i} the old king {DEEDS[i % 4]}{'!' if i % 9 == 0 else '.'}"
                for i in range(300))


@pytest.fixture(scope="module")
def bpe():
    facts = " ".join(line.text for task in TASKS for story in simulated(task)[:5] for line in story)
    return make_tokenizer("bpe", TEXT + "\n" + facts, 400)


@pytest.fixture(scope="module")
def haystack(bpe):
    return Haystack(TEXT, bpe)


def test_question_has_all_facts_and_no_earlier_question():
    for story in simulated("qa2")[:20]:
        found = questions_of(story)
        assert [(q.text, q.answer) for q in found] == [
            (line.text, line.answer) for line in story if line.answer]
        for question in found:
            assert solve(question.context, question.text) == question.answer
            assert not any("?" in fact for fact in question.context)
        assert list(found[-1].context) == [line.text for line in story if not line.answer]


# --- Flags

def test_lengths_are_read():
    texts = ("0", "0k", "512", "1k", "128k", "1M", "100M")
    tokens = [0, 0, 512, 1000, 128_000, 1_000_000, 100_000_000]
    assert [parse_length(text) for text in texts] == tokens
    assert parse_lengths("0k, 512,4k") == {"0k": 0, "512": 512, "4k": 4000}
    assert list(parse_lengths("4k,0k")) == ["4k", "0k"], "in the order of the curriculum"


@pytest.mark.parametrize("text", ["", "k", "1kk", "-1k", "1.5k", "1m", "1 k", "long", "\u0661k"])
def test_what_is_no_length_is_refused(text):
    with pytest.raises(ValueError, match=r"length '[^\n]*' is not known: use for example [^\n]+$"):
        parse_length(text)


@pytest.mark.parametrize("text", ["101M", "100000001", "9" * 5000])
def test_a_length_beyond_memory_is_refused(text):
    with pytest.raises(ValueError, match="length 9*[^\n]+$"):
        parse_length(text)


@pytest.mark.parametrize("text", ["1k,2k", "1k, 2k", " 1k ,2k ", "1k,2k,", ",1k,,2k"])
def test_lists_may_have_spaces_and_a_comma_too_many(text):
    assert parse_lengths(text) == {"1k": 1000, "2k": 2000}
    assert parse_tasks(text.replace("1k", "qa1").replace("2k", "qa10")) == ["qa1", "qa10"]


@pytest.mark.parametrize("parse, text, message", [
    (parse_tasks, "qa1,qa2, qa1", "tasks=qa1,qa2, qa1 lists qa1 twice"),
    (parse_tasks, "qa1,qa11", "task qa11 in tasks=qa1,qa11 is not known"),
    (parse_tasks, "", "tasks= lists nothing"),
    (parse_tasks, " , ", "tasks= ,  lists nothing"),
    (parse_lengths, "1k,2k,1k", "lengths=1k,2k,1k lists 1k twice"),
    (parse_lengths, "0k,0", "lengths=0k,0 lists 0 tokens twice"),
    (parse_lengths, "1k,1000", "lengths=1k,1000 lists 1000 tokens twice"),
    (parse_lengths, "0k,long", "length 'long' is not known"),
    (parse_lengths, ",", "lengths=, lists nothing")])
def test_a_list_that_cannot_be_meant_is_refused(parse, text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


# --- Files

RECORDS = [
    {"input": "Mary went home. It rained.\nJohn, too, left.", "question": "Where is Mary? ",
     "target": "home"},
    {"input": 'He said "no". A, b.', "question": "What?", "target": "milk,football"}]
QUESTIONS = [
    Question(("Mary went home.", "It rained.", "John, too, left."), "Where is Mary?", "home"),
    Question(('He said "no".', "A, b."), "What?", "milk,football")]
FILES = {
    "0k.json": json.dumps(RECORDS),
    "0k.jsonl": "\n".join(map(json.dumps, RECORDS)) + "\n",
    "0k.csv": 'target,input,question\n'
              'home,"Mary went home. It rained.\nJohn, too, left.",Where is Mary? \n'
              '"milk,football","He said ""no"". A, b.",What?\n'}


@pytest.mark.parametrize("name", FILES)
def test_babilong_records_are_read(tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    assert read_babilong(tmp_path / name) == QUESTIONS


@pytest.mark.parametrize("name", FILES)
def test_records_are_read_whatever_their_blanks(tmp_path, name):
    text = FILES[name].replace("}\n{", "}\n\n{") + "\n\n"
    (tmp_path / name).write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    assert read_babilong(tmp_path / name) == QUESTIONS


def test_long_and_unusual_texts_are_read(tmp_path):
    text = "It rained\u2028again. " * 20_000
    record = {"input": text, "question": "Where?", "target": "here"}
    (tmp_path / "128k.csv").write_text(f'input,question,target\n"{text}",Where?,here\n')
    (tmp_path / "128k.jsonl").write_text(json.dumps(record, ensure_ascii=False))
    expected = [Question(("It rained again.",) * 20_000, "Where?", "here")]
    for name in ("128k.csv", "128k.jsonl"):
        assert read_babilong(tmp_path / name) == expected


GOOD = json.dumps(RECORDS[0])
MALFORMED = [
    # a file, its text, where in it, what is wrong
    ("0k.json", f'[{GOOD}, {{"input": "x"}}]', " record 2", "expected a record"),
    ("0k.json", "[\n{]", "2", "expected a record .* as JSON"),
    ("0k.json", GOOD, "1", "expected a record .* in a list"),
    ("0k.json", "3", "1", "expected a record .* in a list"),
    ("0k.json", "[]", "1", "expected a record"),
    ("0k.json", "", "1", "expected a record"),
    ("0k.json", "[" * 100_000, "1", "expected a record .* as JSON"),
    ("0k.json", "[" + "1" * 5000 + "]", "1", "expected a record .* as JSON"),
    ("0k.json", '[{"input": ["x"], "question": "?", "target": "a"}]', " record 1", "expected"),
    ("0k.json", '[{"input": "x", "question": null, "target": "a"}]', " record 1", "expected"),
    ("0k.json", '[{"input": "x", "question": " ", "target": "a"}]', " record 1", "empty"),
    ("0k.json", '[{"input": "x", "question": "?", "target": ""}]', " record 1", "empty"),
    ("0k.json", '[{"input": "\\ud800", "question": "?", "target": "a"}]', " record 1", "surrogate"),
    ("0k.jsonl", GOOD + "\n{\n", "2", "expected a record .* as JSON"),
    ("0k.jsonl", "\n" + GOOD + "\n\n3", "4", "expected a record"),
    ("0k.jsonl", '{"input": "x", "question": "\\udfff?", "target": "a"}', "1", "surrogate"),
    ("0k.jsonl", "", "1", "expected a record"),
    ("0k.csv", "", "1", "expected a record"),
    ("0k.csv", "input,question\na,b\n", "2", "expected a record"),
    ("0k.csv", "input,question,target\n", "1", "expected a record"),
    ("0k.csv", "input,question,target\na,b,c\na,b\n", "3", "expected a record")]


@pytest.mark.parametrize("name, text, where, message", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_record_is_named(tmp_path, name, text, where, message):
    (tmp_path / name).write_text(text)
    expected = rf"{re.escape(name)}:{where}: [^\n]*{message}[^\n]*$"
    with pytest.raises(ValueError, match=expected) as error:
        read_babilong(tmp_path / name)
    assert "\n" not in str(error.value)


def test_what_is_no_text_file_is_named(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="x.csv is not UTF-8"):
        read_babilong(tmp_path / "x.csv")
    for path in (tmp_path, tmp_path / "missing.json"):
        with pytest.raises(OSError, match=f"{path} is not"):
            read_babilong(path)


def test_files_are_found_by_task_and_length(tmp_path):
    for name in ("qa10_a_test.txt", "qa1_a_train.txt", "qa1_a_test.txt", "qa2_b_train.txt",
                 "data/qa1/4k.json", "qa2/4k.jsonl", "4k/qa3.csv", "qa30_a_train.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for task, length, expected in [
            ("qa1", "", "qa1_a_test.txt"), ("qa2", "", "qa2_b_train.txt"),
            ("qa10", "", "qa10_a_test.txt"), ("qa1", "4k", "data/qa1/4k.json"),
            ("qa2", "4k", "qa2/4k.jsonl"), ("qa3", "4k", "4k/qa3.csv")]:
        assert find_file(tmp_path, task, length) == tmp_path / expected
    for task, length, wanted in [("qa3", "", r"qa3_\*test\*\.txt"), ("qa1", "8k", "qa1/8k.json")]:
        with pytest.raises(ValueError, match=f"has no file for {task}.*{wanted}"):
            find_file(tmp_path, task, length)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        find_file(tmp_path / "nowhere", "qa1")


# --- Scores

@pytest.mark.parametrize("task, output, answer, question, correct", [
    ("qa1", " bathroom.", "bathroom", "Where is Mary?", True),
    ("qa1", "Mary is in the BATHROOM. Or in the kitchen.", "bathroom", "Where is Mary?", True),
    ("qa1", "bathroom or kitchen.", "bathroom", "Where is Mary?", False),
    ("qa1", "kitchen.", "bathroom", "Where is Mary?", False),
    ("qa1", "", "bathroom", "Where is Mary?", False),
    ("qa1", ". bathroom", "bathroom", "Where is Mary?", False),
    ("qa3", "It was in the office before the kitchen", "office",
     "Where was the milk before the kitchen?", True),
    ("qa4", "the office is north of the kitchen.", "office", "What is north of the kitchen?", True),
    ("qa4", "kitchen.", "office", "What is north of the kitchen?", False),
    ("qa5", "Bill gave the milk to Fred.", "milk", "What did Bill give to Fred?", True),
    ("qa5", " fred.", "Fred", "Who did Bill give the milk to?", True),
    ("qa5", " Bill.", "Fred", "Who did Bill give the milk to?", False),
    ("qa6", " no.", "no", "Is John in the kitchen?", True),
    ("qa7", " none.", "none", "How many objects is John carrying?", True),
    ("qa7", " none.", "one", "How many objects is John carrying?", False),
    ("qa7", " three.", "three", "How many objects is John carrying?", True),
    ("qa8", " milk,football.", "milk,football", "What is John carrying?", True),
    ("qa8", " football and milk.", "milk,football", "What is John carrying?", True),
    ("qa8", " milk.", "milk,football", "What is John carrying?", False),
    ("qa8", " milk,football,apple.", "milk,football", "What is John carrying?", False),
    ("qa8", " nothing.", "nothing", "What is John carrying?", True),
    ("qa10", " maybe, yes.", "maybe", "Is Bill in the park?", False),
    ("qa10", " maybe.", "maybe", "Is Bill in the park?", True)])
def test_answers_count_as_babilong_counts(task, output, answer, question, correct):
    assert is_correct(output, answer, question, LABELS[task]) == correct


@pytest.mark.parametrize("task", TASKS)
def test_every_true_answer_is_scored_as_correct(task):
    for _, _, line in asked(simulated(task)):
        assert is_correct(f" {line.answer}.", line.answer, line.text, LABELS[task]), line


# --- Haystack

def test_text_is_split_into_sentences():
    expected = ["One two.", "Three?", "Four!", "3.5 five"]
    assert split_sentences(" One two.\n\nThree?  Four! 3.5 five") == expected
    assert split_sentences(" \n") == []
    long = split_sentences("word " * 1000 + "end. Next.")
    assert max(map(len, long)) <= 500 and " ".join(long) == "word " * 1000 + "end. Next."
    assert "".join(split_sentences("x" * 1_000_000)) == "x" * 1_000_000


@pytest.mark.parametrize("task", TASKS)
def test_pieces_join_to_the_ids_of_the_whole_text(task, bpe):
    for story in simulated(task)[:20]:
        text = "".join(f" {line.text}" + (f" {line.answer}." if line.answer else "")
                       for line in story)
        joined = np.concatenate([encode_line(line, bpe)[0] for line in story])
        assert joined.tolist() == bpe.encode(text)
        for line in story:
            ids, n = encode_line(line, bpe)
            assert bpe.decode(ids[len(ids) - n:]) == (f" {line.answer}." if line.answer else "")


def test_text_without_a_sentence_is_refused(bpe):
    with pytest.raises(ValueError, match="no sentence"):
        Haystack(" \n", bpe)


def test_text_of_one_sentence_goes_round(bpe):
    ids, starts = Haystack("The king slept.", bpe).mix(
        [encode_line(Line("Where is Mary?"), bpe)[0]], 300, np.random.default_rng(0))
    assert len(ids) == 300 and bpe.decode(ids).count(" The king slept.") > 10
    assert bpe.decode(ids[starts[0]:]) == " Where is Mary?"


def test_text_of_a_million_spaces_is_a_haystack_and_may_be_a_fact(bpe):
    spaces = " " * 1_000_000
    assert len(Haystack(f"The king{spaces}slept.", bpe).starts) == 1
    ids, _ = encode_line(Line(f"Mary{spaces}left."), bpe)
    assert bpe.decode(ids) == f" Mary{spaces}left."


@pytest.mark.parametrize("length", [0, 40, 120, 257, 1000, 10_000])
def test_facts_are_hidden_whole_and_in_order_at_the_exact_length(length, bpe, haystack):
    rng, around = np.random.default_rng(0), " " + " ".join([TEXT] * 5)
    sentences = split_sentences(TEXT)
    for story in simulated("qa1")[:30]:
        pieces = [encode_line(line, bpe)[0] for line in story[:3]]
        ids, starts = haystack.mix(pieces, length, rng)
        assert len(ids) == max(length, sum(map(len, pieces)))
        assert len(starts) == 3 and list(starts) == sorted(starts)
        for start, piece in zip(starts, pieces):
            assert np.array_equal(ids[start:start + len(piece)], piece)
        assert starts[-1] + len(pieces[-1]) == len(ids)
        hidden = [np.arange(s, s + len(piece)) for s, piece in zip(starts, pieces)]
        assert bpe.decode(np.delete(ids, np.concatenate(hidden))) in around
        assert bpe.encode(bpe.decode(ids)) == ids.tolist() or bpe.decode(ids[:1])[0] != " "
        facts = [line.text for line in story[:3]]
        for start in starts[starts > 0]:  # in front of it: a fact, or the end of a sentence
            before = split_sentences(bpe.decode(ids[:start]))[-1]
            assert before in facts or any(s.endswith(before) for s in sentences)


def test_facts_stand_anywhere_with_equal_chance(bpe, haystack):
    rng = np.random.default_rng(0)
    texts = ("Mary got the milk.", "John left.", "Where is Mary?")
    pieces = [encode_line(Line(text), bpe)[0] for text in texts]
    n_text = 2000 - sum(map(len, pieces))
    shares = []  # of the text that stands in front of a fact
    for _ in range(1500):
        _, (first, second, _) = haystack.mix(pieces, 2000, rng)
        shares += [first / n_text, (second - len(pieces[0])) / n_text]
    counts, _ = np.histogram(shares, bins=10, range=(0, 1))
    assert ((counts - 300) ** 2 / 300).sum() < 30, counts  # chi-square, 9 degrees of freedom


def test_stretch_of_text_begins_anywhere(bpe, haystack):
    piece, rng = encode_line(Line("Where is Mary?"), bpe)[0], np.random.default_rng(0)
    texts = [bpe.decode(haystack.mix([piece], 60, rng)[0]) for _ in range(1500)]
    years = [int(re.search(r"In year (\d+)", text)[1]) for text in texts]
    counts, _ = np.histogram(years, bins=10, range=(0, 300))
    assert ((counts - 150) ** 2 / 150).sum() < 30, counts


def test_a_million_tokens_are_mixed(bpe, haystack):
    pieces = [encode_line(line, bpe)[0] for line in simulated("qa2")[0]]
    ids, _ = haystack.mix(pieces, 1_000_000, np.random.default_rng(0))
    assert len(ids) == 1_000_000


@pytest.mark.parametrize("length", [0, 300, 1000])
def test_one_question_is_asked_at_the_end(length, bpe, haystack):
    rng = np.random.default_rng(0)
    for story in simulated("qa1")[:10]:
        for question in questions_of(story):
            ids = hide_question(question, length, haystack if length else None, bpe, rng)
            text = bpe.decode(ids)
            assert text.endswith(f" {question.text}") and text.count("?") == 1
            facts = [s for s in split_sentences(text) if s in question.context]
            assert facts == list(question.context)
            if length:
                assert len(ids) == length
            else:
                assert text == "".join(f" {s}" for s in (*question.context, question.text))


# --- Tokenizers, of which some put a space before a text

KEPT = ("char", "bpe", "gpt2", "hf")  # these do not: results/ were measured with them
SPACED = {  # how SentencePiece's is written in a GGUF file, and in the folders of two models
    "gguf": {},
    "tinyllama": {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}},
    "metaspace": {"normalizer": None, "pre_tokenizer": {
        "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}},
}


def sentencepiece(kind):
    """SentencePiece's tokenizer, as a GGUF file or the folder of a model has it."""
    found = tokenizer_of(sentencepiece_metadata())
    if kind == "gguf":
        return found
    model = json.dumps(found.description["model"], separators=(",", ":")).replace(" ", "\u2581")
    spaces = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    decoders = [spaces, *found.description["decoder"]["decoders"]]
    return HFTokenizer(found.description | SPACED[kind] | {
        "model": json.loads(model), "decoder": {"type": "Sequence", "decoders": decoders}})


@pytest.fixture
def tokenizer(request, bpe, monkeypatch):
    """A tokenizer of each kind, by its name."""
    kind = request.param
    if kind in SPACED:
        return sentencepiece(kind)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: stand_in_for_gpt2())
    char = TEXT + "".join(line.text for task in TASKS for line in simulated(task)[0])
    return {"char": lambda: make_tokenizer("char", char, 0), "bpe": lambda: bpe,
            "gpt2": GPT2Tokenizer,
            "hf": lambda: HFTokenizer(json.loads((TINY / "tokenizer.json").read_text()))}[kind]()


@pytest.mark.parametrize("tokenizer", [*KEPT, *SPACED], indirect=True)
@pytest.mark.parametrize("length", [0, 600])
def test_a_prompt_is_the_text_that_a_person_would_write(tokenizer, length):
    rng, haystack = np.random.default_rng(0), Haystack(TEXT, tokenizer)
    for story in simulated("qa1")[:10]:
        question = questions_of(story)[-1]
        ids = hide_question(question, length, haystack, tokenizer, rng).tolist()
        text = tokenizer.decode(ids)
        assert " ".join(split_sentences(text)) == text.removeprefix(" "), "single spaces"
        hidden = [*question.context, question.text]
        assert [s for s in split_sentences(text) if s in hidden] == hidden
        if not length:
            assert text.removeprefix(" ") == " ".join(hidden) and ids == tokenizer.encode(text)


@pytest.mark.parametrize("tokenizer", KEPT, indirect=True)
def test_of_other_tokenizers_each_sentence_has_the_ids_of_a_space_and_itself(tokenizer):
    expected = [tokenizer.encode(" " + sentence) for sentence in split_sentences(TEXT)]
    assert Haystack(TEXT, tokenizer).ids.tolist() == sum(expected, [])
    for line in simulated("qa1")[0]:
        assert encode_text(line.text, tokenizer).tolist() == tokenizer.encode(" " + line.text)


def test_a_question_that_the_tokenizer_cannot_read_is_refused():
    char, question = make_tokenizer("char", TEXT, 0), Question(("the aß.",), "said?", "here")
    with pytest.raises(ValueError, match="character 'ß' is not in the vocabulary"):
        hide_question(question, 0, None, char, np.random.default_rng(0))
