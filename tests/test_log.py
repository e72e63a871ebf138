"""lib/log.py: the log of a run is whole, and damage is told instead of lost."""
import errno
from unittest.mock import Mock

import pytest

from lib.log import Log, plot_losses

HEADER = "step,loss,learning_rate,val_loss"
ROWS = ["0,3.5,0.1,3.6", "1,3.4,0.2,", "2,3.3,0.2,3.2", "3,3.1,0.1,"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.csv"


def write(path, *lines, end="\n"):
    path.write_text("\n".join(lines) + end)


def test_rows_are_in_the_file_as_soon_as_they_are_added(path):
    log = Log(path, ("val_loss",))
    for step in range(3):
        log.add(step=step, loss=0.1 + step, learning_rate=1e-5)
        assert len(path.read_text().splitlines()) == step + 2
    assert path.read_text().splitlines() == [HEADER, "0,0.1,1e-05,", "1,1.1,1e-05,", "2,2.1,1e-05,"]


def test_a_run_that_goes_on_keeps_the_rows_before_its_step(path):
    write(path, HEADER, *ROWS)
    Log(path, ("val_loss",), 2).add(step=2, loss=9.0, learning_rate=0.2)
    assert path.read_text().splitlines() == [HEADER, *ROWS[:2], "2,9.0,0.2,"]


def test_numbers_keep_every_digit(path):
    log = Log(path, ("val_loss",))
    log.add(step=0, loss=1 / 3, learning_rate=2 / 3, val_loss=1e-17 / 3)
    assert Log(path, ("val_loss",), 1).rows == [
        {"step": "0", "loss": repr(1 / 3), "learning_rate": repr(2 / 3),
         "val_loss": repr(1e-17 / 3)}]


def test_the_file_is_left_alone_until_a_row_is_added(path):
    write(path, HEADER, *ROWS)
    before = path.read_text()
    Log(path, ("val_loss",), 2)
    Log(path, ("val_loss",))
    assert path.read_text() == before


@pytest.mark.parametrize("line, damage", [
    (1, HEADER + ",more"), (1, "step,loss"), (1, "loss,step,learning_rate,val_loss"), (1, ROWS[0]),
    (2, ROWS[0] + ",7"), (3, "1,3.4,0.2"), (3, "1,3.4"), (3, "x,3.4,0.2,"), (3, ",3.4,0.2,"),
    (3, "1,low,0.2,"), (3, "1.5,3.4,0.2,"), (3, '"1,3.4,0.2,'), (3, "\x00"), (5, ROWS[3] + ",7"),
])
def test_damage_is_told_with_its_line_and_the_file_stays(path, line, damage):
    lines = [HEADER, *ROWS]
    lines[line - 1] = damage
    write(path, *lines)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"log\.csv:{line} is damaged"):
        Log(path, ("val_loss",), 3)
    assert path.read_bytes() == before


@pytest.mark.parametrize("half", ["3,3.1,0.", "3", "3,", "3,3.1,0.1,"])
def test_half_a_row_at_the_end_is_made_again(path, half):
    write(path, HEADER, *ROWS[:3], half, end="")
    assert len(Log(path, ("val_loss",), 3).rows) == 3


def test_a_last_row_that_is_needed_may_lack_its_newline(path):
    write(path, HEADER, *ROWS, end="")
    assert len(Log(path, ("val_loss",), 4).rows) == 4


@pytest.mark.parametrize("content", ["", HEADER + "\n"])
def test_no_rows_are_no_damage(path, content):
    path.write_text(content)
    assert Log(path, ("val_loss",), 3).rows == []


def test_a_missing_file_begins_anew(path):
    log = Log(path, ("val_loss",), 3)
    log.add(step=3, loss=1.0, learning_rate=0.1)
    assert path.read_text().splitlines() == [HEADER, "3,1.0,0.1,"]


def test_what_is_no_text_is_told(path):
    path.write_bytes(b"step\xff")
    with pytest.raises(ValueError, match="log.csv is not UTF-8"):
        Log(path, ("val_loss",), 3)


def test_a_full_disk_is_told_with_the_name_of_the_file(path):
    log = Log(path, ("val_loss",))
    log.add(step=0, loss=1.0, learning_rate=0.1)
    full = OSError(errno.ENOSPC, "No space left on device")
    log.file = Mock(write=Mock(side_effect=full))
    with pytest.raises(OSError, match="log.csv cannot be written: No space left"):
        log.add(step=1, loss=1.0, learning_rate=0.1)


def test_losses_are_plotted(path, tmp_path):
    write(path, HEADER, *ROWS)
    plot_losses(Log(path, ("val_loss",), 4), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
