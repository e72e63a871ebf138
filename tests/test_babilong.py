"""
The simulator speaks as the original bAbI files do and tells the truth; files, haystack, batches and scores are as promised.

RECORDED below holds figures of the original files (bAbI v1.2, 1,000 questions a task). Where the files themselves are at hand
(LM2_BABI_DIR, or ../shared/data/babi), they are compared and solved as well.
"""
import json
import os
import random
import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from data.babi import HANDLING, LABELS, TASKS, Line, format_story, read_babi, simulate
from data.babilong import (
    Haystack,
    Sample,
    encode_line,
    evaluation_sample,
    find_file,
    is_correct,
    parse_length,
    read_babilong,
    samples,
    split_sentences,
)
from data.curriculum import training_batch
from data.tokenizer import CharTokenizer, train_bpe

REPO = Path(__file__).parent.parent
BABI_DIR = Path(os.environ.get("LM2_BABI_DIR", REPO.parent / "shared" / "data" / "babi"))
WORDS = {"N": "Mary John Sandra Daniel Bill Fred Jeff Julie", "O": "apple football milk",
         "P": "bathroom bedroom garden hallway kitchen office cinema park school"}
VERBS = {"move": "went moved journeyed travelled", "get": "took got grabbed picked", "drop": "dropped left discarded put",
         "give": "gave handed passed"}
DEEDS = ("slept", "sang", "said: nothing", "rode")
TEXT = " ".join(f"In year {i} the old king {DEEDS[i % 4]}{'!' if i % 9 == 0 else '.'}" for i in range(300))


@cache
def simulated(task, n=400):
    rng = random.Random(7)
    return [simulate(task, rng) for _ in range(n)]


@cache
def original(task):
    """The stories of the original file, or none where it is not there."""
    return read_babi(find_file(BABI_DIR, task)) if BABI_DIR.is_dir() else []


@pytest.fixture(scope="module")
def bpe():
    facts = " ".join(line.text for task in TASKS for story in simulated(task)[:5] for line in story)
    return train_bpe(TEXT + "\n" + facts, 400)


@pytest.fixture(scope="module")
def haystack(bpe):
    return Haystack(TEXT, bpe)


# --- An independent reader: it knows only the sentences, and looks back through them.

def kind(words):
    return next((k for k, verbs in VERBS.items() if words[1] in verbs.split()), None)


def last(facts, condition):
    """The place among the facts of the last that fulfils the condition, or None."""
    return next((i for i in range(len(facts) - 1, -1, -1) if condition(facts[i])), None)


def holders(facts, thing):
    """After each fact: who holds the thing (None: nobody, as far as was told)."""
    holder, found = None, []
    for words in facts:
        if thing in words:
            holder = {"get": words[0], "give": words[-1], "drop": None}[kind(words)]
        found.append(holder)
    return found


def trail(facts, thing):
    """The places where the thing was known to be, in order."""
    places, found = {}, []
    for words, holder in zip(facts, holders(facts, thing)):
        if kind(words) == "move":
            places[words[0]] = words[-1]
        place = places.get(holder) if holder else None
        if place and found[-1:] != [place]:
            found.append(place)
    return found


def solve(sentences, question):
    """The answer, from the text alone."""
    facts = [s.removesuffix(".").removesuffix(" there").split() for s in sentences]
    ask = question.removesuffix("?").split()
    if ask[:2] == ["Where", "was"]:
        places = trail(facts, ask[3])
        return places[len(places) - 1 - places[::-1].index(ask[-1]) - 1]
    if ask[0] == "Where" and ask[-1] in WORDS["O"]:
        return trail(facts, ask[-1])[-1]
    if ask[0] == "Where":
        return facts[last(facts, lambda f: f[0] == ask[-1] and kind(f) not in HANDLING)][-1]
    if ask[-1] == "carrying":
        things = list(dict.fromkeys(f[-3] if kind(f) == "give" else f[-1] for f in facts if kind(f) != "move" and ask[-2] in f))
        carried = [thing for thing in things if holders(facts, thing)[-1] == ask[-2]]
        return ["none", "one", "two", "three"][len(carried)] if ask[0] == "How" else ",".join(carried) or "nothing"
    if ask[0] == "Is":
        fact = facts[last(facts, lambda f: f[0] == ask[1] and kind(f) not in HANDLING)]
        if "either" in fact:
            return "maybe" if ask[-1] in fact else "no"
        return "yes" if fact[-1] == ask[-1] and not {"no", "not"} & set(fact) else "no"
    if facts[0][0] == "The":
        opposite = {"north": "south", "south": "north", "west": "east", "east": "west"}
        known = {(f[3], f[-1]): f[1] for f in facts} | {(opposite[f[3]], f[1]): f[-1] for f in facts}
        return known[ask[2], ask[-1]] if ask[2] in opposite else known[opposite[ask[4]], ask[3]]
    match = re.fullmatch(r"What did (\w+) give to (\w+)|Who received the (\w+)|Who gave the (\w+)(?: to (\w+))?|"
                         r"Who did (\w+) give the (\w+) to", " ".join(ask)).groups()
    giver, to, thing = match[0] or match[5], match[1] or match[4], match[2] or match[3] or match[6]
    gift = facts[last(facts, lambda f: kind(f) == "give" and giver in (None, f[0]) and thing in (None, f[-3]) and to in (None, f[-1]))]
    if ask[0] == "What":
        return gift[-3]
    return gift[0] if ask[1] == "gave" else gift[-1]


def facts_before(story, i):
    return [line.text for line in story[:i] if not line.answer]


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_follows_from_the_text(task):
    stories = simulated(task)
    assert sum(line.answer != "" for story in stories for line in story) == len(stories) * (1 if task == "qa4" else 5)
    for story in stories:
        for i, line in enumerate(story):
            if line.answer:
                assert solve(facts_before(story, i), line.text) == line.answer, format_story(story[:i + 1])


@pytest.mark.parametrize("ask", ["own", "all"])
@pytest.mark.parametrize("task", TASKS)
def test_story_to_recall_asks_at_its_end_whatever_its_facts_answer(task, ask):
    rng, asked = random.Random(7), set()
    for _ in range(400):
        story = simulate(task, rng, TASKS if ask == "all" else [task])
        told = sum(not line.answer for line in story)
        facts, questions = [line.text for line in story[:told]], [line.text for line in story[told:]]
        assert questions and all(text.endswith("?") for text in questions) and len(set(questions)) == len(questions)
        for line in story[told:]:
            assert solve(facts, line.text) == line.answer, format_story(story)
        asked.add(len(questions))
    assert asked == {4} if task == "qa4" else len(asked) > 1


def test_story_to_recall_asks_for_other_tasks_what_its_text_can_tell():
    moves, objects, gifts = {"Where is", "Is"}, {"Where is the", "Where was", "How many", "What is"}, {"What did", "Who"}
    expected = {"qa1": moves, "qa4": {"What is"}, "qa5": moves | objects | gifts, "qa7": moves | objects | gifts, "qa9": moves, "qa10": moves}
    for task in TASKS:
        stories = [simulate(task, random.Random(seed), TASKS) for seed in range(100)]
        asked = {re.match("Where is the|Where is|Where was|Is|How many|What is|What did|Who", line.text)[0]
                 for story in stories for line in story if line.answer}
        assert asked == expected.get(task, moves | objects)


@pytest.mark.parametrize("task", TASKS)
def test_the_reader_understands_the_original_files(task):
    """Which proves the reader. Four questions of qa5 ask what A gave to B and mean the gift before the last."""
    questions = [(facts_before(story, i), line) for story in original(task) for i, line in enumerate(story) if line.answer]
    wrong = sum(solve(facts, line.text) != line.answer for facts, line in questions)
    assert wrong <= (len(questions) / 100 if task == "qa5" else 0)


@pytest.mark.parametrize("task", TASKS)
def test_supporting_facts_alone_give_the_answer(task):
    for story in simulated(task):
        for i, line in enumerate(story):
            if line.answer:
                assert line.support and all(0 <= s < i and not story[s].answer for s in line.support)
                assert len(set(line.support)) == len(line.support)
                support = [story[s].text for s in sorted(line.support)]
                if task in ("qa2", "qa3") and kind(support[-1].split()) == "drop":  # to have dropped it is to have taken it
                    support.insert(0, f"{support[-1].split()[0]} took the {line.text.rstrip('?').split()[3]}.")
                assert solve(support, line.text) == line.answer, format_story(story[:i + 1])


@pytest.mark.parametrize("task", TASKS)
def test_nobody_does_what_cannot_be_done(task):
    for story in simulated(task):
        place, holder, lying = {}, {}, {}
        for words in (line.text.removesuffix(".").removesuffix(" there").split() for line in story if not line.answer):
            actor, thing = words[0], words[-1]
            if kind(words) == "move":
                assert task in ("qa9", "qa10") or place.get(actor) != thing
                place[actor] = thing
            elif kind(words) == "get":
                assert not holder.get(thing) and (thing not in lying or lying[thing] == place.get(actor, lying[thing]))
                holder[thing] = actor
            elif kind(words) == "drop":
                assert holder.get(thing) == actor
                holder[thing] = None
                lying.pop(thing, None)
                if actor in place:
                    lying[thing] = place[actor]
            elif kind(words) == "give":
                assert holder.get(words[-3]) == actor != thing
                assert place.get(actor, place.get(thing)) == place.get(thing, place.get(actor))
                holder[words[-3]] = thing


@pytest.mark.parametrize("task, actors", [("qa5", "Mary Fred Bill Jeff"), ("qa7", "John Mary Sandra Daniel")])
def test_gifts_go_by_order_as_in_the_original(task, actors):
    """Of what can be given, the first object is, to the first actor at hand."""
    for story in simulated(task) + original(task):
        place, holder = {}, {}
        for words in (line.text.removesuffix(".").removesuffix(" there").split() for line in story if not line.answer):
            if kind(words) == "give":
                giver, thing, to = words[0], words[-3], words[-1]
                possible = [(o, a) for o in sorted(WORDS["O"].split()) if holder.get(o) in place for a in actors.split()
                            if a != holder[o] and place.get(a) == place[holder[o]]]
                assert (thing, to) not in possible or possible[0] == (thing, to)
                holder[thing] = to
                for one, other in ((giver, to), (to, giver)):  # they are in one place
                    if other in place:
                        place[one] = place[other]
            elif kind(words) == "move":
                place[words[0]] = words[-1]
            else:
                holder[words[-1]] = words[0] if kind(words) == "get" else None


# --- Statistics

def template(text):
    for letter, words in WORDS.items():
        text = re.sub(rf"\b({words.replace(' ', '|')})\b", letter, text)
    return text


def figures(stories):
    """What is counted in stories: {group: Counter}."""
    groups = defaultdict(Counter)
    for story in stories:
        groups["lines in a story, by tens"][len(story) // 10] += 1
        facts, since, before = [], 0, None
        for i, line in enumerate(story):
            if not line.answer:
                groups["facts"][template(line.text)] += 1
                if facts:
                    a, b = story[facts[-1]].text.split(), line.text.split()
                    pair = [kind(a) or "state", kind(b) or "state"] + ["same"] * (a[0] == b[0])
                    groups["a fact and the next"][" ".join(pair)] += 1
                    if a[0] == "The":
                        groups["the room of both facts"][f"{'first' if a[1] in b else 'last'} {'first' if b[1] in a else 'last'}"] += 1
                facts.append(i)
                since += 1
                continue
            groups["questions"][template(line.text)] += 1
            groups["answers"][line.answer if line.answer.count(",") < 2 else "three"] += 1
            groups["facts between questions"][min(since, 12)] += 1
            groups["facts since the newest support"][len(facts) - 1 - facts.index(max(line.support))] += 1
            groups["facts since the oldest support"][min(len(facts) - 1 - facts.index(min(line.support)), 12)] += 1
            order = "" if line.support == tuple(sorted(line.support)) else " not in order"
            groups["number and order of supports"][f"{len(line.support)}{order}"] += 1
            groups["asked once more"][str(before == line.text)] += 1
            since, before = 0, line.text
    return {group: dict(sorted(counts.items())) for group, counts in groups.items()}


@pytest.mark.parametrize("task", TASKS)
def test_statistics_are_those_of_the_original_files(task):
    """Two samples, each figure within five standard deviations: real stories are few, and figures of one story hang together."""
    found = figures(simulated(task, 3000 if task == "qa4" else 600))
    for expected in [RECORDED[task]] + ([figures(original(task))] if original(task) else []):
        assert found.keys() == expected.keys()
        for group in expected:
            a, b = Counter(expected[group]), Counter(found[group])
            for value in a.keys() | b.keys():
                p, q, both = a[value] / a.total(), b[value] / b.total(), (a[value] + b[value]) / (a.total() + b.total())
                deviation = (both * (1 - both) * (1 / a.total() + 1 / b.total())) ** 0.5
                assert abs(p - q) <= 5 * deviation, (group, value, p, q)


@pytest.mark.parametrize("task", TASKS)
def test_sentences_are_those_of_the_original_files(task):
    """No kind of sentence, and no name, thing or place, that the original lacks, and none of the original that is missing."""
    known = {"qa5": "Bill Fred Jeff Mary", "qa10": "Bill Fred Julie Mary", "qa4": ""}.get(task, "Mary John Sandra Daniel").split()
    known += {"qa10": "bedroom cinema kitchen office park school"}.get(task, "bathroom bedroom garden hallway kitchen office").split()
    known += "apple football milk".split() if task in ("qa2", "qa3", "qa5", "qa6", "qa7", "qa8") else []
    stories = simulated(task, 3000 if task == "qa4" else 600)
    for told in [stories] + ([original(task)] if original(task) else []):
        texts = {line.text for story in told for line in story}
        assert set(re.findall(r"\w+", " ".join(texts))) & set(" ".join(WORDS.values()).split()) == set(known)
        assert {template(text) for text in texts} == RECORDED[task]["facts"].keys() | RECORDED[task]["questions"].keys()
        assert {answer for story in told for line in story if line.answer for answer in line.answer.split(",")} <= LABELS[task]


def test_stories_are_a_function_of_the_seed_and_do_not_repeat():
    for task in TASKS:
        assert simulate(task, random.Random(3)) == simulate(task, random.Random(3))
        assert task == "qa4" or len({format_story(story) for story in simulated(task)}) == 400
    with pytest.raises(ValueError, match="task=qa11 is not known"):
        simulate("qa11", random.Random(0))


def test_command_prints_a_story(checkout):
    code, out, err = checkout.run("-m", "data.babi", "--task=qa3", "--seed=1")
    assert code == 0 and out == format_story(simulate("qa3", random.Random(1))), err
    code, _, err = checkout.run("-m", "data.babi", "--task=qa0")
    assert code == 2 and err == f"error: task=qa0 is not known: use one of {', '.join(TASKS)}\n"


# --- Files

def test_stories_survive_their_file(tmp_path):
    stories = [story for task in TASKS for story in simulated(task)[:5]]
    (tmp_path / "qa.txt").write_text("".join(map(format_story, stories)))
    assert read_babi(tmp_path / "qa.txt") == stories


def test_format_is_that_of_the_original():
    story = [Line("Mary moved to the bathroom."), Line("John went to the hallway."), Line("Where is Mary?", "bathroom", (0,))]
    assert format_story(story) == "1 Mary moved to the bathroom.\n2 John went to the hallway.\n3 Where is Mary? \tbathroom\t1\n"
    for task in TASKS:
        for story in original(task)[:50]:
            assert task == "qa4" or format_story(story) in find_file(BABI_DIR, task).read_text()


@pytest.mark.parametrize("text, place", [
    ("", "1"), ("Mary went home.\n", "1"), ("1 Mary went home.\n3 John too.\n", "2"), ("1 Mary went home.\n\n", "2"),
    ("1 Mary went home.\n2 Where is Mary?\thome\n", "2"), ("1 Mary went home.\n2 Where is Mary?\thome\t2\n", "2"),
    ("1 Mary went home.\n2 Where is Mary?\thome\tx\n", "2"), ("1 Mary went home.\n2 Where is Mary?\t\t1\n", "2")])
def test_malformed_story_is_named_by_file_and_line(tmp_path, text, place):
    (tmp_path / "bad.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"bad\.txt:{place}: expected"):
        read_babi(tmp_path / "bad.txt")


def test_sample_has_all_facts_and_no_earlier_question():
    for story in simulated("qa2")[:20]:
        found = samples(story)
        assert [(s.question, s.answer) for s in found] == [(line.text, line.answer) for line in story if line.answer]
        assert all(solve(s.context, s.question) == s.answer and not any("?" in fact for fact in s.context) for s in found)
        assert list(found[-1].context) == [line.text for line in story if not line.answer]


RECORDS = [{"input": "Mary went home. It rained.\nJohn, too, left.", "question": "Where is Mary? ", "target": "home"},
           {"input": 'He said "no". A, b.', "question": "What?", "target": "milk,football"}]


@pytest.mark.parametrize("name, text", [
    ("0k.json", json.dumps(RECORDS)), ("0k.jsonl", "\n".join(map(json.dumps, RECORDS)) + "\n"),
    ("0k.csv", 'target,input,question\nhome,"Mary went home. It rained.\nJohn, too, left.",Where is Mary? \n'
               '"milk,football","He said ""no"". A, b.",What?\n')])
def test_babilong_records_are_read(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_babilong(tmp_path / name) == [
        Sample(("Mary went home.", "It rained.", "John, too, left."), "Where is Mary?", "home"),
        Sample(('He said "no".', "A, b."), "What?", "milk,football")]


def test_long_and_unusual_texts_are_read(tmp_path):
    text = "It rained\u2028again. " * 20_000
    (tmp_path / "128k.csv").write_text(f'input,question,target\n"{text}",Where?,here\n')
    (tmp_path / "128k.jsonl").write_text(json.dumps({"input": text, "question": "Where?", "target": "here"}, ensure_ascii=False))
    for name in ("128k.csv", "128k.jsonl"):
        assert read_babilong(tmp_path / name) == [Sample(("It rained again.",) * 20_000, "Where?", "here")]


GOOD = json.dumps(RECORDS[0])


@pytest.mark.parametrize("name, text, place", [
    ("0k.json", "[" + GOOD + ', {"input": "x"}]', " record 2"), ("0k.json", "[\n{]", "2"), ("0k.json", GOOD, " record 1"),
    ("0k.json", "3", "1"), ("0k.json", "[]", "1"), ("0k.csv", "", "1"), ("0k.jsonl", GOOD + "\n{\n", "2"),
    ("0k.jsonl", GOOD + '\n{"input": 3, "question": "?", "target": "a"}', "2"),
    ("0k.jsonl", "", "1"), ("0k.csv", "input,question\na,b\n", "2"), ("0k.csv", "input,question,target\na,b,c\na,b\n", "3")])
def test_malformed_record_is_named(tmp_path, name, text, place):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"0k\.\w+:{place}: expected a record"):
        read_babilong(tmp_path / name)


def test_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"caf\xe9")
    for read in (read_babi, read_babilong):
        with pytest.raises(ValueError, match="x.csv is not UTF-8"):
            read(tmp_path / "x.csv")


def test_files_are_found_by_task_and_length(tmp_path):
    for name in ("qa10_a_test.txt", "qa1_a_train.txt", "qa1_a_test.txt", "qa2_b_train.txt", "data/qa1/4k.json", "qa2/4k.jsonl",
                 "4k/qa3.csv", "qa30_a_train.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [str(find_file(tmp_path, *args).relative_to(tmp_path)) for args in
             (("qa1",), ("qa2",), ("qa10",), ("qa1", "4k"), ("qa2", "4k"), ("qa3", "4k"))]
    assert found == ["qa1_a_test.txt", "qa2_b_train.txt", "qa10_a_test.txt", "data/qa1/4k.json", "qa2/4k.jsonl", "4k/qa3.csv"]
    for args, wanted in ((("qa3",), r"qa3_\*test\*\.txt"), (("qa1", "8k"), "qa1/8k.json")):
        with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} has no file for {args[0]}.*{wanted}"):
            find_file(tmp_path, *args)


def test_lengths_are_read():
    assert [parse_length(text) for text in ("0k", "512", "1k", "128k", "1M")] == [0, 512, 1000, 128_000, 1_000_000]
    for text in ("", "k", "1kk", "-1k", "1.5k", "1m"):
        with pytest.raises(ValueError, match="length"):
            parse_length(text)


@pytest.mark.parametrize("task, output, answer, question, correct", [
    ("qa1", " bathroom.", "bathroom", "Where is Mary?", True),
    ("qa1", "Mary is in the BATHROOM. Or in the kitchen.", "bathroom", "Where is Mary?", True),
    ("qa1", "bathroom or kitchen.", "bathroom", "Where is Mary?", False),
    ("qa1", "kitchen.", "bathroom", "Where is Mary?", False),
    ("qa1", "", "bathroom", "Where is Mary?", False),
    ("qa1", ". bathroom", "bathroom", "Where is Mary?", False),
    ("qa3", "It was in the office before the kitchen", "office", "Where was the milk before the kitchen?", True),
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
    for story in simulated(task):
        for line in story:
            assert not line.answer or is_correct(f" {line.answer}.", line.answer, line.text, LABELS[task]), line


# --- Haystack and batches

def test_text_is_cut_into_sentences():
    assert split_sentences(" One two.\n\nThree?  Four! 3.5 five") == ["One two.", "Three?", "Four!", "3.5 five"]
    assert split_sentences(" \n") == []
    long = split_sentences("word " * 1000 + "end. Next.")
    assert max(map(len, long)) <= 500 and " ".join(long) == "word " * 1000 + "end. Next."
    assert "".join(split_sentences("x" * 1200)) == "x" * 1200


@pytest.mark.parametrize("task", TASKS)
def test_pieces_join_to_the_ids_of_the_whole_text(task, bpe):
    for story in simulated(task)[:20]:
        text = "".join(f" {line.text}" + (f" {line.answer}." if line.answer else "") for line in story)
        assert np.concatenate([encode_line(line, bpe)[0] for line in story]).tolist() == bpe.encode(text)
        for line in story:
            ids, n = encode_line(line, bpe)
            assert bpe.decode(ids[len(ids) - n:]) == (f" {line.answer}." if line.answer else "")


def test_text_without_a_sentence_is_refused(bpe):
    with pytest.raises(ValueError, match="no sentence"):
        Haystack(" \n", bpe)


@pytest.mark.parametrize("length", [0, 40, 120, 257, 1000, 10_000])
def test_facts_are_hidden_whole_and_in_order_at_the_exact_length(length, bpe, haystack):
    rng, around = np.random.default_rng(0), " " + " ".join([TEXT] * 5)
    sentences = set(split_sentences(TEXT))
    for story in simulated("qa1")[:30]:
        pieces = [encode_line(line, bpe)[0] for line in story[:3]]
        ids, starts = haystack.mix(pieces, length, rng)
        assert len(ids) == max(length, sum(map(len, pieces))) and len(starts) == 3 and list(starts) == sorted(starts)
        assert all(np.array_equal(ids[start:start + len(piece)], piece) for start, piece in zip(starts, pieces))
        assert starts[-1] + len(pieces[-1]) == len(ids)
        rest = np.delete(ids, np.concatenate([np.arange(s, s + len(p)) for s, p in zip(starts, pieces)]))
        assert bpe.decode(rest) in around
        assert bpe.encode(bpe.decode(ids)) == ids.tolist() or bpe.decode(ids[:1])[0] != " "
        for start in starts:  # in front of a fact: nothing, another fact, or the end of a sentence
            if start:
                found = split_sentences(bpe.decode(ids[:start]))[-1]
                assert found in sentences or found in [line.text for line in story[:3]] or any(s.endswith(found) for s in sentences)


def test_facts_stand_anywhere_with_equal_chance(bpe, haystack):
    rng = np.random.default_rng(0)
    pieces = [encode_line(Line(text), bpe)[0] for text in ("Mary got the milk.", "John left.", "Where is Mary?")]
    n_text = 2000 - sum(map(len, pieces))
    places = [(start - offset) / n_text for _ in range(1500)  # two facts each
              for start, offset in zip(haystack.mix(pieces, 2000, rng)[1], (0, len(pieces[0])))]
    counts = np.histogram(places, bins=10, range=(0, 1))[0]
    assert ((counts - 300) ** 2 / 300).sum() < 30, counts  # chi-square, 9 degrees of freedom


def test_stretch_of_text_begins_anywhere(bpe, haystack):
    piece, rng = encode_line(Line("Where is Mary?"), bpe)[0], np.random.default_rng(0)
    years = [int(re.search(r"In year (\d+)", bpe.decode(haystack.mix([piece], 60, rng)[0]))[1]) for _ in range(1500)]
    counts = np.histogram(years, bins=10, range=(0, 300))[0]
    assert ((counts - 150) ** 2 / 150).sum() < 30, counts


def test_a_million_tokens_are_mixed(bpe, haystack):
    pieces = [encode_line(line, bpe)[0] for line in simulated("qa2")[0]]
    ids, _ = haystack.mix(pieces, 1_000_000, np.random.default_rng(0))
    assert len(ids) == 1_000_000


@pytest.mark.parametrize("length", [0, 400])
def test_batch_is_a_function_of_seed_step_and_rank(length, bpe, haystack):
    def batch(*args, size=2):
        return training_batch(["qa1", "qa5"], length, haystack, bpe, size, *args)
    x, y, tasks = batch(1, 2)
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape and x.shape[1] % 16 == 0 and len(tasks) == 2
    random.seed(5)
    np.random.seed(5)
    again = batch(1, 2)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and tasks == again[2]
    for other in ((2, 2), (1, 3), (1, 2, 1)):
        assert not torch.equal(x[0, :40], batch(*other)[0][0, :40])
    both = batch(1, 2, size=4)
    parts = [batch(1, 2, rank) for rank in (0, 1)]
    assert both[2] == parts[0][2] + parts[1][2]
    for rank, (part, targets, _) in enumerate(parts):
        n = min(part.shape[1], both[0].shape[1])
        rows = slice(2 * rank, 2 * rank + 2)
        assert torch.equal(part[:, :n], both[0][rows, :n]) and torch.equal(targets[:, :n], both[1][rows, :n])


@pytest.mark.parametrize("length, asking", [(0, "along"), (300, "along"), (1000, "along"), (0, "own"), (1000, "own"), (0, "all"), (1000, "all")])
def test_loss_is_on_right_answers_alone(length, asking, bpe, haystack):
    x, y, tasks = training_batch(TASKS, length, haystack, bpe, 30, seed=1, step=0, asking=asking)
    assert len(set(tasks)) > 5 and x.shape[1] <= max(length + 63, 256)
    for row, targets, task in zip(x.tolist(), y.tolist(), tasks):
        marked = [t for t, target in enumerate(targets) if target >= 0]
        assert marked and all(targets[t] == row[t + 1] for t in marked)
        ends = [t for t in marked if t + 1 not in marked]
        for end in ends:  # the text before: facts, corpus, earlier questions with their answers
            begin = next(t for t in range(end, -1, -1) if t - 1 not in marked)
            before, answer = bpe.decode(row[:begin + 1]), bpe.decode(row[begin + 1:end + 2])
            assert answer[0] == " " and answer[-1] == "."
            *context, question = split_sentences(before)
            context = [s for s in context if set(template(s).split()) & {"N", "The"} and "king" not in s and s[0] != " "]
            facts = [s for s in context if s.endswith(".") and template(s) in RECORDED[task]["facts"]]
            assert solve(facts, question) == answer[1:-1], before
        total = length or len(np.trim_zeros(row, "b"))
        assert ends[-1] + 2 == total or length == 0


def test_story_that_does_not_fit_is_cut_or_drawn_again(bpe, haystack):
    x, y, _ = training_batch(["qa2"], 150, haystack, bpe, 20, seed=1, step=0)
    assert x.shape == (20, 160) and bool((y >= 0).any(1).all()) and bool((x[:, 150:] == 0).all()) and bool((y[:, 149:] == -1).all())
    assert training_batch(["qa1"], 0, None, bpe, 2, seed=1, step=0)[0].shape[0] == 2
    with pytest.raises(ValueError, match="within 8 tokens"):
        training_batch(["qa3"], 8, haystack, bpe, 2, seed=1, step=0)


@pytest.mark.parametrize("length", [0, 300, 1000])
def test_evaluation_asks_one_question_at_the_end(length, bpe, haystack):
    rng = np.random.default_rng(0)
    for story in simulated("qa1")[:10]:
        for sample in samples(story):
            ids = evaluation_sample(sample, length, haystack if length else None, bpe, rng)
            text = bpe.decode(ids)
            assert len(ids) == length or length == 0 and text == "".join(f" {s}" for s in (*sample.context, sample.question))
            assert text.endswith(f" {sample.question}") and text.count("?") == 1
            facts = [s for s in split_sentences(text) if s in sample.context]
            assert facts == list(sample.context)


def test_char_tokenizer_serves_as_well():
    words = "".join(line.text + line.answer for task in TASKS for line in simulated(task)[0])
    tokenizer = CharTokenizer("".join(sorted(set(TEXT + words))))
    x, y, _ = training_batch(["qa1"], 700, Haystack(TEXT, tokenizer), tokenizer, 2, seed=0, step=0)
    for row, targets in zip(x, y):
        assert tokenizer.decode(targets[targets >= 0].tolist()).count(".") == tokenizer.decode(row[:700].tolist()).count("?")


# --- Figures of the original files: figures(read_babi(...)) of each task

RECORDED = {
    "qa1": {
        "lines in a story, by tens": {1: 200},
        "facts": {
            "N journeyed to the P.": 406, "N moved to the P.": 392, "N travelled to the P.": 394, "N went back to the P.": 390,
            "N went to the P.": 418
        },
        "a fact and the next": {"move move": 1343, "move move same": 457},
        "questions": {"Where is N?": 1000},
        "answers": {"bathroom": 154, "bedroom": 155, "garden": 177, "hallway": 175, "kitchen": 173, "office": 166},
        "facts between questions": {2: 1000},
        "facts since the newest support": {0: 468, 1: 284, 2: 122, 3: 81, 4: 45},
        "facts since the oldest support": {0: 468, 1: 284, 2: 122, 3: 81, 4: 45},
        "number and order of supports": {"1": 1000},
        "asked once more": {"False": 734, "True": 266},
    },
    "qa2": {
        "lines in a story, by tens": {1: 29, 2: 122, 3: 41, 4: 4, 5: 3, 6: 1},
        "facts": {
            "N discarded the O there.": 39, "N discarded the O.": 141, "N dropped the O there.": 43, "N dropped the O.": 128,
            "N got the O there.": 237, "N grabbed the O there.": 231, "N journeyed to the P.": 558, "N left the O there.": 28,
            "N left the O.": 150, "N moved to the P.": 563, "N picked up the O there.": 205, "N put down the O there.": 35,
            "N put down the O.": 120, "N took the O there.": 205, "N travelled to the P.": 559, "N went back to the P.": 550,
            "N went to the P.": 546
        },
        "a fact and the next": {
            "drop drop": 48, "drop drop same": 19, "drop get": 90, "drop get same": 101, "drop move": 270, "drop move same": 89,
            "get drop": 59, "get drop same": 170, "get get": 85, "get get same": 32, "get move": 372, "get move same": 134,
            "move drop": 304, "move drop same": 84, "move get": 390, "move get same": 127, "move move": 1312, "move move same": 452
        },
        "questions": {"Where is the O?": 1000},
        "answers": {"bathroom": 145, "bedroom": 158, "garden": 210, "hallway": 138, "kitchen": 147, "office": 202},
        "facts between questions": {2: 596, 4: 131, 6: 100, 8: 64, 10: 34, 12: 75},
        "facts since the newest support": {0: 419, 1: 240, 2: 171, 3: 105, 4: 65},
        "facts since the oldest support": {1: 119, 2: 139, 3: 177, 4: 141, 5: 80, 6: 74, 7: 58, 8: 50, 9: 40, 10: 33, 11: 22, 12: 67},
        "number and order of supports": {"2": 295, "2 not in order": 705},
        "asked once more": {"False": 473, "True": 527},
    },
    "qa3": {
        "lines in a story, by tens": {
            2: 6, 3: 16, 4: 21, 5: 25, 6: 32, 7: 26, 8: 13, 9: 11, 10: 15, 11: 9, 12: 7, 13: 6, 14: 2, 15: 2, 16: 2, 17: 1, 18: 2,
            21: 2, 22: 2
        },
        "facts": {
            "N discarded the O there.": 134, "N discarded the O.": 497, "N dropped the O there.": 134, "N dropped the O.": 548,
            "N got the O there.": 144, "N got the O.": 561, "N grabbed the O there.": 131, "N grabbed the O.": 537,
            "N journeyed to the P.": 1858, "N left the O there.": 141, "N left the O.": 496, "N moved to the P.": 1973,
            "N picked up the O there.": 125, "N picked up the O.": 604, "N put down the O there.": 152, "N put down the O.": 481,
            "N took the O there.": 127, "N took the O.": 551, "N travelled to the P.": 1821, "N went back to the P.": 1814,
            "N went to the P.": 1967
        },
        "a fact and the next": {
            "drop drop": 215, "drop drop same": 67, "drop get": 382, "drop get same": 411, "drop move": 1065, "drop move same": 381,
            "get drop": 216, "get drop same": 543, "get get": 264, "get get same": 76, "get move": 1235, "get move same": 427,
            "move drop": 1179, "move drop same": 363, "move get": 1164, "move get same": 423, "move move": 4701, "move move same": 1484
        },
        "questions": {"Where was the O before the P?": 1000},
        "answers": {"bathroom": 198, "bedroom": 144, "garden": 171, "hallway": 183, "kitchen": 146, "office": 158},
        "facts between questions": {2: 452, 4: 52, 6: 47, 8: 34, 10: 35, 12: 380},
        "facts since the newest support": {0: 396, 1: 250, 2: 167, 3: 109, 4: 78},
        "facts since the oldest support": {2: 67, 3: 125, 4: 162, 5: 67, 6: 87, 7: 82, 8: 67, 9: 69, 10: 51, 11: 50, 12: 173},
        "number and order of supports": {"3 not in order": 1000},
        "asked once more": {"False": 661, "True": 339},
    },
    "qa4": {
        "lines in a story, by tens": {0: 1000},
        "facts": {
            "The P is east of the P.": 513, "The P is north of the P.": 474, "The P is south of the P.": 510,
            "The P is west of the P.": 503
        },
        "a fact and the next": {"state state same": 1000},
        "the room of both facts": {"first first": 123, "last last": 877},
        "questions": {
            "What is east of the P?": 117, "What is north of the P?": 104, "What is south of the P?": 135,
            "What is the P east of?": 126, "What is the P north of?": 124, "What is the P south of?": 129,
            "What is the P west of?": 142, "What is west of the P?": 123
        },
        "answers": {"bathroom": 159, "bedroom": 160, "garden": 162, "hallway": 169, "kitchen": 180, "office": 170},
        "facts between questions": {2: 1000},
        "facts since the newest support": {0: 482, 1: 518},
        "facts since the oldest support": {0: 482, 1: 518},
        "number and order of supports": {"1": 1000},
        "asked once more": {"False": 1000},
    },
    "qa5": {
        "lines in a story, by tens": {1: 41, 2: 85, 3: 43, 4: 16, 5: 7, 6: 5, 8: 2, 10: 1},
        "facts": {
            "N discarded the O there.": 26, "N discarded the O.": 109, "N dropped the O there.": 20, "N dropped the O.": 128,
            "N gave the O to N.": 285, "N got the O there.": 213, "N grabbed the O there.": 219, "N handed the O to N.": 289,
            "N journeyed to the P.": 535, "N left the O there.": 24, "N left the O.": 118, "N moved to the P.": 543,
            "N passed the O to N.": 296, "N picked up the O there.": 221, "N put down the O there.": 28, "N put down the O.": 115,
            "N took the O there.": 211, "N travelled to the P.": 567, "N went back to the P.": 530, "N went to the P.": 561
        },
        "a fact and the next": {
            "drop drop": 39, "drop drop same": 14, "drop get": 80, "drop get same": 91, "drop give": 31, "drop give same": 4,
            "drop move": 209, "drop move same": 76, "get drop": 47, "get drop same": 108, "get get": 72, "get get same": 23,
            "get give": 43, "get give same": 122, "get move": 312, "get move same": 113, "give drop": 104, "give drop same": 3,
            "give get": 50, "give get same": 15, "give give": 360, "give move": 205, "give move same": 59, "move drop": 189,
            "move drop same": 64, "move get": 338, "move get same": 134, "move give": 226, "move give same": 84, "move move": 1209,
            "move move same": 414
        },
        "questions": {
            "What did N give to N?": 367, "Who did N give the O to?": 163, "Who gave the O to N?": 136, "Who gave the O?": 166,
            "Who received the O?": 168
        },
        "answers": {"Bill": 151, "Fred": 167, "Jeff": 144, "Mary": 171, "apple": 136, "football": 136, "milk": 95},
        "facts between questions": {2: 730, 4: 41, 6: 46, 8: 33, 10: 31, 12: 119},
        "facts since the newest support": {0: 453, 1: 214, 2: 151, 3: 99, 4: 83},
        "facts since the oldest support": {0: 453, 1: 214, 2: 151, 3: 99, 4: 83},
        "number and order of supports": {"1": 1000},
        "asked once more": {"False": 874, "True": 126},
    },
    "qa6": {
        "lines in a story, by tens": {1: 199, 3: 1},
        "facts": {
            "N discarded the O there.": 12, "N discarded the O.": 44, "N dropped the O there.": 12, "N dropped the O.": 49,
            "N got the O there.": 98, "N grabbed the O there.": 100, "N journeyed to the P.": 267, "N left the O there.": 13,
            "N left the O.": 51, "N moved to the P.": 276, "N picked up the O there.": 118, "N put down the O there.": 12,
            "N put down the O.": 44, "N took the O there.": 127, "N travelled to the P.": 290, "N went back to the P.": 262,
            "N went to the P.": 291
        },
        "a fact and the next": {
            "drop drop": 10, "drop drop same": 2, "drop get": 36, "drop get same": 36, "drop move": 89, "drop move same": 29,
            "get drop": 23, "get drop same": 83, "get get": 42, "get get same": 9, "get move": 195, "get move same": 51,
            "move drop": 103, "move drop same": 16, "move get": 195, "move get same": 72, "move move": 654, "move move same": 221
        },
        "questions": {"Is N in the P?": 1000},
        "answers": {"no": 492, "yes": 508},
        "facts between questions": {2: 975, 4: 23, 6: 1, 12: 1},
        "facts since the newest support": {0: 356, 1: 297, 2: 149, 3: 130, 4: 68},
        "facts since the oldest support": {0: 356, 1: 297, 2: 149, 3: 130, 4: 68},
        "number and order of supports": {"1": 1000},
        "asked once more": {"False": 911, "True": 89},
    },
    "qa7": {
        "lines in a story, by tens": {1: 157, 2: 38, 3: 5},
        "facts": {
            "N discarded the O there.": 13, "N discarded the O.": 54, "N dropped the O there.": 15, "N dropped the O.": 49,
            "N gave the O to N.": 94, "N got the O there.": 123, "N grabbed the O there.": 121, "N handed the O to N.": 102,
            "N journeyed to the P.": 309, "N left the O there.": 14, "N left the O.": 42, "N moved to the P.": 336,
            "N passed the O to N.": 124, "N picked up the O there.": 126, "N put down the O there.": 13, "N put down the O.": 38,
            "N took the O there.": 109, "N travelled to the P.": 294, "N went back to the P.": 345, "N went to the P.": 317
        },
        "a fact and the next": {
            "drop drop": 9, "drop drop same": 2, "drop get": 29, "drop get same": 45, "drop give": 6, "drop give same": 1,
            "drop move": 88, "drop move same": 26, "get drop": 9, "get drop same": 60, "get get": 47, "get get same": 9, "get give": 7,
            "get give same": 67, "get move": 177, "get move same": 65, "give drop": 39, "give drop same": 1, "give get": 18,
            "give get same": 3, "give give": 122, "give move": 74, "give move same": 25, "move drop": 86, "move drop same": 32,
            "move get": 193, "move get same": 82, "move give": 81, "move give same": 36, "move move": 737, "move move same": 262
        },
        "questions": {"How many objects is N carrying?": 1000},
        "answers": {"none": 468, "one": 488, "three": 1, "two": 43},
        "facts between questions": {2: 858, 4: 71, 6: 34, 8: 12, 10: 10, 12: 15},
        "facts since the newest support": {0: 427, 1: 255, 2: 144, 3: 107, 4: 67},
        "facts since the oldest support": {
            0: 115, 1: 164, 2: 123, 3: 140, 4: 115, 5: 98, 6: 70, 7: 59, 8: 51, 9: 47, 10: 7, 11: 6, 12: 5
        },
        "number and order of supports": {"1": 318, "2": 365, "3": 133, "4": 130, "5": 32, "6": 14, "7": 6, "8": 2},
        "asked once more": {"False": 481, "True": 519},
    },
    "qa8": {
        "lines in a story, by tens": {1: 157, 2: 39, 3: 3, 5: 1},
        "facts": {
            "N discarded the O there.": 13, "N discarded the O.": 60, "N dropped the O there.": 9, "N dropped the O.": 69,
            "N got the O there.": 145, "N grabbed the O there.": 135, "N journeyed to the P.": 353, "N left the O there.": 12,
            "N left the O.": 85, "N moved to the P.": 315, "N picked up the O there.": 133, "N put down the O there.": 16,
            "N put down the O.": 80, "N took the O there.": 148, "N travelled to the P.": 333, "N went back to the P.": 386,
            "N went to the P.": 342
        },
        "a fact and the next": {
            "drop drop": 17, "drop drop same": 6, "drop get": 43, "drop get same": 68, "drop move": 124, "drop move same": 47,
            "get drop": 19, "get drop same": 108, "get get": 60, "get get same": 14, "get move": 232, "get move same": 86,
            "move drop": 152, "move drop same": 42, "move get": 226, "move get same": 97, "move move": 803, "move move same": 290
        },
        "questions": {"What is N carrying?": 1000},
        "answers": {
            "apple": 194, "apple,football": 10, "apple,milk": 22, "football": 188, "football,apple": 12, "football,milk": 9,
            "milk": 198, "milk,apple": 6, "milk,football": 11, "nothing": 344, "three": 6
        },
        "facts between questions": {2: 860, 4: 61, 6: 39, 8: 19, 10: 6, 12: 15},
        "facts since the newest support": {0: 378, 1: 264, 2: 180, 3: 109, 4: 69},
        "facts since the oldest support": {
            0: 151, 1: 139, 2: 141, 3: 117, 4: 126, 5: 72, 6: 66, 7: 68, 8: 39, 9: 54, 10: 7, 11: 9, 12: 11
        },
        "number and order of supports": {
            "1": 415, "2": 323, "3": 129, "3 not in order": 14, "4": 61, "4 not in order": 23, "5": 16, "5 not in order": 10, "6": 4,
            "6 not in order": 2, "7 not in order": 2, "8 not in order": 1
        },
        "asked once more": {"False": 405, "True": 595},
    },
    "qa9": {
        "lines in a story, by tens": {1: 200},
        "facts": {
            "N is in the P.": 479, "N is no longer in the P.": 279, "N is not in the P.": 254, "N journeyed to the P.": 180,
            "N moved to the P.": 211, "N travelled to the P.": 203, "N went back to the P.": 207, "N went to the P.": 187
        },
        "a fact and the next": {
            "move move": 311, "move move same": 118, "move state": 349, "move state same": 122, "state move": 337,
            "state move same": 118, "state state": 329, "state state same": 116
        },
        "questions": {"Is N in the P?": 1000},
        "answers": {"no": 633, "yes": 367},
        "facts between questions": {2: 1000},
        "facts since the newest support": {0: 449, 1: 291, 2: 136, 3: 85, 4: 39},
        "facts since the oldest support": {0: 449, 1: 291, 2: 136, 3: 85, 4: 39},
        "number and order of supports": {"1": 1000},
        "asked once more": {"False": 906, "True": 94},
    },
    "qa10": {
        "lines in a story, by tens": {1: 200},
        "facts": {
            "N is either in the P or the P.": 477, "N is in the P.": 522, "N journeyed to the P.": 200, "N moved to the P.": 196,
            "N travelled to the P.": 205, "N went back to the P.": 193, "N went to the P.": 207
        },
        "a fact and the next": {
            "move move": 332, "move move same": 102, "move state": 355, "move state same": 114, "state move": 341,
            "state move same": 122, "state state": 332, "state state same": 102
        },
        "questions": {"Is N in the P?": 1000},
        "answers": {"maybe": 122, "no": 466, "yes": 412},
        "facts between questions": {2: 1000},
        "facts since the newest support": {0: 461, 1: 285, 2: 126, 3: 96, 4: 32},
        "facts since the oldest support": {0: 461, 1: 285, 2: 126, 3: 96, 4: 32},
        "number and order of supports": {"1": 1000},
        "asked once more": {"False": 950, "True": 50},
    },
}
