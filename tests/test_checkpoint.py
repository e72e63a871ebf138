"""lib/checkpoint.py: what is saved comes back; what is damaged or foreign is told in one line."""
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from data.text import digest
from data.tokenizer import make_tokenizer
from lib import checkpoint
from lm2 import LM2Config

TOKENIZER = make_tokenizer("char", "abcdefg", 0)
CONFIG = LM2Config(vocab_size=7, n_layer=1, n_embd=8, n_head=2, block_size=4, mem_slots=2)


@pytest.fixture
def folder(tmp_path):
    """The folder of a run."""
    folder = tmp_path / "run"
    torch.manual_seed(0)
    checkpoint.save(folder / "best.pt", checkpoint.make_model(CONFIG),
                    tokenizer_sha256=digest(TOKENIZER))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER.to_json()))
    about = {"train": vars(CONFIG), "data": {}, "parameters": 1}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def change(path, **values):
    """Change entries of a checkpoint or of a JSON file."""
    if path.suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    else:
        torch.save(torch.load(path, weights_only=True) | values, path)


def refused(folder, *named):
    """Whether a run is refused with one line that names its folder and more."""
    with pytest.raises(ValueError) as e:
        checkpoint.load(folder, "cpu")
    message = str(e.value)
    return "\n" not in message and all(name in message for name in (str(folder), *named))


def test_loaded_model_is_the_saved_one(folder):
    model, tokenizer, config = checkpoint.load(folder, "cpu")
    torch.manual_seed(0)
    saved = checkpoint.make_model(CONFIG).state_dict()
    assert not model.training and model.config == CONFIG
    assert tokenizer.to_json() == TOKENIZER.to_json() and config["train"] == vars(CONFIG)
    assert all(torch.equal(p, saved[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("memory", ["lm2", "rmt", "none"])
def test_each_kind_of_memory_comes_back(folder, memory):
    config = LM2Config(**vars(CONFIG) | {"memory": memory})
    checkpoint.save(folder / "best.pt", checkpoint.make_model(config))
    change(folder / "config.json", train=vars(config))
    assert checkpoint.load(folder, "cpu")[0].config == config


def test_checkpoint_with_code_inside_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "code ran"),)
    torch.save({"model": Evil()}, tmp_path / "best.pt")
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load_file(tmp_path / "best.pt")
    assert not (tmp_path / "code ran").exists()


def test_checkpoint_of_a_compiled_model_is_loaded(folder):
    before = checkpoint.load(folder, "cpu")[0].state_dict()
    weights = torch.load(folder / "best.pt", weights_only=True)["model"]
    change(folder / "best.pt", model={f"_orig_mod.{name}": p for name, p in weights.items()})
    after = checkpoint.load(folder, "cpu")[0].state_dict()
    assert all(torch.equal(p, after[name]) for name, p in before.items())


NOT_CHECKPOINTS = {
    "a list": [1, 2], "a tensor": torch.zeros(3), "a number": 3, "nothing": None,
    "a bare state dict": {"embed.weight": torch.zeros(3)},
    "that of nanoGPT": {"model": {}, "model_args": {"n_layer": 1}, "optimizer": {}, "iter_num": 1,
                        "best_val_loss": torch.tensor(1.0), "config": {}},
    "a model that is a list": {"model_config": vars(CONFIG), "model": [1]},
    "a configuration that is a list": {"model_config": [1], "model": {}}}


@pytest.mark.parametrize("content", NOT_CHECKPOINTS.values(), ids=NOT_CHECKPOINTS)
def test_what_another_program_saved_is_refused(folder, content):
    torch.save(content, folder / "best.pt")
    assert refused(folder, "best.pt", "another program")


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "a folder", "missing"])
def test_damaged_checkpoint_is_refused(folder, damage):
    path = folder / "best.pt"
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "text": b"weights", "truncated": content[:-99]}[damage])
    assert refused(folder, "best.pt")


@pytest.mark.parametrize("values, named", [
    ({"new_option": 1}, "new_option"), ({"n_layer": "one"}, ""), ({"n_layer": 1.5}, ""),
    ({"n_head": 3}, "n_head=3"), ({"n_head": 0}, "n_head=0"), ({"dropout": float("nan")}, "nan"),
    ({"memory": "tape"}, "tape"), ({"memory": None}, ""), ({"n_embd": None}, ""), ({3: 4}, ""),
], ids=str)
def test_configuration_of_another_version_is_refused(folder, values, named):
    change(folder / "best.pt", model_config=vars(CONFIG) | values)
    (folder / "config.json").write_text('{"train": {}, "data": {}, "parameters": 1}')
    assert refused(folder, "best.pt", "does not fit this version", named)


@pytest.mark.parametrize("weights", [
    lambda model: {}, lambda model: model | {"more": torch.zeros(1)},
    lambda model: {name: p[:1] for name, p in model.items()},
    lambda model: {name: 3 for name in model}, lambda model: {3: 4},
], ids=["none", "one more", "of other shapes", "numbers", "other names"])
def test_weights_of_another_model_are_refused(folder, weights):
    model = torch.load(folder / "best.pt", weights_only=True)["model"]
    change(folder / "best.pt", model=weights(model))
    assert refused(folder, "best.pt", "does not fit this version")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"3", b"null", b"\xff", b"[" * 99999,
                                     b"{}", b'{"train": 3, "kind": 3}'])
def test_damaged_json_is_refused(folder, name, content):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    assert refused(folder, name)


@pytest.mark.parametrize("value", [
    {"kind": "char"}, {"kind": "char", "chars": 3}, {"kind": "char", "chars": "aa"},
    {"kind": "bpe", "pattern": "(", "tokens": []}, {"kind": "bpe", "pattern": 3, "tokens": 3},
    {"kind": "bpe", "pattern": "(", "tokens": [chr(i) for i in range(256)]}, {"kind": "new"},
], ids=str)
def test_what_is_no_tokenizer_is_refused(folder, value):
    (folder / "tokenizer.json").write_text(json.dumps(value))
    assert refused(folder, "tokenizer.json")


@pytest.mark.parametrize("chars", ["abcdef", "abcdegf", "ABCDEFG"])
def test_tokenizer_of_another_run_is_refused(folder, chars):
    (folder / "tokenizer.json").write_text(json.dumps({"kind": "char", "chars": chars}))
    assert refused(folder, "different runs")


def test_config_of_another_run_is_refused(folder):
    change(folder / "config.json", train=vars(CONFIG) | {"rope_theta": 3.0})
    assert refused(folder, "rope_theta=3.0", "different runs")


def test_checkpoint_says_what_it_lacks(folder):
    path = folder / "best.pt"
    with pytest.raises(ValueError, match="no 'optimizers': it looks like a best.pt"):
        checkpoint.load_file(path, {"optimizers": list})
    change(path, optimizers={})
    with pytest.raises(ValueError, match="no 'optimizers'"):
        checkpoint.load_file(path, {"optimizers": list})


def test_folder_without_room_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3_000_000))
    checkpoint.make_folder(tmp_path / "a", 2_000_000)
    with pytest.raises(ValueError, match="has 3 MB of room left, this needs 4 MB: make room"):
        checkpoint.make_folder(tmp_path / "b", 4_000_000)


def test_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file/run", "/proc/run"):
        with pytest.raises(ValueError, match=f"out_dir={path} is not a folder that can be written"):
            checkpoint.make_folder(path)
