"""
lib/gguf_tokenizer.py: text becomes the ids that the model was trained on, and comes back exactly.
"""
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import TokenType
from test_tokenizer import LINES, ODD, random_strings
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from data.tokenizer import HFTokenizer, prompt_ids
from lib.gguf_tokenizer import gguf_tokenizer

TINY = Path(__file__).parent / "tiny_llama"
SPACE = "\u2581"  # in the pieces of SentencePiece
KEY = "tokenizer.ggml."


def metadata(path):
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


@pytest.fixture(scope="module")
def about():
    """The metadata of the tiny GGUF file, a byte-level BPE."""
    return metadata(TINY / "grouped.gguf")


def tokenizer_of(about, **changes):
    """The tokenizer of a GGUF file's metadata, with changes; ... takes a key away."""
    changed = about | {KEY + name: value for name, value in changes.items()}
    changed = {key: value for key, value in changed.items() if value is not ...}
    return HFTokenizer(gguf_tokenizer(changed, "x"))


# --- Byte-level BPE

def test_a_byte_level_bpe_is_the_one_of_the_folder(about):
    ours = tokenizer_of(about)
    for row in json.loads((TINY / "grouped/texts.json").read_text()):
        assert ours.encode(row["text"]) == row["ordinary"]
        assert ours.encode(row["text"], special=True) == row["ids"]


def test_words_of_llama_3_are_split_as_in_its_tokenizer(about):
    found = tokenizer_of(about, pre="llama-bpe")
    words = found.tokenizer.pre_tokenizer.pre_tokenize_str("I'm 12345 years\n\n old")
    assert [word for word, _ in words] == ["I", "'m", "Ġ", "123", "45", "Ġyears", "ĊĊ", "Ġold"]


@pytest.mark.parametrize("pre, says, begins", [
    ("smollm", False, False), ("smollm", ..., False), ("smollm", True, True),
    ("llama-bpe", ..., True), ("llama-bpe", False, False)])
def test_a_prompt_begins_with_a_special_token_where_the_file_says_so(about, pre, says, begins):
    found = tokenizer_of(about, pre=pre, add_bos_token=says)
    assert found.begin == [about["tokenizer.ggml.bos_token_id"]] * begins
    assert prompt_ids(found, "a") == found.begin + found.encode("a")


# --- SentencePiece's BPE

def sentencepiece_metadata():
    """Learned pieces with scores that fall, as SentencePiece has them, behind the 256 bytes."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        [LINES * 3, "he took his vorpal sword in hand: long time the manxome foe he sought"],
        trainers.BpeTrainer(vocab_size=150, show_progress=False))
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    learned.sort(key=lambda piece: len(piece) == 1)  # characters come last there
    named = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    return {
        KEY + "model": "llama", KEY + "bos_token_id": 1,
        KEY + "tokens": [*named, *learned, "<|user|>", "tq"],
        KEY + "scores": [0.0] * 259 + [-float(i) for i in range(len(learned))] + [-1000.0] * 2,
        KEY + "token_type": [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL,
                             *[TokenType.BYTE] * 256, *[TokenType.NORMAL] * len(learned),
                             TokenType.USER_DEFINED, TokenType.UNUSED],
    }


@pytest.fixture(scope="module")
def pieces():
    return sentencepiece_metadata()


def write_sentencepiece(path):
    """The tiny GGUF file, with SentencePiece's tokenizer and as many rows in its embedding."""
    tiny, about = gguf.GGUFReader(TINY / "grouped.gguf"), sentencepiece_metadata()
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in tiny.fields.items():
        if key.startswith("llama.") and not key.endswith("vocab_size"):
            writer.add_key_value(key, field.contents(), field.types[0])
    writer.add_tokenizer_model(about[KEY + "model"])
    writer.add_tokenizer_pre("default")
    writer.add_token_list(about[KEY + "tokens"])
    writer.add_token_scores(about[KEY + "scores"])
    writer.add_token_types(about[KEY + "token_type"])
    writer.add_bos_token_id(1)
    for tensor in tiny.tensors:
        if tensor.name == "token_embd.weight":
            shape = len(about[KEY + "tokens"]), int(tensor.shape[0])
            rows = np.random.default_rng(0).normal(size=shape).astype(np.float32)
            writer.add_tensor(tensor.name, rows)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def naive(about, text, prefix=" "):
    """SentencePiece's ids: two neighbours with the highest score become one, leftmost first."""
    tokens, scores, types = (about[KEY + name] for name in ("tokens", "scores", "token_type"))
    score = {token: value for token, value, kind in zip(tokens, scores, types)
             if kind == TokenType.NORMAL}
    symbols = [*(prefix * bool(text) + text).replace(" ", SPACE)]
    while pairs := [(score[a + b], -at) for at, (a, b) in enumerate(zip(symbols, symbols[1:]))
                    if a + b in score]:
        at = -max(pairs)[1]
        symbols[at:at + 2] = [symbols[at] + symbols[at + 1]]
    names = [[symbol] if symbol in score else [f"<0x{byte:02X}>" for byte in symbol.encode()]
             for symbol in symbols]
    return [tokens.index(name) for some in names for name in some]


SAME = [LINES, "he took the question", "  two before, two after  ", " ", "   ", "\n\n to\tbe",
        "ttthe thethe  whwhether", "<s> </s>", "<unk>", "<0x0A>", "<|user|>tq",
        *ODD, *random_strings(50)]


@pytest.mark.parametrize("more, prefix", [({}, " "), ({"add_space_prefix": True}, " "),
                                          ({"add_space_prefix": False}, "")])
def test_sentencepiece_gives_its_ids_and_any_text_comes_back(pieces, more, prefix):
    found = tokenizer_of(pieces, **more)
    for text in SAME:
        ids = found.encode(text)
        assert ids == naive(pieces, text, prefix), text
        assert found.decode(ids) == text
        assert found.decode_bytes(ids) == (prefix * bool(text) + text).encode()
    assert len(found.encode(LINES)) < len(LINES) / 2
    for text in (SPACE, f"a{SPACE}b {SPACE}", f" {SPACE} "):  # SentencePiece takes it for a space
        assert found.decode(found.encode(text)) == text


def test_sentencepiece_begins_prompts_unless_the_file_says_no(pieces):
    for says, begin in ((..., [1]), (True, [1]), (False, [])):
        assert tokenizer_of(pieces, add_bos_token=says).begin == begin


def test_special_tokens_of_sentencepiece_are_special_if_asked(pieces):
    found = tokenizer_of(pieces)
    for name in ("<s>", "</s>", "<|user|>"):
        number = pieces[KEY + "tokens"].index(name)
        assert number not in found.encode(name)
        assert number in found.encode(f"{name}he", special=True)


# --- Refusals

@pytest.mark.parametrize("key, value", [("model", "bert"), ("model", ...), ("pre", "qwen2")])
def test_other_tokenizers_are_refused(about, key, value):
    shown = None if value is ... else value
    with pytest.raises(ValueError, match=f"^x: tokenizer.ggml.{key}={shown} is not known"):
        tokenizer_of(about, **{key: value})


@pytest.mark.parametrize("key, value", [("merges", [1]), ("pre", ["smollm"]), ("tokens", 3),
                                        ("token_type", None), ("bos_token_id", "one")])
def test_what_has_another_type_is_refused(about, key, value):
    about = about | {"tokenizer.ggml.add_bos_token": True, f"tokenizer.ggml.{key}": value}
    with pytest.raises(ValueError, match="^x has a key of another type below tokenizer.ggml: copy"):
        gguf_tokenizer(about, "x")


def test_what_is_missing_is_named(about, pieces):
    for name in ("tokens", "scores", "token_type"):
        with pytest.raises(ValueError, match=f"^x has no tokenizer.ggml.{name}: copy it again$"):
            tokenizer_of(pieces, **{name: ...})
    with pytest.raises(ValueError, match="^x has no tokenizer.ggml.merges: copy it again$"):
        tokenizer_of(about, merges=...)
    with pytest.raises(ValueError, match="^x: tokenizer.ggml.bos_token_id=999 is none of its tok"):
        tokenizer_of(pieces, bos_token_id=999)
    without = [token.replace("<0x0A>", "<no>") for token in pieces[KEY + "tokens"]]
    with pytest.raises(ValueError, match="^x: tokenizer.ggml.tokens lacks some of the 256 bytes"):
        tokenizer_of(pieces, tokens=without)
