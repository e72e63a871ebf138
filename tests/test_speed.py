"""lib/speed.py: what the figures of bench.py are, and the table and sentences that they make."""

import pytest

from lib import speed
from lib.speed import Row, conclusion, print_rows, span, take_turns, write_plot


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
    full = fast._replace(peak_memory_mib=5.2, mfu_percent=31.7, first_token_ms=7.0)
    print_rows([slow, full], with_head=True)
    print_rows([slow], with_head=False)
    out = capsys.readouterr().out.strip().splitlines()
    assert out[0] == ("| training | model | tokens a second | quartiles | times slow "
                      "| memory and more |")
    assert out[2:] == [
        "| 4 x 128 | fast | 2,468 | 2,468 to 2,468 | 2.00 "
        "| 5 MiB, MFU 32%, first token after 7 ms |",
        *2 * ["| 4 x 128 | slow | 1,234 | 1,234 to 1,234 | 1.00 |  |"]]


def test_a_span_names_both_ends_where_they_differ():
    assert span([0.8, 0.731]) == "0.73 to 0.80" and span([0.731, 0.7299]) == "0.73"


def test_what_training_says_of_ours_and_of_those_of_others():
    found = rows("training", "small", window=100, full_attention=80, LM2_attend=75, nanoGPT=50)
    found += rows("training", "large", window=10, full_attention=9, LM2_attend=8)
    assert conclusion("training", found) == (
        "Speed of LM2 attend: 0.75 to 0.80 times window, 0.89 to 0.94 times full attention, "
        "1.50 times nanoGPT. Speed of full attention: 1.60 times nanoGPT.")


def test_what_reading_says_of_length():
    found = rows("reading", "reading 1", window=100, full_attention=100, LM2_attend=50)
    found += rows("reading", "reading 2", window=100, full_attention=10, LM2_attend=40)
    assert conclusion("reading", found) == (
        "Speed of LM2 attend: 0.40 to 0.50 times window, 0.50 to 4.00 times full attention. "
        "LM2 attend keeps 0.80 of its speed to the longest text. "
        "full attention keeps 0.10 of its speed to the longest text.")


def test_what_the_data_path_says_with_training_and_without():
    found = rows("data", "data, batches", text=900, stories=300)
    assert conclusion("data", found) == "One core makes 300 tokens of stories a second."
    found += rows("training", "training, small", LM2_attend=2) + rows(
        "training", "training, large", LM2_attend=1)
    assert conclusion("data", found) == (
        "One core makes 300 tokens of stories a second, 150 times what LM2 attend trains on.")


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
    savefig = speed.Figure.savefig

    def keep(figure, *args, **kwargs):
        panels.extend(figure.axes)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(speed.Figure, "savefig", keep)
    found = []
    for i in range(n):
        found += rows("part", f"what {i}", a=1.0, b=2.0)
    write_plot(tmp_path / "bench.png", found)
    assert [panel.get_title() for panel in panels] == [f"what {i}" for i in range(n)]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
