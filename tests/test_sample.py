"""Sampling from a checkpoint, and what happens to one that is damaged."""
import os
import shutil

import pytest
import torch

from lib import checkpoint


@pytest.fixture(scope="module", autouse=True)
def run(checkout):
    for kind, more in (("char", []), ("bpe", ["--vocab_size=300"])):
        checkout.train(f"out/{kind}", f"--tokenizer={kind}", "--max_iters=3", *more)


def sample(call, *args, out_dir="out/char"):
    code, out, err = call("sample.py", f"--out_dir={out_dir}", "--device=cpu", "--max_new_tokens=30", *args)
    assert code == 0, err
    return out


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_text_follows_the_prompt_and_the_seed(call, kind):
    out = sample(call, "--start=The ", "--seed=1", out_dir=f"out/{kind}")
    assert out.startswith("The ") and len(out) > 15
    assert out == sample(call, "--start=The ", "--seed=1", out_dir=f"out/{kind}") != sample(call, "--start=The ", "--seed=2", out_dir=f"out/{kind}")


def test_temperature_0_and_top_k_1_are_greedy(call):
    greedy = sample(call, "--start=The ", "--temperature=0")
    assert greedy == sample(call, "--start=The ", "--top_k=1", "--seed=7") == sample(call, "--start=The ", "--top_p=1e-9", "--seed=8")


def test_prompt_may_be_empty_long_or_in_a_file(checkout, call):
    assert len(sample(call)) == 31
    long = "The 5th line of a small play. " * 60
    (checkout.folder / "prompt.txt").write_text(long)
    assert sample(call, f"--start={long}") == sample(call, "--start=FILE:prompt.txt")


def test_samples_are_told_apart(call):
    assert sample(call, "--num_samples=3").count("\n---------------\n") == 2


@pytest.mark.parametrize("args, named", [
    (["--out_dir=out/none"], "out/none"), (["--start=FILE:none.txt"], "none.txt"), (["--start=ß"], "'ß'"), (["--temperature=-1"], "temperature=-1"),
    (["--top_p=0"], "top_p=0"), (["--max_new_tokens=many"], "max_new_tokens=many"), (["--outdir=x"], "--out_dir"), (["--device=tpu"], "device=tpu")], ids=str)
def test_bad_input_is_refused_in_one_line(call, args, named):
    code, out, err = call("sample.py", "--out_dir=out/char", *args)
    assert code == 2 and named in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize("name, damage", [(name, damage) for name in ("best.pt", "tokenizer.json", "config.json") for damage in ("truncated", "missing")]
                         + [("tokenizer.json", "from another run")])
def test_damaged_checkpoint_is_refused_in_one_line(checkout, call, name, damage):
    folder = checkout.folder / "out/damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkout.folder / "out/char", folder)
    content = (folder / name).read_bytes()
    if damage == "missing":
        (folder / name).unlink()
    elif damage == "truncated":
        (folder / name).write_bytes(content[:len(content) // 2])
    else:
        shutil.copy(checkout.folder / "out/bpe" / name, folder / name)
    code, out, err = call("sample.py", "--out_dir=out/damaged")
    assert code == 2 and "out/damaged" in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize("name", ["ckpt.pt", "config.json"])
def test_truncated_run_is_not_resumed(checkout, call, name):
    folder = checkout.folder / "out/truncated"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkout.folder / "out/char", folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-100])
    code, out, err = call("train.py", "--out_dir=out/truncated", "--resume", "--max_iters=5")
    assert code == 2 and f"{name} is damaged" in err and err.count("\n") == 1
    assert (folder / name).read_bytes() == content[:-100]


def test_checkpoint_with_code_inside_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "code ran"),)
    torch.save({"model": Evil()}, tmp_path / "best.pt")
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.read(tmp_path / "best.pt")
    assert not (tmp_path / "code ran").exists()


def test_loaded_model_is_the_saved_one(checkout):
    model, tokenizer, config = checkpoint.load(checkout.folder / "out/char", "cpu")
    assert not model.training and model.config.vocab_size == tokenizer.n_vocab == config["train"]["vocab_size"]
