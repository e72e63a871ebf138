"""Flags come from a dataclass; what is wrong with them is said in one line."""
import io
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
from conftest import REPO, is_one_line

from lib.config import at_least, below, from_dict, parse, user_errors


@dataclass
class Base:
    # size
    width: int = 4  # how wide, 100% sure


@dataclass
class Config(Base):
    rate: float = 0.5    # how fast
    name: str = "a"      # what it is called
    # talk
    verbose: bool = False  # talk
    auto: bool | None = None  # what the machine likes

    def __post_init__(self):
        if self.width < 0:
            raise ValueError(f"width={self.width} must not be negative")


@dataclass
class Files(Base):
    files: list = field(default_factory=list)  # what to read
    loud: bool = False                         # say so

    def talk(self):
        pass


def refused(capsys, cls, *args):
    """What parse says of arguments that it refuses."""
    with pytest.raises(SystemExit) as e:
        parse(cls, "", list(args))
    err = capsys.readouterr().err
    assert is_one_line(e.value.code, err), err
    return err


# --- Flags

def test_flags_set_fields_and_are_reported_as_given():
    assert parse(Config, "", []) == (Config(), set())
    config, given = parse(Config, "", ["--width=7", "--rate", "1", "--name=x=y"])
    assert config == Config(7, 1.0, "x=y") and given == {"width", "rate", "name"}


@pytest.mark.parametrize("flag, value", [
    ("--verbose", True), ("--verbose=True", True), ("--verbose=true", True),
    ("--verbose=False", False), ("--auto", True), ("--auto=auto", None), ("--auto=false", False)])
def test_booleans_stand_alone_or_with_a_value(flag, value):
    config, _ = parse(Config, "", [flag])
    assert getattr(config, flag.strip("-").split("=")[0]) is value


def test_arguments_without_a_name_may_stand_anywhere():
    for args in (["a", "b", "--width=7"], ["--width=7", "a", "b"], ["a", "--width=7", "b"],
                 ["a", "--width", "7", "--loud=True", "b"], ["--width=7", "--loud", "a", "b"],
                 ["a", "b", "--width=7", "--loud"], ["--width=7", "--loud", "True", "a", "b"]):
        config, given = parse(Files, "", args)
        assert config.files == ["a", "b"] and config.width == 7 and "files" in given
        assert config.loud == any("--loud" in arg for arg in args)


def test_a_name_for_what_has_none_is_refused_with_what_to_do(capsys):
    assert "files is given without a name" in refused(capsys, Files, "--files=a")
    assert "did you mean --loud?" in refused(capsys, Files, "--lod=a")
    assert "files" not in refused(capsys, Files, "--rag=3")


def test_values_may_hold_spaces_and_any_letter():
    assert parse(Config, "", ["--name=two words, \u4e2d = 1"])[0].name == "two words, \u4e2d = 1"
    assert parse(Config, "", ["--name="])[0].name == ""


# --- Presets

def test_flags_beat_the_preset(tmp_path):
    preset = tmp_path / "x.toml"
    preset.write_text("width = 9\nrate = 2\nverbose = true\n")
    config, given = parse(Config, "", [f"--config={preset}", "--width=1"])
    assert config == Config(1, 2.0, "a", True) and given == {"width", "rate", "verbose"}


def test_a_later_preset_beats_an_earlier_one(tmp_path):
    for name, text in (("a", "width = 1\nrate = 1"), ("b", "width = 2")):
        (tmp_path / name).write_text(text)
    config, _ = parse(Config, "", [f"--config={tmp_path}/a", f"--config={tmp_path}/b"])
    assert config == Config(2, 1.0)


def test_a_preset_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "x.toml").write_text("width = 9\r\n", encoding="utf-8-sig")
    assert parse(Config, "", [f"--config={tmp_path}/x.toml"])[0].width == 9


# --- Help

def test_help_has_a_line_on_each_field_in_groups(capsys):
    with pytest.raises(SystemExit) as e:
        parse(Config, "What it does.", ["--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0
    wanted = ("What it does.", "\nsize:\n", "how wide, 100% sure (default 4)",
              "how fast (default 0.5)", "\ntalk:\n", "what the machine likes (default auto)")
    assert [words for words in wanted if words not in out] == []


# --- What is wrong

@pytest.mark.parametrize("args, named", [
    (["--widht=3"], "--width"), (["--width=wide"], "width=wide"), (["--width=1.5"], "width=1.5"),
    (["--width=1e3"], "width=1e3"), (["--width=nan"], "width=nan"), (["--width"], "width"),
    (["--width=-1"], "width=-1"), (["--width=2147483648"], "width=2147483648"),
    (["--width=" + "9" * 23], "too large"), (["--width=" + "9" * 9999], "width="),
    (["--rate=fast"], "rate=fast"), (["--rate=nan"], "rate=nan"), (["--rate=inf"], "rate=inf"),
    (["--rate=-inf"], "rate=-inf"), (["--rate=1e400"], "rate=1e400"), (["--rate="], "rate="),
    (["--verbose=maybe"], "verbose=maybe"), (["--verbose=auto"], "verbose=auto"),
    (["--auto=2"], "auto=2"), (["stray"], "stray"), ([""], "unknown"), (["-w", "3"], "-w"),
    (["--wid=3"], "--width"), (["--width = 3"], "--width"), (["--config"], "config"),
    (["--config=none.toml"], "none.toml"), (["--config="], "config"), (["--config=/"], "/"),
    (["config/a.toml"], "did you mean --config=config/a.toml?"), (["--conf=a"], "mean --config?"),
], ids=lambda value: str(value)[:40])
def test_a_wrong_flag_is_said_in_one_line(capsys, args, named):
    assert named in refused(capsys, Config, *args)


@pytest.mark.parametrize("preset, named", [
    ("widht = 3", "--width"), ('width = "3.5"', "width=3.5"), ("width = true", "width=True"),
    ("width = 1.5", "width=1.5"), ("width = 2.0", "width=2.0"), ("width = ", "x.toml"),
    ("width = [1]", "width="), ("width = 99999999999999999999999", "too large"),
    ("rate = nan", "rate=nan"), ("rate = -inf", "rate=-inf"), ("rate = [1.0]", "rate="),
    ("[rate]\na = 1", "rate="), ("[name]\na = 1", "name="), ("name = 3", "name=3"),
    ("name = true", "name="), ('name = ["a"]', "name="), ("name = 2020-01-01", "name="),
    ("verbose = 1", "verbose=1"), ("width = 1\nwidth = 2", "x.toml"), ("[[table]]\na=1", "table"),
    (b"name = '\xe9'", "not UTF-8"), (b"\x00", "x.toml"),
])
def test_a_wrong_preset_is_said_in_one_line(tmp_path, capsys, preset, named):
    content = preset if isinstance(preset, bytes) else preset.encode()
    (tmp_path / "x.toml").write_bytes(content)
    assert named in refused(capsys, Config, f"--config={tmp_path}/x.toml")


def test_a_preset_cannot_give_a_word_for_a_list(tmp_path, capsys):
    (tmp_path / "x.toml").write_text('files = "ab"')
    assert "files=ab" in refused(capsys, Files, f"--config={tmp_path}/x.toml")


@pytest.mark.parametrize("values", [
    {"width": "x"}, {"width": None}, {"width": [3]}, {"name": None}, {"name": {}}, {"rate": "x"},
    {"rate": float("nan")}, {"rate": True}, {"verbose": None}, {"bank": 3}], ids=str)
def test_values_of_other_types_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        from_dict(Config, values)


def test_ranges_do_not_let_nan_pass():
    config = Config(rate=float("nan"))
    for check in (at_least, below):
        with pytest.raises(ValueError, match="rate=nan must be"):
            check(config, 1, "rate")


# --- Errors of the user

@pytest.mark.parametrize("error, code", [
    (ValueError("two\nlines"), 2), (FileNotFoundError(2, "not there", "x"), 2), (MemoryError(), 2),
    (RuntimeError("CUDA out of memory. Tried to"), 2), (KeyboardInterrupt(), 130)], ids=repr)
def test_what_the_user_can_mend_ends_in_one_line(capsys, error, code):
    with pytest.raises(SystemExit) as e, user_errors():
        raise error
    err = capsys.readouterr().err
    assert e.value.code == code and err.count("\n") == (code == 2)


@pytest.mark.parametrize("error", [KeyError("k"), RuntimeError("a bug")], ids=repr)
def test_what_the_programmer_must_mend_keeps_its_traceback(error):
    with pytest.raises(type(error)), user_errors():
        raise error


def test_errors_can_be_limited_to_some_kinds():
    with pytest.raises(ValueError), user_errors(OSError):
        raise ValueError


def test_a_reader_that_goes_away_ends_the_program_quietly():
    program = ("from lib.config import user_errors\n"
               "with user_errors():\n"
               "    while True:\n"
               "        print('y')")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=REPO, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "y\n"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=60) == 1


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_prints_what_it_lacks_as_a_question_mark(monkeypatch, encoding):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), streams):
        monkeypatch.setattr(sys, name, stream)
    parse(Config, "", [])
    for stream in streams:
        print("\u4e2d\udcff.", file=stream, flush=True)
        assert stream.buffer.getvalue() == b"??.\n"
