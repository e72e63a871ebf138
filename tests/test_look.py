"""look.py: what an answer came from, as text, picture and page; bad input is told in one line."""
import csv
import shutil
import subprocess
from contextlib import chdir
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import REPO, TEXT, is_one_line
from PIL import Image

from data.tokenizer import make_tokenizer
from eval_babilong import EvalConfig, load_run
from lib import trace_figure
from lib.figure import png_of
from lib.trace import trace
from lib.trace_page import page
from lib.view import (
    LastRead,
    Mark,
    Source,
    View,
    first_tells,
    kind_of,
    make_view,
    sentence_of,
    sources_of,
    words_of,
)
from lm2 import LM2, LM2Config
from look import hidden_story

STORIES = ["--dataset=babilong", "--corpus=play.txt", "--tasks=qa1", "--lengths=200",
           "--tokenizer=char", "--max_iters=2"]
ALIGNED = ["--mem_write=aligned", "--mem_slots=8"]
RUNS = {"stories": STORIES, "aligned_stories": [*STORIES, *ALIGNED],
        "wide": [*STORIES, "--block_size=512"], "middle": [*STORIES, "--block_size=64"],
        "text": ["--max_iters=2"],
        "aligned": ["--max_iters=2", *ALIGNED],
        "full": ["--max_iters=2", "--attention=full"],
        "none": ["--max_iters=2", "--memory=none"], "rmt": ["--max_iters=2", "--memory=rmt"]}


@pytest.fixture(scope="module", autouse=True)
def runs(checkout):
    for name, flags in RUNS.items():
        checkout.train(f"out/{name}", *flags)


def look(call, run, *args):
    code, out, err = call("look.py", f"out/{run}", "--device=cpu", *args)
    assert code == 0, err
    return out


def memory_is_read(model):
    """After two steps of training memory is hardly read: make it so."""
    with torch.no_grad():
        for block in model.blocks:
            block.memory.w_v.weight.normal_()
    return model


# --- The program

def test_a_story_gives_an_answer_a_picture_and_a_page(checkout, call):
    out = look(call, "stories", "--task=qa1", "--length=600", "--seed=3")
    assert "Where is " in out and "600 tokens in segments of 8" in out
    assert "What the last token read" in out and "[" in out
    with Image.open(checkout.folder / "out/stories/look.png") as picture:
        assert picture.width == 1800
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20, "the picture is empty"
    assert "data:image/png;base64," in (checkout.folder / "out/stories/look.html").read_text()


def test_the_same_seed_looks_at_the_same_story(call):
    first, again, other = (look(call, "stories", "--length=100", f"--seed={s}") for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("length", ["0k", "64"])
def test_short_stories_are_looked_at(call, length):
    look(call, "stories", f"--length={length}")


@pytest.mark.parametrize("run", ["text", "full", "stories"])
def test_any_run_with_banks_looks_at_any_text(checkout, call, run):
    assert "segments of 8" in look(call, run, f"--start={TEXT[:40]}")
    (checkout.folder / "some.txt").write_text(TEXT[:150])
    assert "segments of 8" in look(call, run, "--text=some.txt", "--out_dir=out/elsewhere")
    assert (checkout.folder / "out/elsewhere/look.html").exists()


def test_a_text_within_the_first_segment_is_refused(call):
    code, _, err = call("look.py", "out/text", "--start=The", "--device=cpu")
    assert is_one_line(code, err, "3 tokens", "longer")


def test_a_text_of_many_lines_has_a_title_of_one(call):
    out = look(call, "text", f"--start={TEXT[:40]}\n\n")
    assert "segments of 8" in out.splitlines()[1]


def test_what_cannot_be_looked_at_leaves_no_folder(checkout, call):
    code, _, err = call("look.py", "out/nowhere")
    assert is_one_line(code, err, "out/nowhere") and not (checkout.folder / "out/nowhere").exists()


def test_aligned_shows_gates_and_reads_and_says_why_no_shares(checkout, call):
    assert "is no sum over segments" in look(call, "aligned", f"--start={TEXT[:40]}")
    text = (checkout.folder / "out/aligned/look.html").read_text()
    assert "is no sum over segments" in text and "base64" in text


def test_many_stories_are_counted(checkout, call):
    out = look(call, "stories", "--length=100", "--n_samples=6")
    assert "| wrong |" in out
    with open(checkout.folder / "out/stories/look.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert 0 < len(rows) <= 6 and {row["source"] for row in rows} <= {"support", "fact", "text"}
    assert all(row["right_answer"] and row["question"] for row in rows)
    assert {row["first_tells"] for row in rows} <= {"0", "1"}


def test_a_second_count_keeps_the_rows_of_the_first(checkout, call):
    def counted(*args):
        look(call, "stories", "--out_dir=out/counts", *args)
        with open(checkout.folder / "out/counts/look.csv", newline="") as f:
            return list(csv.DictReader(f))
    first = counted("--length=100", "--n_samples=4")
    both = counted("--length=120", "--n_samples=4")
    assert both[:len(first)] == first and {row["length"] for row in both} == {"100", "120"}
    assert counted("--length=100", "--n_samples=4") == both[len(first):] + first
    (checkout.folder / "out/counts/look.csv").write_text("not,this\n1,2\n")
    code, _, err = call("look.py", "out/stories", "--out_dir=out/counts", "--n_samples=2")
    assert is_one_line(code, err, "look.csv is damaged or foreign")
    assert (checkout.folder / "out/counts/look.csv").read_text() == "not,this\n1,2\n"


def test_what_is_refused_leaves_no_folder(checkout, call):
    for args in (["stories", "--block=9"], ["text", "--start=The"], ["none", "--start=The play"]):
        code, _, err = call("look.py", f"out/{args[0]}", *args[1:], "--out_dir=out/empty")
        assert is_one_line(code, err) and not (checkout.folder / "out/empty").exists()


def test_a_supporting_fact_is_the_last_that_names_whom_the_question_asks_for(checkout):
    with chdir(checkout.folder):
        run = load_run("out/stories", EvalConfig(["out/stories"]), torch.device("cpu"))
    for seed in range(8):
        ids, marks, question, answer = hidden_story(run, "qa1", "400", seed)
        told = {mark: run.tokenizer.decode(ids[mark.start:mark.end]) for mark in marks}
        person = question.split()[-1].rstrip("?")
        about = [mark for mark, text in told.items() if person in text and mark.kind != "question"]
        assert [mark.kind for mark in about] == ["fact"] * (len(about) - 1) + ["support"]
        assert answer in told[about[-1]] and question in told[marks[-1]]
        assert [mark.kind for mark in marks].count("support") == 1


def test_left_out_is_who_asks_for_a_fact_that_memory_has_not_yet_written(checkout, call):
    look(call, "middle", "--length=640", "--n_samples=20", "--seed=1")  # ten segments of 64
    with open(checkout.folder / "out/middle/look.csv", newline="") as f:
        asked = [int(row["seed"]) for row in csv.DictReader(f)]
    with chdir(checkout.folder):
        run = load_run("out/middle", EvalConfig(["out/middle"]), torch.device("cpu"))
    ends = {seed: max(mark.end for mark in hidden_story(run, "qa1", "640", seed).marks
                      if mark.kind == "support") for seed in range(1, 21)}
    assert asked == [seed for seed in ends if ends[seed] < 9 * 64] and 0 < len(asked) < 20


@pytest.mark.parametrize("args, named", [
    ([], "runs=[]"), (["out/text", "out/full"], "runs="),
    (["out/none", "--start=The"], "memory=none"), (["out/rmt", "--start=The"], "memory=rmt"),
    (["out/nowhere"], "out/nowhere"),
    (["out/text"], "give it --text or --start"), (["out/stories", "--task=qa99"], "qa99"),
    (["out/stories", "--task=qa1,qa2"], "task=qa1,qa2"), (["out/stories", "--length=1M"], "1M"),
    (["out/stories", "--length=much"], "much"), (["out/text", "--text=missing.txt"], "missing.txt"),
    (["out/text", "--text=play.txt", "--start=The"], "exclude each other"),
    (["out/text", "--text=play.txt", "--length=300"], "length=300 are of a story"),
    (["out/stories", "--n_samples=-1"], "n_samples=-1"), (["out/text", "--start=\u00e9"], "\u00e9"),
    (["out/stories", "--n_samples=2", "--start=The"], "exclude each other"),
    (["out/wide", "--n_samples=1", "--length=0k"], "longer one"),
    (["out/stories", "--block=2"], "block=2 has no bank: use 1 to 1"),
    (["out/aligned_stories", "--n_samples=1"], "mem_write=aligned")], ids=str)
def test_bad_input_is_told_in_one_line(call, args, named):
    code, _, err = call("look.py", *args, "--device=cpu")
    assert is_one_line(code, err, named), err


def test_what_is_imported_leaves_a_notebooks_pictures_alone(checkout):
    """A program that picked its own way to draw would take a notebook's away."""
    code, _, err = checkout.run("-c", "import matplotlib, bench, look; matplotlib.use('svg')\n"
                                "import compare, eval_mmlu, train\n"
                                "assert matplotlib.get_backend() == 'svg'")
    assert code == 0, err
    for path in [*REPO.glob("*.py"), *REPO.glob("lib/*.py")]:
        assert "matplotlib.use" not in path.read_text(encoding="utf-8"), path


# --- What is shown

def test_words_are_the_text_whole_characters_only():
    tokenizer = make_tokenizer("bpe", "Où est-il? " * 50, 260)
    ids = tokenizer.encode("Où est-il? Où?")
    assert "".join(words_of(tokenizer, ids)) == "Où est-il? Où?"


def test_sources_name_the_segment_and_the_token_that_was_looked_at():
    words = [f"{i}," for i in range(12)]
    read = LastRead(1.0, 0.1, [0.2, 0.7], [0.05] * 4 + [0.0, 0.0, 0.6, 0.1], None)
    first, second = sources_of(read, words, 4)
    assert (first.segment, first.share) == (1, 0.7) and "[6,]7," in first.text
    assert second.segment == 0


@pytest.mark.parametrize("looked, sentence", [
    ((8, 9), "Mary moved to the[ office]."), ((9, 10), "Mary moved to the office[.]"),
    ((10, 11), "Mary moved to the office.[ No] more!"),
    ((7, 11), "So it is. Mary moved to[ the office. No] more!"),
    ((0, 1), "[So] it is."), ((14, 15), "No more! Ah,[ but] a sentence of..."),
    ((18, 19), "Ah, but a sentence of[ many] words goes on..."),
    ((35, 36), "...nd on and on and on and on and[ on]")])
def test_the_sentence_looked_at_is_named_and_the_one_right_before(looked, sentence):
    text = ("So| it| is|.| Mary| moved| to| the| office|.| No| more|!\nAh|,| but| a| sentence| of"
            "| many| words| goes| on" + 7 * "| and| on")
    assert sentence_of(text.split("|"), *looked) == sentence


def test_a_look_at_the_beginning_of_a_character_names_the_character():
    tokenizer = make_tokenizer("bpe", "abc", 256)
    words = words_of(tokenizer, list("Où est?".encode()))
    assert words[1:3] == ["", "ù"]
    read = LastRead(1.0, 0.0, [1.0], [0.0, 1.0, 0.0, 0.0], None)
    source, = sources_of(read, words, 4)
    assert source.text == "O[ù] est?"


def test_a_segment_that_gave_less_than_nothing_is_named_too():
    read = LastRead(1.0, 1.5, [-0.5], [-0.5, 0.0, 0.0, 0.0], None)
    source, = sources_of(read, list("abcde"), 4)
    assert source.share == -0.5 and "[a]b" in source.text


@pytest.mark.parametrize("looked, kind", [(3, "fact"), (5, "fact"), (6, "support"), (9, "support"),
                                          (11, "support"), (0, "text"), (14, "text")])
def test_a_look_at_or_right_behind_a_sentence_is_a_look_at_it(looked, kind):
    """One fact right behind the other: the second one's first token is looked at for the first."""
    marks = [Mark(2, 5, "fact"), Mark(5, 9, "support")]
    tokens = [1.0 if i == looked else 0.0 for i in range(16)]
    read = LastRead(1.0, 0.0, [0.5, 0.5], tokens, None)
    view = View("", "", ["a"] * 16, marks, 8, {0: read}, "", 0, [], [])
    assert kind_of(view) == kind


@pytest.mark.parametrize("end, tells", [(20, True), (13, True), (12, False)])
def test_the_segment_that_gave_most_has_the_supporting_fact_or_comes_right_behind(end, tells):
    sources = [Source(0.6, 2, ""), Source(0.4, 1, "")]
    marks = [Mark(9, end, "support"), Mark(17, 20, "fact")]
    assert first_tells(View("", "", ["a"] * 24, marks, 8, {}, "", 0, sources, [])) == tells


def test_slots_that_never_change_are_named():
    model = LM2(LM2Config(vocab_size=300, block_size=8, n_layer=1, n_head=2, n_embd=16,
                          mem_slots=4)).eval()
    with torch.no_grad():  # slot 2 is never written, and keeps what it has
        bank = memory_is_read(model).blocks[0].memory
        bank.gates = lambda x, C, *_: (torch.ones_like(C) * keep, torch.ones_like(C))
    keep = torch.tensor([1.0, 1.0, 0.0, 1.0])[:, None]
    tokenizer = make_tokenizer("bpe", TEXT, 300)
    found = trace(model, torch.tensor(tokenizer.encode(TEXT)[:40]))
    assert make_view(model, tokenizer, found, [], "").still == [2]


def test_a_block_that_reads_nothing_is_named():
    model = LM2(LM2Config(vocab_size=300, block_size=8, n_layer=2, n_head=2, n_embd=16,
                          mem_slots=4)).eval()
    memory_is_read(model).blocks[0].memory.w_v.weight.data.zero_()
    tokenizer = make_tokenizer("bpe", TEXT, 300)
    found = trace(model, torch.tensor(tokenizer.encode(TEXT)[:40]))
    assert make_view(model, tokenizer, found, [], "").layer == 1
    with pytest.raises(ValueError, match="block=1 reads nothing: use block=2"):
        make_view(model, tokenizer, found, [], "", block=1)


def test_the_page_and_the_picture_show_the_shares_and_gates(monkeypatch):
    figures = []
    monkeypatch.setattr(trace_figure, "png_of", figures.append)
    torch.manual_seed(0)
    model = memory_is_read(LM2(LM2Config(vocab_size=300, block_size=8, n_layer=2, n_head=2,
                                         n_embd=16, mem_slots=4)).eval())
    tokenizer = make_tokenizer("bpe", TEXT, 300)
    found = trace(model, torch.tensor(tokenizer.encode(TEXT)[:40]))
    view = make_view(model, tokenizer, found, [], "")
    read = view.reads[view.layer]
    trace_figure.draw(model, found, view)
    shares, g_in, _, g_forget, *_ = figures[0].axes
    assert [bar.get_height() for bar in shares.patches] == pytest.approx(
        [100 * share for share in read.segments])
    for axes, name in ((g_in, "g_in"), (g_forget, "g_forget")):
        shown, = axes.get_images()
        for layer, row in enumerate(shown.get_array()):
            weights = view.reads[layer].weights
            gate = (getattr(found.banks[layer], name) * weights).sum((1, 2))
            assert row.tolist() == pytest.approx(gate.tolist())
    most = max(read.tokens)
    assert f'title="{most:.1%}">{escape(view.words[read.tokens.index(most)])}<' in page(view, b"")


@pytest.mark.filterwarnings("error:Glyph")
@pytest.mark.parametrize("is_read", [True, False])
def test_the_picture_of_many_blocks_and_a_long_title_can_be_read(monkeypatch, is_read):
    """As of a pretrained model, which has a bank in each of 30 blocks, and writes at length."""
    figures = []
    monkeypatch.setattr(trace_figure, "png_of",
                        lambda figure: figures.append(figure) or png_of(figure))
    model = LM2(LM2Config(vocab_size=300, block_size=8, n_layer=30, n_head=2, n_embd=16,
                          mem_slots=4)).eval()
    if is_read:
        memory_is_read(model)
    else:
        for block in model.blocks:
            block.memory.w_v.weight.data.zero_()
    tokenizer = make_tokenizer("bpe", TEXT, 300)
    found = trace(model, torch.tensor(tokenizer.encode("\u65e5\u672c " * 9)))
    view = make_view(model, tokenizer, found, [], "what the model says " * 7)
    trace_figure.draw(model, found, view)
    assert bool(view.reads) == is_read and ("before it is trained" in view.why) != is_read
    figure, = figures
    title, = [text for text in figure.texts if text.get_text() == view.title]
    assert title.get_window_extent().x1 < figure.bbox.x1
    for axes in figure.axes:
        labels = [label.get_window_extent() for label in axes.get_yticklabels()
                  if label.get_text().startswith(("block", "0."))]
        assert len(labels) != 1 and not any(
            a.overlaps(b) for a, b in zip(labels, labels[1:])), "labels cover each other"


class Tags(HTMLParser):
    """Checks that tags are closed in order, and collects text."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.names = [], "", set()

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_one_file_without_scripts_and_shows_the_text_as_it_is(checkout, call):
    look(call, "stories", "--length=150", "--seed=5")
    html = (checkout.folder / "out/stories/look.html").read_text()
    tags = Tags()
    tags.feed(html)
    assert not tags.open and not tags.names & {"script", "link", "iframe"}
    assert "http" not in html.split("</style>")[1].replace("base64", "")
    assert "Where is " in tags.text.split("Where the answer comes from")[1]


def test_what_a_text_says_is_not_taken_for_tags():
    tokenizer = make_tokenizer("bpe", TEXT, 300)
    model = memory_is_read(LM2(LM2Config(vocab_size=300, block_size=8, n_layer=1, n_head=2,
                                         n_embd=16, mem_slots=4)).eval())
    ids = torch.tensor(tokenizer.encode("<b>bold & <script>alert(1)</script> " * 3))
    view = make_view(model, tokenizer, trace(model, ids), [Mark(0, 3, "fact")], "<i>")
    tags = Tags()
    tags.feed(page(view, b""))
    assert not tags.names & {"b", "script", "i"} and "<script>alert(1)" in tags.text


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)


@pytest.mark.skipif(not BROWSER, reason="there is no browser")
def test_a_browser_shows_the_page(checkout, call, tmp_path):
    look(call, "stories", "--length=150")
    picture = tmp_path / "shown.png"
    subprocess.run([BROWSER, "--headless", "--no-sandbox", f"--screenshot={picture}",
                    str(checkout.folder / "out/stories/look.html")], check=True, timeout=60)
    with Image.open(picture) as shown:
        assert len(np.unique(np.asarray(shown.convert("L")))) > 20
