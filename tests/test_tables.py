"""
lib/tables.py and lib/experiment_tables.py: tables say what was measured, and pages are filled with
them whole or not at all.
"""
import re

import pytest
from made_up import answered, figure
from test_files import full_disk

from data.mmlu import PROMPTS
from lib import mmlu_table, results, tables
from lib.experiment_tables import brief_table, difference_table, experiment_table, task_table
from lib.measured import COLUMNS, write_results


def cells(table):
    """{first cell: {column: cell}} of a Markdown table; what stands below is left out."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.split("\n")
             if line.startswith("|")]
    header, _, *lines = [[cell.strip() for cell in line] for line in lines]
    assert {len(line) for line in lines} == {len(header)}
    return {line[0]: dict(zip(header, line)) for line in lines}


def rows_of_two():
    """LM2 with two seeds, RMT with one; RMT was not asked at 64k."""
    many = "1" * 96 + "0" * 4
    rows = [answered("LM2", seed, "1" * right + "0" * (100 - right)) for seed, right in
            ((1, 98), (2, 100))]
    rows += [answered("LM2", seed, "1" * 30, length="64k") for seed in (1, 2)]
    return [*rows, answered("RMT", 1, many, parameters="1330304", minutes="9.0", torch="2.12.0")]


# --- Experiments

def test_a_cell_is_mean_worst_and_best_seed_and_half_of_the_interval():
    found = cells(experiment_table(rows_of_two()))
    assert found["LM2"] == {"accuracy in %": "LM2", "parameters": "1,334,400", "minutes": "12",
                            "4k": "99 [98 100] ± 3", "64k": "100 [100 100] ± 8"}
    assert found["RMT"] == {"accuracy in %": "RMT", "parameters": "1,330,304", "minutes": "9.0",
                            "4k": "96 ± 4", "64k": "–"}
    last = found["*questions, each task and seed*"]
    assert list(found)[-1] == last["accuracy in %"] and (last["4k"], last["64k"]) == ("100", "30")


def test_no_interval_is_printed_as_zero():
    rows = [answered("LM2", 1, "1" * 4000)]
    assert cells(experiment_table(rows))["LM2"]["4k"] == "100 ± 0.1"


def test_the_caption_names_seeds_machine_and_commits():
    assert experiment_table(rows_of_two()).endswith(
        "|\n\n*Mean [worst and best seed] ± half of the 95% interval of the questions. "
        "Seeds 1, 2; of RMT 1; cpu; float32; torch 2.13.0 and 2.12.0; commit 0123456.*")
    losses = experiment_table([figure("LM2", 1, "1.5", device="")])
    assert losses.endswith("\n\n*Seed 1; float32; torch 2.13.0; commit 0123456.*")


def test_other_measures_have_columns_of_mean_and_each_seed():
    rows = [figure("LM2", 1, "1.5481234"), figure("LM2", 2, "1.529"),
            figure("LM2", 1, "2.61", "minutes until val_loss 1.88"),
            figure("LM2", 2, "", "minutes until val_loss 1.88"), figure("window", 1, "1.55")]
    found = cells(experiment_table(rows))
    assert found["LM2"]["val_loss"] == "1.539 (1.548, 1.529)"
    assert found["LM2"]["minutes until val_loss 1.88"] == "– (2.61, –)"
    assert found["window"]["val_loss"] == "1.55" and len(found) == 2
    assert found["window"]["minutes until val_loss 1.88"] == "–"


def test_differences_are_bold_where_their_interval_excludes_zero():
    base = answered("LM2", 1, "1" * 90 + "0" * 10)
    rows = [base, answered("far", 1, "1" * 69 + "0" * 31), answered("near", 1, "1" * 88 + "0" * 12),
            answered("above", 1, "1" * 100), answered("same", 1, base["answers"]),
            answered("elsewhere", 1, "1", length="64k")]
    found = cells(difference_table(rows))
    assert {name: line["4k"] for name, line in found.items()} == {
        "far": "**-21 ± 8**", "near": "-2 ± 3", "above": "**+10 ± 6**", "same": "0 ± 2",
        "elsewhere": "–"}
    assert list(found["far"]) == ["minus LM2, in points", "4k", "64k"]


def test_differences_of_losses_need_two_seeds_for_an_interval():
    rows = [figure(name, seed, f"{value + seed / 100:.3f}") for name, value in
            (("LM2", 1.5), ("worse", 1.55), ("once", 1.4)) for seed in (1, 2, 3)]
    found = cells(difference_table(rows[:-2]))
    assert {name: line["val_loss"] for name, line in found.items()} == {
        "worse": "**+0.050 ± 0.000**", "once": "-0.100"}
    assert "minus LM2" in found["once"]


def test_brief_has_means_alone_at_the_lengths_that_are_named():
    assert brief_table(rows_of_two(), ["64k", "4k"]) == (
        "| accuracy in % | 64k | 4k |\n| --- | ---: | ---: |\n"
        "| LM2 | 100 | 99 |\n| RMT | – | 96 |")


def test_tasks_have_columns_and_means_of_their_own():
    rows = [answered("LM2", seed, "1" * (i + seed) + "0" * (10 - i - seed), task=f"qa{i}")
            for seed in (1, 3) for i in range(1, 7)]
    rows += [answered("RMT", 1, "10", task="qa2"), answered("RMT", 1, "10", length="0k")]
    found = task_table(rows, ["4k"]).split("\n")
    assert found[0].endswith("| length | qa1 | qa2 | qa3 | qa4 | qa5 | qa6 | qa1-qa5 | all |")
    assert found[2:] == ["| LM2 | 4k | 30 | 40 | 50 | 60 | 70 | 80 | 50 | 55 |",
                         "| RMT | 4k | – | 50 | – | – | – | – | – | – |"]
    assert task_table(rows).count("\n") == 4
    assert "all" not in task_table(rows_of_two())


def test_runs_of_other_code_stand_apart_and_are_never_averaged():
    rows = [answered("LM2", 1, "0000", run="old"), answered("LM2", 2, "1111", run="new"),
            answered("RMT", 2, "1100")]
    current = {"LM2": "new"}
    found = cells(experiment_table(rows, current))
    assert [line["4k"][:3] for line in found.values()] == ["0 ±", "100", "50 ", "4"]
    assert list(found)[:3] == ["LM2 (as of 0123456)", "LM2", "RMT"]
    assert "minus LM2, in points" in difference_table(rows, current)
    assert list(cells(difference_table(rows, current))) == ["LM2 (as of 0123456)", "RMT"]
    found = cells(experiment_table(rows, {"LM2": "newest", "RMT": "aaaaaaaa"}))
    assert list(found)[:3] == ["LM2 (as of 0123456, run old)", "LM2 (as of 0123456, run new)",
                               "RMT"]


def test_a_mean_over_fewer_tasks_says_so():
    rows = [answered("LM2", 1, "11"), answered("LM2", 1, "00", task="qa2"),
            answered("RMT", 1, "11")]
    found = cells(experiment_table(rows))
    assert found["RMT"]["4k"].endswith(" (1 of 2 tasks)") and "tasks" not in found["LM2"]["4k"]
    assert "| RMT | 100 (1 of 2 tasks) |" in brief_table(rows, ["4k"])


def test_a_bar_in_a_name_does_not_tear_the_table():
    assert list(cells(experiment_table([answered("a | b", 1, "1")])))[0] == r"a \| b"


# --- Markers

@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with an experiment in results/, and two pages."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    write_results(tmp_path / "results" / "small.csv", rows_of_two())
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(page("small"))
    (tmp_path / "docs" / "page.md").write_text(page("small difference"))
    return tmp_path


def page(name, table="old"):
    return f"# A page\n<!-- table: {name} -->\n{table}\n<!-- end -->\nText.\n"


@pytest.mark.parametrize("name, table", [
    ("small", experiment_table(rows_of_two())),
    ("small difference", difference_table(rows_of_two())),
    ("small tasks", task_table(rows_of_two())),
    ("small tasks 4k", task_table(rows_of_two(), ["4k"])),
    ("small brief 64k,4k", brief_table(rows_of_two(), ["64k", "4k"]))])
def test_each_experiment_has_its_tables(checkout, name, table):
    assert tables.rendered(page(name)) == page(name, table)


@pytest.mark.parametrize("text, message", [
    (page("nothing"), "there is no table nothing: use small, first-run, "),
    (page("small brief 3k"), "results/small.csv: nothing was asked at length 3k: use 4k, 64k"),
    (page("small brief"), "there is no table small brief: use small, small difference, "),
    (page("small difference 4k"), "there is no table small difference 4k: use small, "),
    (page("small sum"), "there is no table small sum: use small, "),
    ("<!-- table: small -->\n", "the table small is not closed by a line <!-- end -->"),
    ("<!-- table: small -->\n" + page("small"), "the table small is not closed by"),
    ("<!-- end -->\n", "a line <!-- end --> closes no table")])
def test_a_marker_that_is_wrong_is_named_in_one_line(checkout, text, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}[^\n]*$"):
        tables.rendered(text)


@pytest.mark.parametrize("content, message", [
    (",".join(COLUMNS) + "\n", "nothing was measured yet"),
    (",".join(COLUMNS[:-1]) + "\n", "other columns"),
    (",".join(COLUMNS) + "\nmade_up,LM2,1\n", "is damaged")])
def test_a_file_of_an_experiment_that_says_nothing_is_named(checkout, content, message):
    (checkout / "results" / "small.csv").write_text(content)
    with pytest.raises(ValueError, match=rf"^[^\n]*small\.csv[^\n]*{message}[^\n]*$"):
        tables.rendered(page("small"))


def test_means_of_tasks_are_of_one_length(checkout):
    path = checkout / "results" / "ten.csv"
    write_results(path, [answered("LM2", 1, "0111"), answered("LM2", 1, "0101", task="qa2"),
                         answered("LM2", 1, "1111", length="0k")])
    assert tables.task_means("ten", "4k") == {"LM2": {"qa1": 75, "qa2": 50}}


@pytest.mark.parametrize("changes", [{}, {"shots": 0}, {"cloze": True}, {"source": "x"}], ids=str)
def test_mmlu_has_a_table_for_each_kind_of_questions(checkout, changes):
    row = {"run": "a", "checkpoint_sha256": "1f", "dtype": "float32", "source": PROMPTS,
           "subject": "anatomy", "questions_sha256": "2e", "shots": 5, "cloze": False, "n": 4,
           "right": 3, "answers": "1101", "commit": "3d", "torch": "2.13.0", "device": "cpu"}
    rows = [row, row | {"run": "b"}, row | changes | {"run": "c"}]
    for each in rows:
        results.add(checkout / "results/mmlu.csv", each, mmlu_table.COLUMNS)
    made = tables.rendered(page("mmlu"))
    assert made.count("| accuracy in % |") == (2 if changes else 1)
    assert [*cells(made.split("\n\n4 questions of ")[0])] == [*("ab" if changes else "abc")]


# --- Pages

def test_fill_puts_tables_into_all_pages_and_says_which_changed(checkout):
    (checkout / "docs" / "other.md").write_text("# No table\n")
    assert [str(path) for path in tables.fill(checkout)] == ["README.md", "docs/page.md"]
    assert (checkout / "README.md").read_text() == page("small", experiment_table(rows_of_two()))
    assert "minus LM2" in (checkout / "docs" / "page.md").read_text()
    assert tables.fill(checkout) == []


def test_no_page_is_touched_where_one_marker_is_wrong(checkout):
    (checkout / "docs" / "page.md").write_text(page("nothing"))
    with pytest.raises(ValueError, match=r"^docs/page\.md: there is no table nothing: [^\n]+$"):
        tables.fill(checkout)
    assert (checkout / "README.md").read_text() == page("small")


@pytest.mark.parametrize("large", ["README.md", "docs/page.md"])
def test_no_page_is_touched_where_the_disk_is_full(checkout, large):
    (checkout / large).write_text(page("small") + "long\n" * 1000)
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    with full_disk(2000), pytest.raises(OSError, match=f"{large} cannot be written: "):
        tables.fill(checkout)
    assert {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()} == before
