"""
A Llama's weights for the decoder of lm2.py: from a folder as Hugging Face writes it (config.json,
tokenizer.json, *.safetensors) or from a GGUF file. No pickle is ever opened.

    llama = open_llama("Llama-3.2-1B")
    model = LM2(LM2Config(**llama.shape, memory="none", attention="full"))
    copy_weights(llama, model)

Names of tensors and keys are those of Hugging Face's Llama. What lm2.py cannot represent is refused
in one line that names the key.
"""
import json
import re
from pathlib import Path
from typing import Callable, NamedTuple

import gguf
import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from data.files import read_utf8
from data.tokenizer import HFTokenizer
from lib.config import from_dict
from lib.gguf_tokenizer import gguf_tokenizer
from lm2 import LM2Config

ROWS = 1024  # about as many of a matrix in a GGUF file are unpacked at once


class Llama(NamedTuple):
    path: Path
    shape: dict         # fields of LM2Config
    tokenizer: HFTokenizer
    pieces: Callable    # () -> an iterator of name, first row, tensor of some rows


def open_llama(path):
    """The Llama in a folder or a .gguf file. Raises ValueError or OSError, one line."""
    path = Path(path)
    if path.is_dir():
        return open_folder(path)
    if not path.exists():
        raise ValueError(f"{path} is not there: name smollm2, a folder with config.json and "
                         "*.safetensors, or a .gguf file")
    if path.suffix != ".gguf":
        raise ValueError(f"{path} is no .gguf file: name one, or a folder with config.json and "
                         "*.safetensors")
    return open_gguf(path)


# --- Shapes

ONLY = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "rope_interleaved": False, "sliding_window": None, "quantization_config": None,
        "low_freq_factor": 1, "high_freq_factor": 4}


def check_keys(config, path):
    """Raises ValueError for the first key of a dict whose value lm2.py cannot represent."""
    for key, value in ONLY.items():
        if config.get(key, value) != value:
            raise ValueError(f"{path}: {key}={config[key]} is not known here, only {value}: "
                             "use another model")


def shape_of(config, path):
    """Fields of LM2Config from a config.json of Hugging Face's Llama, a dict. Raises ValueError."""
    check_keys(config, path)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: its rope scaling is {rope}, not an object: copy it again")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{path}: rope_type={kind} is not known here, only llama3: "
                         "use another model")
    check_keys(rope, path)
    try:
        width, hidden = config["hidden_size"], config["intermediate_size"]
        n_head = config["num_attention_heads"]
        shape = {
            "vocab_size": config["vocab_size"],
            "n_layer": config["num_hidden_layers"],
            "n_head": n_head,
            "n_kv_head": config.get("num_key_value_heads") or n_head,
            "n_embd": width,
            # lm2.py rounds up to a multiple of 8; one less, so that no error of rounding counts
            "mlp_ratio": (hidden - 1) / width,
            "qk_norm": False,
            "norm_eps": config["rms_norm_eps"],
            "rope_theta": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            "tie_head": config.get("tie_word_embeddings", False),
        }
        if kind == "llama3":
            shape["rope_factor"] = float(rope["factor"])
            shape["rope_context"] = rope["original_max_position_embeddings"]
        checked = from_dict(LM2Config, shape)  # numbers that were text are numbers now
        shape = {name: getattr(checked, name) for name in shape}
    except KeyError as e:
        raise ValueError(f"{path} has no {e.args[0]}: copy it again") from None
    except (TypeError, ZeroDivisionError):
        raise ValueError(f"{path} has a key of another type than Llama's: copy it again") from None
    except ValueError as e:
        raise ValueError(f"{path} describes no model ({e}): copy it again") from None
    if hidden % 8:
        raise ValueError(f"{path}: intermediate_size={hidden} must be a multiple of 8 here: "
                         "use another model")
    head_dim = shape["n_embd"] / shape["n_head"]
    if (config.get("head_dim") or head_dim) != head_dim:
        raise ValueError(f"{path}: head_dim={config['head_dim']} is not known here, only "
                         f"hidden_size / num_attention_heads={head_dim:g}: use another model")
    return shape


# --- A folder

def read_json(path):
    """A JSON object. Raises ValueError, one line, where it is missing or damaged."""
    try:
        found = json.loads(read_utf8(path))
    except OSError:
        raise ValueError(f"{path} is missing: copy the whole folder again") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: copy it again")
    return found


def open_folder(folder):
    """The Llama in a folder. Raises ValueError or OSError."""
    if (folder / "best.pt").exists():
        raise ValueError(f"{folder} is a run already: train.py --init_from={folder} and the other "
                         "programs take it as it is")
    shape = shape_of(read_json(folder / "config.json"), folder / "config.json")
    description, n_vocab = read_json(folder / "tokenizer.json"), shape["vocab_size"]
    try:
        tokenizer = HFTokenizer(description, n_vocab)
    except ValueError as e:
        raise ValueError(f"{folder}/tokenizer.json is damaged, or of another kind ({e}): "
                         "copy it again, or use another model") from None
    if tokenizer.n_vocab > n_vocab:
        raise ValueError(f"{folder}: tokenizer.json has {tokenizer.n_vocab} tokens, config.json "
                         f"vocab_size={n_vocab}: they are from different models")
    files = weight_files(folder)
    return Llama(folder, shape, tokenizer, lambda: pieces_of_files(files))


def weight_files(folder):
    """The *.safetensors of a folder that hold its weights. Raises ValueError."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or {*map(type, names.values())} != {str}:
            raise ValueError(f"{index} is damaged: copy it again")
        files = [folder / Path(name).name for name in sorted({*names.values()})]
    else:
        files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no *.safetensors: get them, or convert its weights; "
                         "pickles (.bin, .pth) are not opened")
    for file in files:
        if not file.exists():
            raise ValueError(f"{file} is missing: copy the whole folder again")
    return files


def pieces_of_files(files):
    """The tensors of *.safetensors, each whole. Raises ValueError."""
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                names = list(f.keys())
            for name in names:  # a file that stays open keeps in memory what was read of it
                with safe_open(file, framework="pt") as f:
                    yield name, 0, f.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as e:
            raise ValueError(f"{file} is damaged ({e}): copy it again") from None


# --- A GGUF file

# its keys, below `llama.`, and Hugging Face's
GGUF_KEYS = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.dimension_count": "head_dim",
    "attention.sliding_window": "sliding_window",
}
# its names of tensors, and Hugging Face's
GGUF_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


class Reader(gguf.GGUFReader):
    """A GGUF file. `about` has what it says; no array for each token stays, 140 MB of SmolLM2's."""

    def __init__(self, path):
        self.about = {}
        super().__init__(path)

    def _push_field(self, field, skip_sum=False):
        n_bytes = super()._push_field(field, skip_sum)
        self.about[field.name] = field.contents()
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            field.parts.clear()
        return n_bytes


def open_gguf(path):
    """The Llama in a GGUF file. Raises ValueError."""
    try:
        reader = Reader(path)
    except Exception as e:  # numpy and gguf raise a different type for each kind of damage
        raise ValueError(f"{path} is damaged or no GGUF file ({type(e).__name__}): "
                         "copy it again") from None
    about = reader.about
    kind = about.get("general.architecture")
    if kind != "llama":
        raise ValueError(f"{path}: general.architecture={kind} is not known here, only llama: "
                         "use another model")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = {key: about[f"llama.{name}"] for name, key in GGUF_KEYS.items()
              if f"llama.{name}" in about}
    config["vocab_size"] = len(about.get("tokenizer.ggml.tokens", ()))
    config["tie_word_embeddings"] = "output.weight" not in tensors
    if about.get("llama.rope.scaling.type", "none") != "none":  # Llama 3's is a tensor, see below
        config["rope_scaling"] = {"type": about["llama.rope.scaling.type"]}
    shape = shape_of(config, path)
    factors = tensors.pop("rope_freqs.weight", None)
    if factors is not None:
        shape["rope_factor"] = rope_factor(factors.data, shape, path)
    description = gguf_tokenizer(about, path)
    try:
        tokenizer = HFTokenizer(description, shape["vocab_size"])
    except ValueError as e:
        raise ValueError(f"{path}: {e}: copy it again, or use another model") from None
    return Llama(path, shape, tokenizer, lambda: pieces_of_gguf(tensors, shape, path))


def pieces_of_gguf(tensors, shape, path):
    """The tensors of a GGUF file, unpacked to float32, some rows at a time. Raises ValueError."""
    hs = shape["n_embd"] // shape["n_head"]
    step = max(1, ROWS // hs) * hs  # whole heads
    for name, tensor in tensors.items():
        full = full_name(name)
        turned = re.search(r"self_attn\.[qk]_proj", full)
        # opened anew, since a file that stays open keeps in memory what was read of it
        data = np.memmap(path, tensor.data.dtype, "r", tensor.data_offset, tensor.data.shape)
        for row in range(0, len(data), step):
            try:
                unpacked = gguf.dequantize(data[row:row + step], tensor.tensor_type)
            except NotImplementedError:
                raise ValueError(f"{path}: {name} is of type {tensor.tensor_type.name}, which "
                                 "gguf cannot unpack: use another file") from None
            piece = torch.from_numpy(np.array(unpacked, dtype=np.float32))
            yield full, row, half_split(piece, hs) if turned else piece


def full_name(name):
    """Hugging Face's name of a tensor of a GGUF file; one that has none keeps its own."""
    block, kind, end = re.fullmatch(r"(?:blk\.(\d+)\.)?([^.]*)(.*)", name).groups()
    before = "" if block is None else f"model.layers.{block}."
    return f"{before}{GGUF_NAMES.get(kind, kind)}{end}"


def rope_factor(factors, shape, path):
    """
    The factor of Llama 3's rope scaling from what a GGUF file has: for each angle the number that
    divides it. Raises ValueError where another scaling made them.
    """
    factor = float(factors.max())
    hs = shape["n_embd"] // shape["n_head"]
    frequencies = shape["rope_theta"] ** (-np.arange(0, hs, 2) / hs)
    kept = ((LM2Config.rope_context * frequencies / (2 * np.pi) - 1) / 3).clip(0, 1)
    if not np.allclose(factors, 1 / (kept + (1 - kept) / factor), rtol=1e-3):
        raise ValueError(f"{path}: rope_freqs.weight is not known here, only llama3's: use the "
                         "folder with config.json and *.safetensors")
    return factor


def half_split(weight, hs):
    """
    GGUF turns neighbours x_2i, x_2i+1 by an angle, Hugging Face x_i, x_i+hs/2. The rows of queries
    and keys in the order of the one -> of the other. weight (heads * hs, D)
    """
    return weight.unflatten(0, (-1, hs // 2, 2)).transpose(1, 2).flatten(0, 2)


# --- Into a model

def places(model):
    """{Hugging Face's name: the tensor of an LM2 that it belongs into, a view}"""
    found = {"model.embed_tokens.weight": model.embedding.weight,
             "model.norm.weight": model.norm.weight, "lm_head.weight": model.head.weight}
    c = model.config
    rows = [n_heads * c.head_dim for n_heads in (c.n_head, c.kv_heads, c.kv_heads)]
    for i, block in enumerate(model.blocks):
        q, k, v = block.attention.wqkv.weight.split(rows)
        parts = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
                 "self_attn.o_proj": block.attention.wo.weight,
                 "mlp.gate_proj": block.mlp.w_gate.weight, "mlp.up_proj": block.mlp.w_up.weight,
                 "mlp.down_proj": block.mlp.w_down.weight,
                 "input_layernorm": block.norm1.weight,
                 "post_attention_layernorm": block.norm2.weight}
        found |= {f"model.layers.{i}.{name}.weight": place for name, place in parts.items()}
    return found


@torch.no_grad()
def copy_weights(llama, model):
    """
    A Llama's weights into an LM2 of its shape, some rows at a time. Banks stay as they are.
    Raises ValueError where a tensor is missing, has no place, or another shape.
    """
    found = places(model)
    left = {name: len(place) for name, place in found.items()}  # rows that are to come
    if model.config.tie_head:
        del left["lm_head.weight"]
    for name, row, piece in llama.pieces():
        if name.endswith("rotary_emb.inv_freq") or name in found and name not in left:
            continue  # what older versions wrote as well, or the embedding's weights once more
        if name not in found:
            raise ValueError(f"{llama.path}: {name} has no place in a Llama: use another model")
        place = found[name][row:row + len(piece)]
        if place.shape != piece.shape:
            raise ValueError(f"{llama.path}: {name} has the shape {tuple(piece.shape)}, and "
                             f"config.json says {tuple(place.shape)}: copy it again")
        place.copy_(piece)
        left[name] -= len(piece)
    for name, rows in left.items():
        if rows:
            raise ValueError(f"{llama.path} lacks {rows} of {len(found[name])} rows of {name}: "
                             "copy it again, all of it of one model")
