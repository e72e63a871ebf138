"""Flags come from a dataclass; what is wrong with them is said in one line."""
from dataclasses import dataclass

import pytest

from lib.config import parse


@dataclass
class Base:
    width: int = 4  # how wide, 100% sure


@dataclass
class Config(Base):
    rate: float = 0.5    # how fast
    name: str = "a"      # what it is called
    verbose: bool = False  # talk

    def __post_init__(self):
        if self.width < 0:
            raise ValueError(f"width={self.width} must not be negative")


def test_flags_set_fields_and_are_reported_as_given():
    assert parse(Config, "", []) == (Config(), set())
    assert parse(Config, "", ["--width=7", "--rate", "1", "--name=x=y"]) == (Config(7, 1.0, "x=y"), {"width", "rate", "name"})


@pytest.mark.parametrize("flag, value", [("--verbose", True), ("--verbose=True", True), ("--verbose=true", True), ("--verbose=False", False)])
def test_booleans_stand_alone_or_with_a_value(flag, value):
    assert parse(Config, "", [flag])[0].verbose is value


def test_flags_beat_the_preset(tmp_path):
    preset = tmp_path / "x.toml"
    preset.write_text('width = 9\nrate = 2\nverbose = true\n')
    assert parse(Config, "", [f"--config={preset}", "--width=1"]) == (Config(1, 2.0, "a", True), {"width", "rate", "verbose"})


def test_help_has_a_line_on_each_field(capsys):
    with pytest.raises(SystemExit) as e:
        parse(Config, "What it does.", ["--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and all(words in out for words in ("What it does.", "how wide, 100% sure (default 4)", "how fast (default 0.5)", "talk"))


@pytest.mark.parametrize("args, preset, named", [
    (["--widht=3"], None, "--width"), (["--width=wide"], None, "width=wide"), (["--width=1.5"], None, "width=1.5"), (["--rate=fast"], None, "rate=fast"),
    (["--verbose=maybe"], None, "verbose=maybe"), (["stray"], None, "stray"), (["--width"], None, "width"), (["--width=-1"], None, "width=-1"),
    (["--config=none.toml"], None, "none.toml"), ([], "widht = 3", "--width"), ([], 'width = "3.5"', "width=3.5"), ([], "width = true", "width=True"),
    ([], "width = 1.5", "width=1.5"), ([], "width = ", "x.toml"), ([], "[rate]\na = 1", "rate=")])
def test_what_is_wrong_is_said_in_one_line_with_exit_code_2(tmp_path, capsys, args, preset, named):
    if preset is not None:
        (tmp_path / "x.toml").write_text(preset)
        args = [f"--config={tmp_path}/x.toml"]
    with pytest.raises(SystemExit) as e:
        parse(Config, "", args)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and named in err
