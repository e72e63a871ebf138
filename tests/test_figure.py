"""lib/figure.py: the picture shows what was measured, and every name can be read."""
import itertools

import matplotlib
import numpy as np
import pytest
from made_up import answered, figure
from PIL import Image
from test_files import full_disk

import lib.figure
from lib.figure import curves_of, draw_accuracy, draw_bars, draw_curves, draw_dots, plot, spread
from lib.scores import by_run

LENGTHS = ["0k", "1k", "4k", "16k", "64k", "128k"]


def curves(n, lengths=LENGTHS, seeds=(1, 2), name="a row with the number"):
    """n rows; each has accuracies of its own, and every third one ends early."""
    rows, rng = [], np.random.default_rng(0)
    for i in range(n):
        reached = lengths[:3] if i % 3 == 2 else lengths
        for seed, length in itertools.product(seeds, reached):
            right = int(rng.integers(101))
            answers = "1" * right + "0" * (100 - right)
            rows.append(answered(f"{name} {i}", seed, answers, length=length))
    return rows


def drawn(draw, rows):
    """The axes of a picture, after all is placed."""
    with matplotlib.rc_context({"font.size": 11}):
        return draw(rows).axes


def line_of(axes, name):
    found, = [line for line in axes.lines if line.get_label() == name]
    return found


def test_a_line_is_the_mean_and_its_band_from_worst_to_best():
    rows = [answered("LM2", seed, "1" * right + "0" * (10 - right), length=length)
            for length, seed, right in (("64k", 1, 4), ("64k", 2, 8), ("0k", 1, 9), ("0k", 2, 10))]
    axes, = drawn(draw_accuracy, rows)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0k", "64k"]
    assert line_of(axes, "LM2").get_xydata() == pytest.approx(np.array([[0, 95], [1, 60]]))
    band = {tuple(corner) for corner in axes.collections[0].get_paths()[0].vertices.round(6)}
    assert band == {(0, 90), (0, 100), (1, 40), (1, 80)}


def test_a_line_ends_with_the_last_length_that_was_asked():
    axes, = drawn(draw_accuracy, curves(6))
    for i in range(6):
        last = 2 if i % 3 == 2 else len(LENGTHS) - 1
        assert line_of(axes, f"a row with the number {i}").get_xdata()[-1] == last


def test_the_first_row_is_bold():
    axes, = drawn(draw_accuracy, curves(3))
    widths = [line_of(axes, text.get_text()).get_linewidth() for text in axes.texts]
    assert widths[0] > max(widths[1:])
    assert [text.get_weight() for text in axes.texts] == ["bold", "normal", "normal"]


def test_rows_look_different():
    axes, = drawn(draw_accuracy, curves(24))
    lines = [line_of(axes, text.get_text()) for text in axes.texts]
    looks = {(line.get_color(), str(line.get_linestyle()), str(line._dash_pattern))
             for line in lines}
    assert len(looks) == 24
    assert {line.get_linestyle() for line in lines[:8]} == {"-"}
    assert "-" not in {line.get_linestyle() for line in lines[8:]}
    for line, text in zip(lines, axes.texts):
        assert line.get_color() == text.get_color()


@pytest.mark.parametrize("n, name", [(1, "one"), (2, "two"), (6, "some"), (9, "more"), (20, "many"),
                                     (40, "a crowd"), (8, "long names " * 6)])
def test_no_name_stands_on_another_or_outside(n, name):
    axes, = drawn(draw_accuracy, curves(n, name=name))
    boxes = [text.get_window_extent() for text in axes.texts]
    width, height = axes.figure.canvas.get_width_height()
    assert len(boxes) == n and axes.get_window_extent().width > 0.4 * width
    for box in boxes:
        assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b)


def test_a_name_stands_on_no_line():
    axes, = drawn(draw_accuracy, curves(6))
    for text in axes.texts:
        box = text.get_window_extent()
        for i in range(6):
            line = line_of(axes, f"a row with the number {i}")
            path = axes.transData.transform_path(line.get_path())
            assert not path.intersects_bbox(box, filled=False), text.get_text()


@pytest.mark.parametrize("wanted", [[50], [90, 10, 50], [50, 50, 50], [100, 99, 98, 3, 0, 1],
                                    list(range(20))])
def test_names_that_would_touch_are_moved_and_keep_their_order(wanted):
    found = spread(wanted, 5, 0, 100)
    order = sorted(range(len(wanted)), key=lambda i: -wanted[i])
    steps = np.diff([found[i] for i in order])
    assert (steps <= -5 + 1e-9).all() and 0 <= min(found) and max(found) <= 100
    if min(np.abs(np.diff(sorted(wanted))), default=5) >= 5:
        assert found == wanted
    if wanted == [50, 50, 50]:
        assert found == [55, 50, 45]


def test_losses_are_shown_by_seed_and_mean():
    rows = [figure(name, seed, f"{value + seed / 100}", measure) for measure, value in
            (("val_loss", 1.5), ("stream_loss", 1.4)) for name in ("LM2", "window")
            for seed in (1, 2, 3)]
    rows[-1]["value"] = ""  # of the last measure, row and seed
    first, second = drawn(draw_dots, rows)
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["val_loss", "stream_loss"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["LM2", "window"]
    points = [line.get_xdata().tolist() for line in first.lines]
    assert points == [pytest.approx([1.51, 1.52, 1.53]), pytest.approx([1.52])] * 2
    assert [text.get_text() for text in first.texts] == ["1.520", "1.520"]
    assert [len(line.get_xdata()) for line in second.lines] == [3, 1, 2]  # and no mean of two
    assert [text.get_text() for text in second.texts] == ["1.420"]


def evaluated(name, seed, tokens, loss, **more):
    """A line of results/NAME_log.csv."""
    return {"row": name, "seed": str(seed), "tokens": str(tokens), "val_loss": str(loss)} | more


def test_a_loss_over_tokens_is_the_mean_of_seeds_without_the_first_step():
    rows = [figure(name, seed, "1.5") for name in ("LM2", "window") for seed in (1, 2)]
    log = [evaluated(row["row"], row["seed"], tokens, loss + int(row["seed"]) / 4) for row in rows
           for tokens, loss in ((0, 4), (1000, 2), (2000, 1))]
    log += [evaluated("gone", 1, 1000, 9), evaluated("LM2", 1, 3000, ""),
            {"row": "LM2", "seed": "1", "val_loss": "9"}]  # of before tokens were noted
    curves = curves_of(rows, rows, log, "val_loss")
    assert curves == {"LM2": {1000: [2.25, 2.5], 2000: [1.25, 1.5]}, "window": curves["LM2"]}
    with matplotlib.rc_context({"font.size": 11}):
        axes, = draw_curves(curves, "val_loss").axes
    assert line_of(axes, "window").get_xydata().tolist() == [[1000, 2.375], [2000, 1.375]]
    assert [text.get_text() for text in axes.texts] == ["LM2", "window"]
    low, high = (text.get_window_extent() for text in reversed(axes.texts))
    assert low.y1 <= high.y0, "names of equal lines stand one below the other"


def test_curves_of_other_code_are_never_averaged():
    rows = [figure("LM2", 1, "1.5", run="old"), figure("LM2", 2, "1.5", run="new")]
    log = [evaluated("LM2", seed, 1000, seed) for seed in (1, 2)]
    found = curves_of(rows, by_run(rows, {"LM2": "new"}), log, "val_loss")
    assert found == {"LM2 (as of 0123456)": {1000: [1.0]}, "LM2": {1000: [2.0]}}


def test_a_picture_shows_the_curve_that_is_wanted_and_else_dots(tmp_path, monkeypatch):
    rows, log = [figure("LM2", 1, "1.5")], [evaluated("LM2", 1, 1000, 2)]
    drawn = []
    for name in ("draw_curves", "draw_dots"):
        own = getattr(lib.figure, name)
        monkeypatch.setattr(lib.figure, name,
                            lambda *args, name=name, own=own: drawn.append(name) or own(*args))
    for args in ((), (log,), (log, "val_loss"), ([], "val_loss")):
        plot(rows, tmp_path / "a.png", "A title", *args)
    assert drawn == ["draw_dots", "draw_dots", "draw_curves", "draw_dots"]


def test_bars_are_as_high_as_their_numbers_say():
    axes, = drawn(draw_bars, {"LM2": {"one": 98.4, "two": 53}, "RMT": {"one": 70, "two": 0}})
    assert [bar.get_height() for bar in axes.patches] == [98.4, 53, 70, 0]
    assert [text.get_text() for text in axes.texts] == ["98", "53", "70", "0"]
    left = [bar.get_x() for bar in axes.patches]
    assert left[0] < left[2] < left[1] < left[3], "the rows stand side by side in each group"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["one", "two"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["LM2", "RMT"]


def pixels(path):
    with Image.open(path) as picture:
        return picture.size, len(picture.getcolors(256))


@pytest.mark.parametrize("rows, size", [
    (curves(3), (1800, 1000)), (curves(1, LENGTHS[:1]), None), (curves(2, LENGTHS[:2], [1]), None),
    ([figure("LM2", 1, "1.5"), figure(r"LM2 $\none{$ | _a", 1, "")], None),
    ([figure("LM2", 1, "")], None),
    ([figure("a", 1, "1.5", f"measure {i}") for i in range(5)], None),
    ([*curves(2), figure("a row with losses alone", 1, "1.5")], (1800, 1000))])
def test_whatever_was_measured_has_a_picture(tmp_path, rows, size):
    plot(rows, tmp_path / "a.png", "A title with $ and _")
    found, colors = pixels(tmp_path / "a.png")
    assert found == size if size else found[0] == 1800
    assert colors > 10


def test_the_same_rows_give_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        plot(curves(4), tmp_path / name, "A title")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_runs_of_other_code_have_lines_of_their_own(tmp_path, monkeypatch):
    rows = [answered("LM2", seed, "10", length=length, run=run) for length in ("0k", "4k")
            for seed, run in ((1, "old"), (2, "new"))]
    seen = []
    monkeypatch.setattr("lib.figure.draw_accuracy", lambda rows: seen.append(rows) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plot(rows, tmp_path / "a.png", "A title", current={"LM2": "new"})
    assert {row["row"] for row in seen[0]} == {"LM2 (as of 0123456)", "LM2"}


def test_a_picture_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with full_disk(1000), pytest.raises(OSError, match=r"a\.png cannot be written: "):
        plot(curves(2), path, "A title")
    with pytest.raises(ValueError, match=r"a\.png cannot be drawn: nothing was measured yet$"):
        plot([], path, "A title")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
