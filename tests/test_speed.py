"""lib/speed.py: what the figures of bench.py are, and the table and sentences that they make."""

import pytest
from matplotlib.figure import Figure

from lib.speed import Row, conclusion, print_rows, take_turns, write_plot


def rows(part, what, **rates):
    """Rows of one comparison, {model: tokens a second}; the first is what ratios are to."""
    first = next(iter(rates.values()))
    return [Row(part, what, name.replace("_", " "), rate, rate, rate, rate / first)
            for name, rate in rates.items()]


def test_a_figure_is_the_median_without_the_warm_up_and_its_ratio_to_the_first_rival():
    figures = iter((9, 9, 1, 4, 3, 6, 2, 5))  # in turns, the first of each is the warm-up
    jobs = {"a": lambda: next(figures), "b": lambda: next(figures)}
    a, b = take_turns("part", "what", jobs, repeats=3).values()
    assert (a.model, a.tokens_per_s, a.ratio) == ("a", 2, 1.0)
    assert (b.model, b.tokens_per_s, b.ratio) == ("b", 5, 2.5)
    assert (b.quartile1, b.quartile3) == (4.5, 5.5)


# --- In the terminal

def test_a_table_is_sorted_and_tells_what_was_measured_and_nothing_else(capsys):
    slow, fast = rows("training", "training, 4 x 128", slow=1234.0, fast=2468.0)
    full = fast._replace(quartile1=2400.0, peak_memory_mib=5.2, mfu_percent=31.7,
                         first_token_ms=7.0, dtype="float32")
    print_rows([slow._replace(dtype="float32"), full], with_head=True)
    print_rows([slow], with_head=False)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "| training float32 | rival | tokens a second | quartiles | slow = 1 | memory and more |",
        "| --- | --- | ---: | ---: | ---: | --- |",
        "| 4 x 128 | fast | 2,468 | 2,400 to 2,468 | 2.00 "
        "| 5 MiB, 32 % MFU, 7 ms to the first token |",
        "| 4 x 128 | slow | 1,234 | – | 1.00 |  |",
        "| 4 x 128 | slow | 1,234 | – | 1.00 |"]


def test_what_training_says_of_ours_and_of_those_of_others():
    found = rows("training", "small", window=100, full_attention=80, LM2_attend=75, nanoGPT=50)
    found += rows("training", "large", window=10, full_attention=9, LM2_attend=8)
    assert conclusion(found, "training") == (
        "Speed of LM2 attend: 0.75 to 0.80 times window. "
        "Speed of full attention: 1.60 times nanoGPT.")
    for what in ("small", "large"):
        found += rows("training", what, full_attention_as_a_Llama=100)
    assert conclusion(found, "training").endswith(
        " Speed of full attention as a Llama: 1.25 to 11.11 times full attention; "
        "2.00 times nanoGPT.")


def test_what_generation_says():
    found = rows("generation", "small", LM2_attend=100, nanoGPT=50)
    found.append(found[0]._replace(model="window, recomputed", tokens_per_s=80))
    assert conclusion(found, "generation") == (
        "Speed of LM2 attend: 2.00 times nanoGPT; 1.25 times window, recomputed.")


def test_what_reading_says_of_length():
    found = rows("reading", "reading 1", window=100, full_attention=100, LM2_attend=50)
    assert conclusion(found, "reading") == "Speed of LM2 attend: 0.50 times window."
    found += rows("reading", "reading 2", window=100, full_attention=1, LM2_attend=40)
    assert conclusion(found, "reading") == (
        "Speed of LM2 attend: 0.40 to 0.50 times window. "
        "LM2 attend reads the longest text at 80.0% of its speed in the shortest. "
        "full attention reads the longest text at 1.0% of its speed in the shortest.")


def test_what_the_data_path_says_with_training_and_without():
    found = rows("data", "data, batches", text=900, stories=300)
    assert conclusion(found, "data") == "One core makes 300 tokens of stories a second."
    found += rows("training", "small", LM2_attend=2) + rows("training", "large", LM2_attend=1)
    assert conclusion(found, "data") == (
        "One core makes 300 tokens of stories a second; LM2 attend trains on 2 at most.")


# --- In files

def test_an_old_file_stays_whole_where_the_new_one_cannot_be_made(monkeypatch, tmp_path):
    path = tmp_path / "bench.png"
    path.write_text("old")
    row, = rows("part", "what", a=1.0)

    def fail(self, file, **_):
        file.write(b"half of it")
        raise OSError("the disk is full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="full"):
        write_plot(path, [row])
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("n", [1, 4])
def test_plot_has_a_panel_for_each_comparison(tmp_path, monkeypatch, n):
    panels = []
    savefig = Figure.savefig

    def keep(figure, *args, **kwargs):
        panels.extend(figure.axes)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    found = []
    for i in range(n):
        found += rows("part", f"what {i}", a=1.0, b=2.0)
    write_plot(tmp_path / "bench.png", found)
    assert [panel.get_title() for panel in panels] == [f"what {i}" for i in range(n)]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
