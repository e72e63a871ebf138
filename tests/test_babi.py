"""
data/babi.py: the simulator speaks as the original bAbI files do and tells the truth.

babi_figures.py holds figures of the original files. Where the files themselves are at hand
(LM2_BABI_DIR, or ../shared/data/babi), they are compared and solved as well.
"""
import os
import random
import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import pytest
from babi_figures import RECORDED
from babi_solver import WORDS, kind, solve, template, words_of

from data.babi import LABELS, TASKS, Line, format_story, read_babi, simulate
from data.babilong import find_file

REPO = Path(__file__).parent.parent
BABI_DIR = Path(os.environ.get("LM2_BABI_DIR", REPO.parent / "shared" / "data" / "babi"))
original_files = pytest.mark.skipif(
    not BABI_DIR.is_dir(), reason=f"the original bAbI files are not in {BABI_DIR}")


@cache
def simulated(task, n=300):
    rng = random.Random(7)
    return [simulate(task, rng) for _ in range(n)]


@cache
def original(task):
    return read_babi(find_file(BABI_DIR, task))


def facts_before(story, i):
    return [line.text for line in story[:i] if not line.answer]


def asked(stories):
    """Of each question: the story, its index there, and its line."""
    for story in stories:
        for i, line in enumerate(story):
            if line.answer:
                yield story, i, line


# --- Truth

@pytest.mark.parametrize("task", TASKS)
def test_every_answer_follows_from_the_text(task):
    stories = simulated(task)
    assert len(list(asked(stories))) == len(stories) * (1 if task == "qa4" else 5)
    for story, i, line in asked(stories):
        assert solve(facts_before(story, i), line.text) == line.answer, format_story(story[:i + 1])


@original_files
@pytest.mark.parametrize("task", TASKS)
def test_the_solver_understands_the_original_files(task):
    """Which proves the solver. Two questions of qa5 have an older gift for an answer."""
    wrong = [line for story, i, line in asked(original(task))
             if solve(facts_before(story, i), line.text) != line.answer]
    assert len(wrong) == (2 if task == "qa5" else 0)


@pytest.mark.parametrize("ask", ["own", "all"])
@pytest.mark.parametrize("task", TASKS)
def test_story_to_recall_asks_at_its_end_whatever_its_facts_answer(task, ask):
    rng, numbers = random.Random(7), set()
    for _ in range(200):
        story = simulate(task, rng, TASKS if ask == "all" else [task])
        told = sum(not line.answer for line in story)
        facts = [line.text for line in story[:told]]
        questions = [line.text for line in story[told:]]
        assert questions and all(text.endswith("?") for text in questions)
        assert len(set(questions)) == len(questions)
        for line in story[told:]:
            assert solve(facts, line.text) == line.answer, format_story(story)
        numbers.add(len(questions))
    assert numbers == {4} if task == "qa4" else len(numbers) > 1


def test_story_to_recall_asks_for_other_tasks_what_its_text_can_tell():
    moves = {"Where is", "Is"}
    objects = moves | {"Where is the", "Where was", "How many", "What is"}
    gifts = objects | {"What did", "Who"}
    expected = {"qa1": moves, "qa4": {"What is"}, "qa5": gifts, "qa7": gifts, "qa9": moves,
                "qa10": moves}
    question = "Where is the|Where is|Where was|Is|How many|What is|What did|Who"
    for task in TASKS:
        stories = [simulate(task, random.Random(seed), TASKS) for seed in range(100)]
        found = {re.match(question, line.text)[0] for _, _, line in asked(stories)}
        assert found == expected.get(task, objects)


@pytest.mark.parametrize("task", TASKS)
def test_supporting_facts_alone_give_the_answer(task):
    for story, i, line in asked(simulated(task)):
        assert line.support and all(0 <= s < i and not story[s].answer for s in line.support)
        assert len(set(line.support)) == len(line.support)
        support = [story[s].text for s in sorted(line.support)]
        newest = words_of(support[-1])
        if task in ("qa2", "qa3") and kind(newest) == "drop":  # who dropped it must have taken it
            support.insert(0, f"{newest[0]} took the {newest[-1]}.")
        assert solve(support, line.text) == line.answer, format_story(story[:i + 1])


@pytest.mark.parametrize("task", TASKS)
def test_nobody_does_what_cannot_be_done(task):
    for story in simulated(task):
        place, holder, lying = {}, {}, {}
        for words in map(words_of, facts_before(story, len(story))):
            actor, thing = words[0], words[-1]
            if kind(words) == "move":
                assert task in ("qa9", "qa10") or place.get(actor) != thing
                place[actor] = thing
            elif kind(words) == "get":
                assert not holder.get(thing)
                assert thing not in lying or lying[thing] == place.get(actor, lying[thing])
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


def check_order_of_gifts(stories, actors):
    """Of what can be given, the first object is, to the first actor at hand."""
    for story in stories:
        place, holder = {}, {}
        for words in map(words_of, facts_before(story, len(story))):
            if kind(words) == "give":
                giver, thing, to = words[0], words[-3], words[-1]
                possible = [(o, a) for o in WORDS["O"].split() if holder.get(o) in place
                            for a in actors.split()
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


GIVERS = [("qa5", "Mary Fred Bill Jeff"), ("qa7", "John Mary Sandra Daniel")]


@pytest.mark.parametrize("task, actors", GIVERS)
def test_gifts_go_by_order(task, actors):
    check_order_of_gifts(simulated(task), actors)


@original_files
@pytest.mark.parametrize("task, actors", GIVERS)
def test_gifts_go_by_order_in_the_original_files_too(task, actors):
    check_order_of_gifts(original(task), actors)


# --- Statistics

def figures(stories):
    """What is counted in stories: {group: {value: number}}."""
    groups = defaultdict(Counter)
    for story in stories:
        groups["lines in a story, by tens"][len(story) // 10] += 1
        facts, since, before = [], 0, None
        for i, line in enumerate(story):
            if not line.answer:
                groups["facts"][template(line.text)] += 1
                if facts:
                    a, b = story[facts[-1]].text.split(), line.text.split()
                    same = ["same"] if a[0] == b[0] else []
                    pair = [kind(a) or "state", kind(b) or "state"] + same
                    groups["a fact and the next"][" ".join(pair)] += 1
                    if a[0] == "The":
                        rooms = f"{'first' if a[1] in b else 'last'} "
                        rooms += "first" if b[1] in a else "last"
                        groups["the room of both facts"][rooms] += 1
                facts.append(i)
                since += 1
                continue
            newest, oldest = (len(facts) - 1 - facts.index(s)
                              for s in (max(line.support), min(line.support)))
            order = "" if line.support == tuple(sorted(line.support)) else " not in order"
            answer = line.answer if line.answer.count(",") < 2 else "three"
            groups["questions"][template(line.text)] += 1
            groups["answers"][answer] += 1
            groups["facts between questions"][min(since, 12)] += 1
            groups["facts since the newest support"][newest] += 1
            groups["facts since the oldest support"][min(oldest, 12)] += 1
            groups["number and order of supports"][f"{len(line.support)}{order}"] += 1
            groups["asked once more"][str(before == line.text)] += 1
            since, before = 0, line.text
    return {group: dict(sorted(counts.items())) for group, counts in groups.items()}


def many(task):
    """Enough stories to count in."""
    return simulated(task, 3000 if task == "qa4" else 600)


@pytest.mark.parametrize("task", TASKS)
def test_statistics_are_those_of_the_original_files(task):
    """
    Of two samples, each figure is within five standard deviations: real stories are few, and
    figures of one story hang together.
    """
    expected, found = RECORDED[task], figures(many(task))
    assert found.keys() == expected.keys()
    for group in expected:
        a, b = Counter(expected[group]), Counter(found[group])
        for value in a.keys() | b.keys():
            p, q = a[value] / a.total(), b[value] / b.total()
            both = (a[value] + b[value]) / (a.total() + b.total())
            deviation = (both * (1 - both) * (1 / a.total() + 1 / b.total())) ** 0.5
            assert abs(p - q) <= 5 * deviation, (group, value, p, q)


@original_files
@pytest.mark.parametrize("task", TASKS)
def test_recorded_figures_are_those_of_the_original_files(task):
    assert figures(original(task)) == RECORDED[task]


def check_sentences(task, stories):
    """No kind of sentence, name, thing or place that the original lacks, and none missing."""
    actors = {"qa5": "Bill Fred Jeff Mary", "qa10": "Bill Fred Julie Mary", "qa4": ""}
    places = {"qa10": "bedroom cinema kitchen office park school"}
    known = actors.get(task, "Mary John Sandra Daniel").split()
    known += places.get(task, "bathroom bedroom garden hallway kitchen office").split()
    if task in ("qa2", "qa3", "qa5", "qa6", "qa7", "qa8"):
        known += "apple football milk".split()
    texts = {line.text for story in stories for line in story}
    words = set(re.findall(r"\w+", " ".join(texts)))
    assert words & set(" ".join(WORDS.values()).split()) == set(known)
    assert {template(text) for text in texts} == {*RECORDED[task]["facts"],
                                                  *RECORDED[task]["questions"]}
    answers = {answer for _, _, line in asked(stories) for answer in line.answer.split(",")}
    assert answers <= LABELS[task]


@pytest.mark.parametrize("task", TASKS)
def test_sentences_are_those_of_the_original_files(task):
    check_sentences(task, many(task))


@original_files
@pytest.mark.parametrize("task", TASKS)
def test_original_files_have_no_other_sentences(task):
    check_sentences(task, original(task))


def test_stories_are_a_function_of_the_seed_and_do_not_repeat():
    for task in TASKS:
        assert simulate(task, random.Random(3)) == simulate(task, random.Random(3))
        different = {format_story(story) for story in simulated(task)}
        assert task == "qa4" or len(different) == len(simulated(task))
    with pytest.raises(ValueError, match="task=qa11 is not known"):
        simulate("qa11", random.Random(0))


# --- The command

def test_command_prints_a_story(checkout):
    code, out, err = checkout.run("-m", "data.babi", "--task=qa3", "--seed=1")
    assert code == 0 and out == format_story(simulate("qa3", random.Random(1))), err


@pytest.mark.parametrize("flag, message", [
    ("--task=qa0", f"task=qa0 is not known: use one of {', '.join(TASKS)}"),
    ("--seed=x", "argument --seed: invalid int value: 'x'"),
    ("--sed=1", "unrecognized arguments: --sed=1")])
def test_command_refuses_in_one_line(checkout, flag, message):
    code, out, err = checkout.run("-m", "data.babi", flag)
    assert (code, out, err) == (2, "", f"error: {message}\n")


# --- Files

def test_stories_survive_their_file(tmp_path):
    stories = [story for task in TASKS for story in simulated(task)[:5]]
    (tmp_path / "qa.txt").write_text("".join(map(format_story, stories)))
    assert read_babi(tmp_path / "qa.txt") == stories


STORY = [Line("Mary moved to the bathroom."), Line("John went to the hallway."),
         Line("Where is Mary?", "bathroom", (0,))]
FORMATTED = ("1 Mary moved to the bathroom.\n2 John went to the hallway.\n"
             "3 Where is Mary? \tbathroom\t1\n")


def test_format_is_that_of_babi():
    assert format_story(STORY) == FORMATTED


@original_files
@pytest.mark.parametrize("task", TASKS)
def test_format_is_that_of_the_original_files(task):
    text = find_file(BABI_DIR, task).read_text()
    if task == "qa4":  # the only one without a space in front of the tab
        text = text.replace("?\t", "? \t")
    assert "".join(map(format_story, original(task))) == text


@pytest.mark.parametrize("change", [
    lambda text: text.encode(),
    lambda text: text.removesuffix("\n").encode(),
    lambda text: (text + "\n").encode(),
    lambda text: (text + "\n \n\t\n").encode(),
    lambda text: ("\n" + text.replace("2 ", "\n2 ")).encode(),
    lambda text: text.replace("\n", "\r\n").encode(),
    lambda text: text.encode("utf-8-sig"),
    lambda text: text.replace("1 Mary", "1  Mary").replace("bathroom\t", " bathroom \t ").encode(),
], ids=["as it is", "no last newline", "blank line at the end", "blank lines at the end",
        "blank lines between", "CRLF", "byte order mark", "spaces"])
def test_files_are_read_whatever_their_blanks(tmp_path, change):
    (tmp_path / "qa.txt").write_bytes(change(FORMATTED + FORMATTED))
    assert read_babi(tmp_path / "qa.txt") == [STORY, STORY]


@pytest.mark.parametrize("question", ["3 Where is Mary?\tbathroom", "3 Where is Mary?\tbathroom\t"])
def test_supporting_facts_may_be_left_out(tmp_path, question):
    (tmp_path / "qa.txt").write_text(FORMATTED.replace("3 Where is Mary? \tbathroom\t1", question))
    assert read_babi(tmp_path / "qa.txt") == [STORY[:2] + [Line("Where is Mary?", "bathroom")]]


@pytest.mark.parametrize("text", ["", "\n", "1 Mary went home.\n2 John too.\n"])
def test_file_without_a_question_is_named(tmp_path, text):
    (tmp_path / "none.txt").write_text(text)
    with pytest.raises(ValueError, match=r"none\.txt has no question[^\n]+$"):
        read_babi(tmp_path / "none.txt")


@pytest.mark.parametrize("text, line", [
    ("Mary went home.\n", 1),
    ("1 Mary went home.\n3 John too.\n", 2),
    ("1\n", 1),
    ("1 Mary went home.\n\n2 Where is Mary?\thome\t2\n", 3),
    ("1 Mary went home.\n2 Where is Mary?\thome\tx\n", 2),
    ("1 Mary went home.\n2 Where is Mary?\thome\t0\n", 2),
    ("1 Mary went home.\n2 Where is Mary?\thome\t\u0661\n", 2),
    ("1 Mary went home.\n2 Where is Mary?\t\t1\n", 2),
    ("1 Mary went home.\n2 \thome\t1\n", 2),
    ("1 Mary went home.\n2 Where is Mary?\thome\t1\t1\n", 2),
    ("\x00\x01\x02\n", 1)])
def test_malformed_story_is_named_by_file_and_line(tmp_path, text, line):
    (tmp_path / "bad.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"bad\.txt:{line}: expected [^\n]+$"):
        read_babi(tmp_path / "bad.txt")


def test_what_is_no_text_file_is_named(tmp_path):
    (tmp_path / "binary").write_bytes(b"1 Mary\xff\n")
    with pytest.raises(ValueError, match="binary is not UTF-8"):
        read_babi(tmp_path / "binary")
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(OSError, match=f"{path} is not"):
            read_babi(path)
