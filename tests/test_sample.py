"""sample.py: text from a run; bad input and damaged runs are told in one line."""
import re
import shutil
import signal

import pytest
from conftest import is_one_line

from lib.config import parse
from sample import SampleConfig


@pytest.fixture(scope="module", autouse=True)
def runs(checkout):
    for kind, more in (("char", []), ("bpe", ["--vocab_size=300"])):
        checkout.train(f"out/{kind}", f"--tokenizer={kind}", "--max_iters=3", *more)


@pytest.fixture
def copy(checkout):
    """A copy of a run, to be changed -> its folder."""
    folder = checkout.folder / "out/copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkout.folder / "out/char", folder)
    return folder


def sample(call, *args, out_dir="out/char"):
    code, out, err = call("sample.py", f"--out_dir={out_dir}", "--device=cpu",
                          "--max_new_tokens=30", *args)
    assert code == 0, err
    return out


# --- Text

@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_text_follows_the_prompt_and_the_seed(call, kind):
    first, again, other = (sample(call, "--start=The ", f"--seed={seed}", out_dir=f"out/{kind}")
                           for seed in (1, 1, 2))
    assert first.startswith("The ") and len(first) > 15
    assert first == again != other


def test_temperature_0_and_top_k_1_are_greedy(call):
    greedy = sample(call, "--start=The ", "--temperature=0")
    assert greedy == sample(call, "--start=The ", "--top_k=1", "--seed=7")
    assert greedy == sample(call, "--start=The ", "--top_p=1e-9", "--seed=8")


@pytest.mark.parametrize("args", [["--temperature=0.001"], ["--temperature=1e300"],
                                  ["--top_k=2147483647"], ["--top_p=1e-9"], ["--seed=0"]])
def test_extreme_values_work(call, args):
    assert len(sample(call, *args)) == 30 + len("\n")


def test_prompt_may_be_empty_long_or_in_a_file(checkout, call):
    assert len(sample(call)) == 30 + len("\n")
    long = "The 5th line of a small play. " * 60
    (checkout.folder / "prompt.txt").write_text(long)
    assert sample(call, f"--start={long}") == sample(call, "--start=FILE:prompt.txt")


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_no_byte_order_mark_enters_a_prompt(checkout, call, kind):
    (checkout.folder / "marked.txt").write_text("The ", encoding="utf-8-sig")
    wanted = sample(call, "--start=The ", out_dir=f"out/{kind}")
    assert sample(call, "--start=FILE:marked.txt", out_dir=f"out/{kind}") == wanted
    assert sample(call, "--start=\ufeffThe ", out_dir=f"out/{kind}") == wanted


def test_samples_are_told_apart(call):
    texts = sample(call, "--num_samples=3").split("\n---------------\n")
    assert len({text.strip() for text in texts}) == len(texts) == 3
    assert sample(call, "--num_samples=0") == ""


def test_no_new_tokens_give_the_prompt(call):
    assert sample(call, "--start=The ", "--max_new_tokens=0") == "The \n"


# --- Bad input

NUMBERS = {name: field.type for name, field in SampleConfig.__dataclass_fields__.items()
           if field.type in (int, float)}


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_is_nan_infinite_negative_or_too_long(capsys, name):
    values = ["nan", "inf", "-inf", "1e999", "-1", "many", ""]
    if NUMBERS[name] is int:
        values += ["9" * 23, "2147483648", "1.5"]
    for value in values:
        with pytest.raises(SystemExit) as e:
            parse(SampleConfig, "", [f"--{name}={value}"])
        assert is_one_line(e.value.code, capsys.readouterr().err, f"{name}=", value[:3])


@pytest.mark.parametrize("args, named", [
    (["--out_dir=out/not-there"], "out/not-there"), (["--out_dir="], "best.pt"),
    (["--out_dir=play.txt"], "play.txt"), (["--start=\u00df"], "'\u00df'"),
    (["--start=\udcff"], "vocabulary"), (["--start=FILE:none.txt"], "none.txt"),
    (["--start=FILE:"], "an empty name is not a file"), (["--start=FILE:out"], "out is not a file"),
    (["--start=FILE:latin1.txt"], "latin1.txt is not UTF-8"),
    (["--top_p=0"], "top_p=0"), (["--top_p=1e-300"], "top_p=1e-300"),
    (["--top_p=1.1"], "top_p=1.1"),
    (["--temperature=1e-40"], "temperature=1e-40"), (["--outdir=x"], "--out_dir"),
    (["--device=tpu"], "device=tpu"), (["--dtype=int8"], "dtype=int8"),
], ids=ascii)
def test_bad_input_is_refused_in_one_line(checkout, call, args, named):
    (checkout.folder / "latin1.txt").write_bytes(b"caf\xe9")
    code, out, err = call("sample.py", "--out_dir=out/char", *args)
    assert is_one_line(code, err, named) and not out


@pytest.mark.parametrize("name", ["best.pt", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "empty", "a folder", "of another run"])
def test_damaged_run_is_refused_in_one_line(checkout, call, copy, name, damage):
    content = (copy / name).read_bytes()
    (copy / name).unlink()
    if damage == "truncated":
        (copy / name).write_bytes(content[:len(content) // 2])
    elif damage == "empty":
        (copy / name).write_bytes(b"")
    elif damage == "a folder":
        (copy / name).mkdir()
    elif damage == "of another run":
        shutil.copy(checkout.folder / "out/bpe" / name, copy / name)
    code, out, err = call("sample.py", "--out_dir=out/copy")
    assert is_one_line(code, err, "out/copy") and not out


# --- Consoles and pipes

def test_nobody_needs_to_read_to_the_end(checkout):
    process = checkout.start("sample.py", "--out_dir=out/char", "--device=cpu",
                             "--max_new_tokens=1000000", "--compile=False", "--start=The ")
    process.stdout.read(50)
    process.stdout.close()  # as head -1 does
    assert process.stderr.read() == ""
    process.wait(timeout=60)


def test_ctrl_c_ends_without_a_traceback(checkout):
    process = checkout.start("sample.py", "--out_dir=out/char", "--device=cpu",
                             "--max_new_tokens=1000000", "--compile=False", "--start=The ")
    assert process.stdout.read(20).startswith("The ")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert err == "" and process.returncode == 130


def test_a_console_that_lacks_a_character_shows_something_else(checkout):
    code, out, err = checkout.run("sample.py", "--out_dir=out/bpe", "--device=cpu",
                                  "--max_new_tokens=5", "--start=\u0416\u0443\u043a ",
                                  PYTHONIOENCODING="cp1252")
    assert code == 0 and out.startswith("??? "), err


def test_how_fast_the_text_came_is_told_aside(call):
    _, _, err = call("sample.py", "--out_dir=out/char", "--device=cpu", "--max_new_tokens=5")
    assert re.fullmatch(r"the first token after \d+\.\d s, all 5 after \d+\.\d s; "
                        r"by the median [\d,]+ tokens a second\n", err)


def test_compiling_needs_a_state_of_fixed_size(checkout, call):
    checkout.train("out/full", "--memory=none", "--attention=full", "--max_iters=1")
    code, _, err = call("sample.py", "--out_dir=out/full", "--device=cpu", "--compile")
    assert is_one_line(code, err, "compile=True is not for attention=full")
