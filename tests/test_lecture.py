"""
The lecture keeps its promises: the cells of docs/lecture.ipynb run, what they assert would notice a
broken model, and its outputs are committed.

The notebook is read as JSON, so that no Jupyter is needed. Its cells run with few updates and short
texts: what they assert holds for a model that has learned nothing, too.
"""
import json
import re
import sys
from contextlib import chdir, redirect_stdout
from io import StringIO
from unittest.mock import patch

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from conftest import REPO

import lm2

PATH = REPO / "docs" / "lecture.ipynb"
NOTEBOOK = json.loads(PATH.read_text(encoding="utf-8"))
CELLS = NOTEBOOK["cells"]
SECTIONS = ["Attention forgets", "A bank by hand", "The same in lm2.py", "Train, and watch",
            "Look inside", "Change a gate", "What it costs", "Time dilation"]
FEWER = {"UPDATES": 4, "FAR": 100}
SLIDE = 26          # lines of a code cell, at most
COLUMNS = 100
MAX_BYTES = 600_000


def source_of(cell):
    return "".join(cell["source"])


def of_type(cell_type):
    return [cell for cell in CELLS if cell["cell_type"] == cell_type]


CODE, TEXT = of_type("code"), "\n\n".join(map(source_of, of_type("markdown")))
each_code_cell = pytest.mark.parametrize("cell", CODE, ids=lambda cell: cell["id"])


def code_by_section():
    """{heading: the code cells below it}; those before the first heading belong to ""."""
    found, heading = {"": []}, ""
    for cell in CELLS:
        if cell["cell_type"] == "code":
            found[heading].append(cell)
        for heading in re.findall(r"^## \d+\. (.+)$", source_of(cell), re.M):
            found[heading] = []
    return found


# --- To run cells

class Lecture:
    """Runs cells in one namespace, and notes what each of them gave: it printed, it drew."""

    def __init__(self):
        self.namespace, self.gave = {"__name__": "__main__"}, {}

    def run(self, cells):
        for cell in cells:
            source, gave, printed = source_of(cell), set(), StringIO()
            for name, value in FEWER.items():
                source = re.sub(rf"^{name} = \d+", f"{name} = {value}", source, flags=re.M)
            code = compile(source, f"docs/lecture.ipynb, {cell['id']}", "exec")
            with patch.object(plt, "show", lambda: gave.add("drew")), redirect_stdout(printed):
                exec(code, self.namespace)
            plt.close("all")
            self.gave[cell["id"]] = gave | ({"printed"} if printed.getvalue() else set())


@pytest.fixture
def lecture():
    """What the cells change for their whole process is put back."""
    matplotlib.use("Agg")
    path, threads = sys.path.copy(), torch.get_num_threads()
    with chdir(PATH.parent), matplotlib.rc_context(), torch.random.fork_rng():
        yield Lecture()
    sys.path[:] = path
    torch.set_num_threads(threads)


def committed(cell):
    """What the outputs of a cell say that it gave."""
    gave = set()
    for output in cell["outputs"]:
        gave |= {"printed"} if output["output_type"] == "stream" else set()
        gave |= {"drew"} if "image/png" in output.get("data", {}) else set()
    return gave


# --- The cells run

def test_all_cells_run_and_what_they_print_and_draw_is_committed(lecture):
    lecture.run(CODE)
    assert lecture.gave == {cell["id"]: committed(cell) for cell in CODE}
    assert lecture.namespace["FAR"] == FEWER["FAR"]
    assert len(lecture.namespace["losses"]) == FEWER["UPDATES"], "this test is to take seconds"
    small = lecture.namespace["make_model"](mem_slots=1)  # as What to try has it
    assert small.config.mem_slots == 1 and small.config.n_layer == 2


def attention_without_a_window(q, k, v, *_):
    return lm2.attend(q, k, v, causal=True)


def update_that_forgets(bank, M, C, g_in, g_forget):
    return g_in * C.tanh()


def open_output_gate(bank, E_mem):
    return torch.ones_like(E_mem)


def forward_without_a_state(bank, h, keys, values, state, *where,
                            forward=lm2.MemoryBank.forward):
    return forward(bank, h, keys, values, state, *where)[0], state


@pytest.mark.parametrize("section, name, broken", [
    ("Attention forgets", "lm2.window_attention", attention_without_a_window),
    ("The same in lm2.py", "lm2.MemoryBank.update", update_that_forgets),
    ("The same in lm2.py", "lm2.MemoryBank.output_gate", open_output_gate),
    ("What it costs", "lm2.MemoryBank.forward", forward_without_a_state),
])
def test_a_broken_model_is_noticed(lecture, section, name, broken):
    code = code_by_section()
    start = code["Attention forgets"][:2]  # the task and the model, without a training
    cells = start if section == "Attention forgets" else code[section]
    lecture.run(code[""] + start + code["A bank by hand"])
    torch.manual_seed(0)
    model = lecture.namespace["make_model"]()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    lecture.namespace |= {"model": model, "window": model}
    lecture.run(cells)
    with patch(name, broken), pytest.raises(AssertionError):
        lecture.run(cells)


def test_a_wrong_series_of_writes_is_noticed(lecture):
    code = code_by_section()
    closed_form = code["Time dilation"][0]
    lecture.run(code[""] + code["Attention forgets"][:1] + code["A bank by hand"] + [closed_form])
    right = source_of(closed_form)
    wrong = right.replace("(1 - kept)", "R")
    assert wrong != right
    with pytest.raises(AssertionError):
        lecture.run([closed_form | {"source": [wrong]}])


# --- What is committed

def test_the_eight_sections_take_45_minutes():
    numbered = [f"{i}. {title}" for i, title in enumerate(SECTIONS, 1)]
    assert re.findall(r"^## (.+)$", TEXT, re.M) == numbered
    rows = re.findall(r"^\| (\d) \| (.+) \| (\d+) \|$", TEXT, re.M)
    assert [f"{number}. {title}" for number, title, _ in rows] == numbered
    assert sum(int(minutes) for *_, minutes in rows) == 45
    assert all(code_by_section().values()), "each section has something to run"


def test_each_section_asks_the_audience():
    for section in TEXT.split("\n## ")[1:]:
        assert "**Ask:**" in section, section.splitlines()[0]


def test_the_notebook_is_valid_and_small():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in CELLS]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids)
    for cell in CELLS:
        assert {"cell_type", "id", "metadata", "source"} <= set(cell)
        assert ("outputs" in cell) == ("execution_count" in cell) == (cell["cell_type"] == "code")
    assert PATH.stat().st_size < MAX_BYTES


@each_code_cell
def test_a_code_cell_fits_on_a_slide(cell):
    lines = source_of(cell).splitlines()
    assert len(lines) <= SLIDE and max(map(len, lines)) <= COLUMNS


def printed(cell):
    return "".join("".join(output["text"]) for output in cell["outputs"] if "text" in output)


@each_code_cell
def test_outputs_are_those_of_a_run_that_went_well(cell):
    assert cell["execution_count"] is None
    for output in cell["outputs"]:
        assert output["output_type"] in ("stream", "display_data")
        assert output.get("name", "stdout") == "stdout"
    for noise in ("Traceback", "Warning", "Error", "nan", "/tmp", "/home", "/root", "/Users"):
        assert noise not in printed(cell)


def test_every_percentage_in_the_text_was_printed():
    found, told = "".join(map(printed, CODE)), re.findall(r"(?<![\d.])\d+%", TEXT)
    assert told
    for figure in told:
        assert re.search(rf"(?<!\d){figure}", found), f"no cell printed {figure}"


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert links
    for link in links:
        assert (PATH.parent / link.partition("#")[0]).exists(), link
    for name in re.findall(r"`(\w+/\w+\.py)`", TEXT):
        assert (REPO / name).exists(), name
