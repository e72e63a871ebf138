"""
lib/llama.py: the logits of Hugging Face's Llama, from its folders and from GGUF files. The tiny
models and their logits in tests/tiny_llama come from tests/make_tiny_llama.py.
"""
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_gguf_tokenizer import write_sentencepiece

from data.tokenizer import prompt_ids
from lib import llama
from lib.llama import copy_weights, open_llama
from lm2 import LM2, LM2Config

TINY = Path(__file__).parent / "tiny_llama"
BANKS = dict(memory="lm2", mem_slots=8, block_size=16)


def model_of(path, **more):
    """An LM2 with the weights of a Llama."""
    found = open_llama(path)
    torch.manual_seed(0)
    model = LM2(LM2Config(**found.shape, **dict(memory="none", attention="full") | more)).eval()
    copy_weights(found, model)
    return model


def copy_of(name, tmp_path):
    """The folder of a tiny Llama, to be changed, with some tokenizer."""
    ignore = shutil.ignore_patterns("expected.safetensors", "texts.json")
    folder = Path(shutil.copytree(TINY / name, tmp_path / name, ignore=ignore))
    if not (folder / "tokenizer.json").exists():
        model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
        (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    return folder


@pytest.fixture
def folder(tmp_path):
    return copy_of("grouped", tmp_path)


def change_json(path, **values):
    found = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (found | values).items() if v is not Ellipsis}))


def refused(path, *parts):
    """Whether it is refused in one line that has these parts."""
    with pytest.raises((ValueError, OSError)) as e:
        model_of(path)
    message = str(e.value)
    return "\n" not in message and all(part in message for part in parts)


# --- Parity

@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "grouped", "scaled"])
def test_logits_are_those_of_transformers(tmp_path, name):
    expected = load_file(TINY / name / "expected.safetensors")
    model = model_of(copy_of(name, tmp_path))
    logits = model(expected["ids"])[0][0, -len(expected["logits"]):]
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-4)
    state, pieces = None, []
    for piece in expected["ids"].split(7, dim=1):
        logits, _, state = model(piece, state=state)
        pieces.append(logits)
    logits = torch.cat(pieces, dim=1)[0, -len(expected["logits"]):]
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 24, 1024])  # unpacked at once; a head has 8
@torch.no_grad()
def test_logits_of_a_gguf_file_are_those_of_transformers(rows, monkeypatch):
    monkeypatch.setattr(llama, "ROWS", rows)
    expected = load_file(TINY / "grouped/expected.safetensors")
    logits = model_of(TINY / "grouped.gguf")(expected["ids"])[0][0, -6:]
    torch.testing.assert_close(logits, expected["gguf_logits"], rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_gguf_file_with_another_tokenizer_is_read(tmp_path):
    write_sentencepiece(tmp_path / "x.gguf")
    found = open_llama(tmp_path / "x.gguf")
    ids = prompt_ids(found.tokenizer, "he took")
    assert ids[0] == found.tokenizer.begin[0] and found.tokenizer.n_vocab > 288
    logits = model_of(tmp_path / "x.gguf")(torch.tensor([ids]))[0]
    assert logits.shape == (1, len(ids), found.tokenizer.n_vocab)


@torch.no_grad()
@pytest.mark.parametrize("more", [{}, {"mem_layers": 1}, {"attention": "window"},
                                  {"mem_write": "aligned", "mem_slots": 16}], ids=str)
def test_banks_change_nothing_before_they_are_trained_bit_for_bit(tmp_path, more):
    idx = load_file(TINY / "scaled/expected.safetensors")["ids"]
    attention = {"attention": more.get("attention", "full"), "block_size": 16}
    folder = copy_of("scaled", tmp_path)
    without, model = model_of(folder, **attention), model_of(folder, **BANKS | more)
    assert model.config.n_banks and torch.equal(model(idx)[0], without(idx)[0])


# --- Files

def test_weights_may_lie_in_several_files(folder):
    weights = load_file(folder / "model.safetensors")
    whole = model_of(folder).state_dict()
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    index = {}
    for i, some in enumerate((names[:5], names[5:])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in some}, folder / file)
        index |= dict.fromkeys(some, file)
    assert all(torch.equal(p, whole[name]) for name, p in model_of(folder).state_dict().items())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    shutil.copy(folder / file, folder / "other.safetensors")  # the index does not name it
    assert all(torch.equal(p, whole[name]) for name, p in model_of(folder).state_dict().items())
    (folder / file).unlink()
    assert refused(folder, file, "is missing")


def test_the_old_keys_of_rope_scaling_mean_the_same(tmp_path):
    folder = copy_of("scaled", tmp_path)
    shape = open_llama(folder).shape
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    for key in ("rope_type", "type"):
        old = {key: rope["rope_type"]} | {k: v for k, v in rope.items() if k != "rope_type"}
        change_json(folder / "config.json", rope_parameters=..., rope_scaling=old,
                    rope_theta=theta)
        assert open_llama(folder).shape == shape and shape["rope_factor"] == 8


@pytest.mark.parametrize("change, named", [
    (dict(model_type="qwen2"), "model_type=qwen2"), (dict(hidden_act="gelu"), "hidden_act=gelu"),
    (dict(attention_bias=True), "attention_bias=True"), (dict(mlp_bias=True), "mlp_bias=True"),
    (dict(sliding_window=64), "sliding_window=64"), (dict(head_dim=16), "head_dim=16"),
    (dict(quantization_config={"bits": 4}), "quantization_config"),
    (dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "rope_type=yarn"),
    (dict(rope_parameters=..., rope_scaling={"type": "linear", "factor": 2.0}), "rope_type=linear"),
    (dict(rope_parameters={"rope_type": "llama3", "factor": 2.0, "high_freq_factor": 8.0}),
     "high_freq_factor=8.0"),
    (dict(rope_parameters={"rope_type": "llama3", "factor": 2.0}), "original_max_position"),
    (dict(intermediate_size=42), "intermediate_size=42"), (dict(hidden_size=...), "hidden_size"),
    (dict(hidden_size="wide"), "another type"), (dict(hidden_size=64, head_dim=16), "shape"),
    (dict(num_hidden_layers=3), "model.layers.2"), (dict(num_hidden_layers=1), "model.layers.1"),
    (dict(tie_word_embeddings=False), "lm_head.weight"), (dict(vocab_size=200), "288 tokens"),
    (dict(num_hidden_layers="3"), "model.layers.2"), (dict(vocab_size="200"), "288 tokens"),
    (dict(num_attention_heads=0), "n_head=0"), (dict(num_hidden_layers="two"), "n_layer=two"),
    (dict(rms_norm_eps=[]), "norm_eps"), (dict(vocab_size=[1]), "vocab_size"),
    (dict(num_attention_heads="3"), "n_head=3"), (dict(head_dim={"a": 1}), "head_dim={'a': 1}"),
    (dict(hidden_size=0), "another type"), (dict(intermediate_size=0), "mlp_ratio"),
    (dict(rope_parameters=["llama3"]), "rope scaling"), (dict(head_dim="8"), "head_dim=8"),
    (dict(num_key_value_heads=4), "lacks 16 of 32 rows of model.layers.0.self_attn.k_proj.weight"),
    (dict(tie_word_embeddings="so"), "tie_head=so"), (dict(num_hidden_layers=-1), "n_layer=-1"),
], ids=str)
def test_what_cannot_be_represented_is_refused_with_its_key(folder, change, named):
    change_json(folder / "config.json", **change)
    assert refused(folder, named)


def test_damaged_and_missing_files_are_named(folder):
    weights = (folder / "model.safetensors").read_bytes()
    for n_bytes in (0, 5, 100, len(weights) // 2, len(weights) - 1):
        (folder / "model.safetensors").write_bytes(weights[:n_bytes])
        assert refused(folder, "model.safetensors is damaged")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    assert refused(folder, "no *.safetensors", "pickles")
    for index in ({}, {"weight_map": []}, {"weight_map": {"model.norm.weight": 1}}):
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert refused(folder, "model.safetensors.index.json is damaged")
    for name in ("tokenizer.json", "config.json"):
        (folder / name).write_text("{")
        assert refused(folder, f"{name} is damaged")
        (folder / name).unlink()
        assert refused(folder, f"{name} is missing")
    assert refused(folder / "none", "is not there") and refused(__file__, "no .gguf file")


def test_a_gguf_file_that_ends_early_is_named(tmp_path):
    whole, path = (TINY / "grouped.gguf").read_bytes(), tmp_path / "half.gguf"
    for n_bytes in (0, 3, 200, 4000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n_bytes])
        assert refused(path, "half.gguf is damaged")


def test_a_tokenizer_of_another_kind_is_refused(folder):
    for model in ({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
                  {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}, {"type": "none"}):
        (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
        assert refused(folder, "tokenizer.json")


# --- GGUF files

def write_gguf(path, name, kind):
    """The tiny GGUF file, with one tensor of another name or kind."""
    data = (TINY / "grouped.gguf").read_bytes()
    old = b"blk.1.attn_output.weight"
    start = data.index(old)
    place = start + len(old) + 4 + 2 * 8  # behind it: the number of sizes, the sizes, its kind
    data = data[:start] + name + data[start + len(old):place] + bytes([kind]) + data[place + 1:]
    path.write_bytes(data)


def test_tensors_that_a_llama_lacks_or_that_cannot_be_unpacked_are_named(tmp_path):
    path, kind = tmp_path / "x.gguf", gguf.GGMLQuantizationType.Q4_1
    write_gguf(path, b"blk.1.attn_output.weight", kind)
    assert len(list(open_llama(path).pieces())) == 20
    for name in (b"blk.1.attn_output.biasss", b"some.odd.name.of.llama__"):
        write_gguf(path, name, kind)
        assert refused(path, name.decode().rpartition(".")[2], "has no place in a Llama")
    write_gguf(path, b"blk.1.attn_output.weight", gguf.GGMLQuantizationType.Q8_1)
    assert refused(path, "x.gguf")


@pytest.mark.parametrize("key, value, named", [
    ("rope.scaling.type", "yarn", "rope_type=yarn"),
    ("attention.sliding_window", 4096, "sliding_window=4096"),
    ("rope.dimension_count", 4, "head_dim=4")])
def test_what_lm2_lacks_is_named_in_a_gguf_file_too(monkeypatch, key, value, named):
    class Changed(llama.Reader):
        def __init__(self, path):
            super().__init__(path)
            self.about[f"llama.{key}"] = value

    monkeypatch.setattr(llama, "Reader", Changed)
    assert refused(TINY / "grouped.gguf", named)


def test_rope_scaling_of_a_gguf_file_is_recognised():
    shape = dict(n_embd=128, n_head=2, rope_theta=500000.0)
    frequencies = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    wavelengths = 2 * np.pi / frequencies  # as Llama 3.1's code says it
    smooth = (8192 / wavelengths - 1) / (4 - 1)
    scaled = np.where(wavelengths < 8192 / 4, frequencies, np.where(
        wavelengths > 8192, frequencies / 32, (1 - smooth) * frequencies / 32
        + smooth * frequencies))
    assert llama.rope_factor(frequencies / scaled, shape, "x") == 32
    with pytest.raises(ValueError, match="^x: rope_freqs.weight is not known here"):
        llama.rope_factor(np.full(32, 32.0), shape, "x")
