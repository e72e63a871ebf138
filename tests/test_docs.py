"""
README.md and docs/*.md keep their promises: their commands can be called as printed, links lead
somewhere, tables are those of results/, and the recipe for another architecture works.
"""
import argparse
import ast
import importlib
import re
import shlex
import sys
from contextlib import chdir
from typing import NamedTuple

import pytest
from conftest import REPO, Checkout
from torch.distributed.run import get_args_parser

import data.babi
from lib import experiment, tables
from lib.config import load_preset, parse

PAGES = {path.relative_to(REPO).as_posix(): path.read_text(encoding="utf-8")
         for path in [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]}
README = PAGES["README.md"]
CONFIGS = {"train.py": "TrainConfig", "sample.py": "SampleConfig", "bench.py": "BenchConfig",
           "eval_babilong.py": "EvalConfig", "compare.py": "CompareConfig",
           "pretrained.py": "PretrainedConfig", "eval_mmlu.py": "MMLUConfig",
           "look.py": "LookConfig", "docs.assignment": "AssignmentConfig",
           "docs.grade": "GradeConfig", "docs.figures": "FiguresConfig"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
each_page = pytest.mark.parametrize("page", PAGES)


def section(text, heading):
    """What stands between a heading and the next one."""
    assert text.count(f"\n## {heading}\n") == 1, f"there is no section {heading}"
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


# --- Commands

class Command(NamedTuple):
    page: str
    text: str


def parts_of(line):
    """
    The commands in a line of a shell, lists of words: `for s in 1 2; do python a.py; done` has
    three. $s becomes 1, a comment is dropped.
    """
    lexer = shlex.shlex(re.sub(r"\$\w+", "1", line), posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    found = [[]]
    for word in lexer:
        if set(word) <= set(";&|"):
            found.append([])
        else:
            found[-1].append(word)
    return [words[1:] if words[0] == "do" else words for words in found if words]


def commands(page, text):
    """What a page tells its reader to call: lines of ``` blocks, and `code` in its text."""
    lines = []
    for language, block in FENCE.findall(text):
        if not language:
            lines += block.replace("\\\n", " ").split("\n")
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCE.sub("", text))
    called = re.compile(r"(\w+=\S+ )?(python|torchrun|pip|for \w+ in) ")
    return [Command(page, line) for line in lines + spans if called.match(line)]


COMMANDS = [command for page, text in PAGES.items() for command in commands(page, text)]


def check_flags(program, args):
    """Parse the arguments of one of CONFIGS. Raises SystemExit where they are wrong."""
    config = getattr(importlib.import_module(program.removesuffix(".py")), CONFIGS[program])
    try:
        with chdir(REPO):  # presets and experiments are named from there
            parsed, _ = parse(config, "", args)
            for path in getattr(parsed, "experiments", []):
                if path.startswith("experiments/"):  # others are the reader's own
                    experiment.load(path)
    except SystemExit as e:
        if e.code or "--help" not in args:
            raise


def check_torchrun(args):
    parsed = get_args_parser().parse_args(args)
    check_flags(parsed.training_script, parsed.training_script_args)


def check_story(args, monkeypatch):
    """Print a story: that is as cheap as parsing."""
    monkeypatch.setattr(sys, "argv", ["data/babi.py", *args])
    data.babi.main()


def check_pytest(args):
    """The files are there, and each word behind -k is in the name or a case of their tests."""
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*")
    parser.add_argument("-k", default="")
    parsed = parser.parse_args(args)
    files = [REPO / name for name in parsed.files] or list((REPO / "tests").glob("test_*.py"))
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    for word in set(re.findall(r"\w+", parsed.k)) - {"and", "or", "not"}:
        assert word in source, f"no test has {word}"


def check(words, monkeypatch):
    """Whether a command could be called, without calling it: it raises where not."""
    if "=" in words[0]:  # OMP_NUM_THREADS=1 python ...
        words = words[1:]
    program, args = words[0], words[1:]
    if program == "torchrun":
        check_torchrun(args)
    elif words[:3] == ["python", "-m", "data.babi"]:
        check_story(words[3:], monkeypatch)
    elif words[:3] == ["python", "-m", "pytest"]:
        check_pytest(words[3:])
    elif program == "python":
        args = args[1:] if args[0] == "-m" else args
        assert args[0] in CONFIGS, f"{args[0]} is no program"
        check_flags(args[0], args[1:])
    elif program == "pip":
        assert args[:2] == ["install", "-r"] and (REPO / args[2]).exists()
    else:
        assert program in ("for", "done"), f"{program} is not known here"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.page}: {c.text}")
def test_every_command_can_be_called_as_printed(command, monkeypatch):
    for words in parts_of(command.text):
        check(words, monkeypatch)


def test_commands_are_found_wherever_they_stand():
    programs = {word for _, text in COMMANDS for words in parts_of(text) for word in words}
    assert programs >= {*CONFIGS, "torchrun", "data.babi", "pytest"}
    # a line that calls a program, and is not among them, would be printed and never checked
    for page, text in PAGES.items():
        texts = {command.text for command in commands(page, text)}
        for line in re.findall(r"^ *(?:\w+=\S+ )?(?:python|torchrun) .+", text, re.M):
            assert line in texts or line.endswith("\\"), line


@pytest.mark.parametrize("line, wrong", [
    ("python train.py --dataset=shakespeare --n_layers=3", "n_layers"),
    ("python train.py --max_iters=many", "max_iters=many"),
    ("python train.py --config=config/none.toml", "config/none.toml"),
    ("torchrun --nproc_per_node=2 train.py --batchsize=3", "batchsize"),
    ("for s in 1 2; do python sample.py --seeds=$s; done", "seeds"),
    ("OMP_NUM_THREADS=1 python eval_babilong.py --tasks=qa1", "runs is empty"),
    ("python bench.py && python bench.py --parts=nothing", "part nothing"),
    ("python -m data.babi --task=qa99", "qa99"),
    ("python walk.py", "walk.py"), ("python compare.py --wrote", "wrote"),
    ("python compare.py experiments/none.toml", "experiments/none.toml"),
    ("python -m pytest tests/test_none.py", "test_none.py"),
    ("python -m pytest tests/test_house.py -k nosuchtest", "nosuchtest"),
    ("pip install -r none.txt", "")])
def test_a_command_that_cannot_be_called_is_noticed(line, wrong, monkeypatch, capsys):
    assert [text for _, text in commands("page", f"```\n{line}\n```\n")] == [line]
    assert [text for _, text in commands("page", f"Call `{line}` now.")] == [line]
    with pytest.raises((SystemExit, AssertionError, OSError)) as e:
        for words in parts_of(line):
            check(words, monkeypatch)
    assert wrong in str(e.value) + capsys.readouterr().err


def test_every_flag_that_is_named_is_a_flag_of_a_program():
    known = {f"--{option}" for option in ("help", "config", "task")}
    for program, name in CONFIGS.items():
        config = getattr(importlib.import_module(program.removesuffix(".py")), name)
        known |= {f"--{field}" for field in config.__dataclass_fields__}
    torchrun = {option.replace("-", "_") for action in get_args_parser()._actions
                for option in action.option_strings}
    known |= {"--" + option.lstrip("_") for option in torchrun}
    for page, text in PAGES.items():
        named = set(re.findall(r"(?<![\w-])--[a-z]\w+", re.sub(r"\]\([^)]*\)", "", text)))
        assert named <= known, f"{page}: {named - known}"


@pytest.mark.parametrize("preset", sorted((REPO / "config").glob("*.toml")), ids=lambda p: p.name)
def test_every_preset_loads_and_has_a_folder_of_its_own(preset):
    check_flags("train.py", [f"--config={preset}"])
    folders = [load_preset(path)["out_dir"] for path in (REPO / "config").glob("*.toml")]
    assert folders.count(load_preset(preset)["out_dir"]) == 1


# --- Links

def slug(heading):
    """The anchor that GitHub gives a heading."""
    heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)  # of a link its text
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(text):
    """All anchors of a page; the second of the same name ends with -1."""
    found = []
    for heading in re.findall(r"^#+ (.+?)\s*$", FENCE.sub("", text), re.M):
        name = slug(heading)
        seen = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", other) is not None for other in found)
        found.append(f"{name}-{seen}" if name in found else name)
    return found


def dead_links(page, text):
    """The links of a page that lead nowhere. Those to other sites are not followed."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        if path.startswith("../../actions/workflows/"):  # GitHub's page of a workflow
            path = path.replace("../../actions", ".github").removesuffix("/badge.svg")
        if not path:
            found = anchor in anchors(text)
        else:
            target = ((REPO / page).parent / path).resolve()
            found = target.exists() and target.is_relative_to(REPO.resolve())
            if found and anchor:
                found = anchor in anchors(target.read_text(encoding="utf-8"))
        if not found:
            dead.append(link)
    return dead


@each_page
def test_every_link_leads_somewhere(page):
    assert not dead_links(page, PAGES[page])


def test_dead_links_are_noticed():
    alive = "[a](#two-words-a-b) [b](course.md) [c](../lm2.py) [d](results.md#shakespeare)"
    dead = ["#two-words", "none.md", "results.md#none", "../..", "../../actions/workflows/no.yml"]
    text = f"# Two `words`: a-b\n{alive}\n" + "\n".join(f"![x]({link})" for link in dead)
    assert dead_links("docs/page.md", text) == dead
    assert anchors("# A b\n## A b\n```\n# no\n```\n### `--c_d`, e\n") == ["a-b", "a-b-1", "--c_d-e"]


def test_every_page_of_docs_is_linked_from_readme_or_another_page():
    links = {(REPO / page).parent.joinpath(link.partition("#")[0]).resolve()
             for page, text in PAGES.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)}
    assert {REPO.resolve() / page for page in PAGES if page != "README.md"} <= links


# --- Tables

def crooked_rows(text):
    """The rows of Markdown tables that have more or fewer cells than their table's first."""
    crooked, width = [], 0
    for line in FENCE.sub("", text).split("\n"):
        cells = len(re.findall(r"(?<!\\)\|", line)) - 1 if line.startswith("|") else 0
        if cells and width and cells != width:
            crooked.append(line)
        width = cells and (width or cells)
    return crooked


@each_page
def test_every_row_of_a_table_has_as_many_cells_as_its_head(page):
    text = FENCE.sub("", PAGES[page])
    assert ("\n|" in text) == (page != "docs/instructors.md"), "a table more or less than thought"
    assert not crooked_rows(text)


def test_crooked_rows_are_noticed():
    table = "| a | b |\n| - | - |\n| 1 | 2 | 3 |\n\n| c |\n| - |\n"
    assert crooked_rows(table) == ["| 1 | 2 | 3 |"]


@each_page
def test_tables_are_those_of_results(page):
    assert tables.rendered(PAGES[page]) == PAGES[page], "call python compare.py --write"


def test_the_pages_with_results_have_their_tables():
    marked = {page: re.findall(r"^<!-- table: (\S+).* -->$", text, re.M)
              for page, text in PAGES.items()}
    assert {"first-run", "qa1"} <= set(marked["README.md"])
    assert min(len(marked[f"docs/{name}.md"]) for name in ("results", "speed", "paper")) >= 2


# --- README: the equations and their lines

def methods_of(class_name):
    """{name: its code, without the docstring} of a class in lm2.py"""
    source = (REPO / "lm2.py").read_text(encoding="utf-8")
    found, = [node for node in ast.parse(source).body if getattr(node, "name", "") == class_name]
    lines = source.splitlines()
    return {node.name: "\n".join(lines[node.body[0].end_lineno if ast.get_docstring(node)
                                       else node.lineno:node.end_lineno])
            for node in found.body if isinstance(node, ast.FunctionDef)}


def test_each_equation_stands_beside_its_line_of_the_model():
    lines = section(README, "The equations and their lines").split("\n")
    rows = [line for line in lines if line.startswith("|")]
    cells = [re.fullmatch(r"\|(.*)\|(.+)\| `(\w+)` \| `([^`]+)` \|", row) for row in rows[2:]]
    assert None not in cells, "a row is not | equation | formula | `method` | `line` |"
    equations = [cell[1].strip() for cell in cells]
    assert [f"Eq. {n}" for n in range(1, 7)] == sorted(set(equations) - {""})
    methods = methods_of("MemoryBank")
    for cell in cells:
        assert cell[4] in methods[cell[3]], f"{cell[3]} has no line {cell[4]}"


# --- README: change the architecture

def apply_diff(diff, path):
    """Replace the old lines of a diff without line numbers by the new ones."""
    lines = [(line[:1], line[1:]) for line in diff.splitlines(keepends=True)]
    assert {sign for sign, _ in lines} <= {" ", "-", "+"}, "a line begins with ' ', '-' or '+'"
    old = "".join(line for sign, line in lines if sign != "+")
    new = "".join(line for sign, line in lines if sign != "-")
    source = path.read_text(encoding="utf-8")
    assert source.count(old) == 1 and old != new, f"{path.name} has not exactly once:\n{old}"
    path.write_text(source.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the sources with the model of README's recipe, and the diff of its reference."""
    blocks = FENCE.findall(section(README, "Change the architecture"))
    model, reference = [block for language, block in blocks if language == "diff"]
    copied = Checkout(tmp_path_factory.mktemp("changed"))
    apply_diff(model, copied.folder / "lm2.py")
    return copied, reference


def run_pytest(copied, *args):
    code, out, err = copied.run("-m", "pytest", "-q", "-n0", "--tb=line", "-p",
                                "no:cacheprovider", *args)
    assert " passed" in out or " failed" in out, out + err
    return code, out


def test_the_recipe_for_another_architecture_works_as_printed(changed):
    copied, reference = changed
    code, out = run_pytest(copied, "tests/test_memory.py", "-k", "numpy")
    assert code == 1 and "failed" in out, "the reference does not notice the change"
    apply_diff(reference, copied.folder / "tests/test_memory.py")
    code, out = run_pytest(copied, "tests/test_memory.py", "tests/test_lm2.py",
                           "-k", "numpy or later_token or random_chunks")
    assert code == 0, out
    assert section(README, "Change the architecture").count(
        "`python -m pytest tests/test_memory.py tests/test_lm2.py`") == 1


def test_the_experiment_of_the_recipe_compares_what_the_recipe_changes(changed, tmp_path):
    copied, _ = changed
    (_, text), = [block for block in FENCE.findall(section(README, "Change the architecture"))
                  if block[0] == "toml"]
    (tmp_path / "my.toml").write_text(text)
    mine = experiment.load(tmp_path / "my.toml")
    base, row = mine.row
    theirs = experiment.changed_files(row)["lm2.py"]
    assert experiment.meaning(theirs) == experiment.meaning((copied.folder / "lm2.py").read_text())
    assert mine.name == "my" and mine.cells(base) == mine.cells(row)


# --- docs/running.md: from Python

def test_the_lines_from_python_run_as_printed(checkout, capsys):
    text = section(PAGES["docs/running.md"], "From Python")
    (language, block), = FENCE.findall(text)
    assert language == "python" and "checkpoint.load(\"out/shakespeare\"" in block
    (checkout.folder / "romeo.txt").write_text("ROMEO:\nBut soft, what light?\n\n" * 99)
    checkout.train("out/shakespeare", "--dataset=romeo.txt", "--max_iters=1")
    with chdir(checkout.folder):
        exec(block, {})
    out = capsys.readouterr().out
    assert out.startswith("ROMEO:") and "206 torch.Size([1, 4, 16])" in out


def test_what_may_change_on_resume_is_what_running_says():
    text = section(PAGES["docs/running.md"], "Stop and resume")
    named = text.split("these may change:")[1].split(".")[0]
    run = importlib.import_module("lib.run")
    assert set(re.findall(r"`(\w+)`", named)) == run.RESUMABLE - {"out_dir", "resume", "overwrite"}


def test_running_stays_a_page_that_is_read():
    assert len(PAGES["docs/running.md"].encode()) <= 8192
