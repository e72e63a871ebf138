"""
The tokenizer of a GGUF file, as a tokenizer.json of Hugging Face. The file's tokenizer.ggml.model
says which of two kinds of byte-pair encoding it is:

    gpt2     on bytes, with a list of merges (SmolLM2, Llama 3)
    llama    SentencePiece's, with a score for each piece (TinyLlama, Llama 2)
"""
from gguf import TokenType

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# how each kind splits a text before it merges, as in the tokenizer.json of its models
SPLITS = {
    "gpt-2": [BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES],
    "llama-bpe": [{"type": "Split", "pattern": {"Regex": LLAMA3_WORDS}, "behavior": "Isolated",
                   "invert": False}, BYTES | {"use_regex": False}],
}
# tokens that no text is made of: they are special, and meant only if asked for
SPECIAL = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)


def gguf_tokenizer(about, path):
    """A tokenizer.json, a dict, from the metadata of a GGUF file. Raises ValueError."""
    kind, split = about.get("tokenizer.ggml.model"), about.get("tokenizer.ggml.pre")
    try:
        if kind == "llama":
            return sentencepiece(about, path)
        if kind == "gpt2" and split in SPLITS:
            return byte_level(about, split)
    except KeyError as e:
        raise ValueError(f"{path} has no {e.args[0]}: copy it again") from None
    except IndexError:
        bos = about["tokenizer.ggml.bos_token_id"]
        raise ValueError(f"{path}: tokenizer.ggml.bos_token_id={bos} is none of its tokens: copy "
                         "it again") from None
    except (TypeError, AttributeError):
        raise ValueError(f"{path} has a key of another type below tokenizer.ggml: copy it "
                         "again") from None
    key = "pre" if kind == "gpt2" else "model"
    raise ValueError(f"{path}: tokenizer.ggml.{key}={about.get(f'tokenizer.ggml.{key}')} is "
                     "not known here: use the folder with tokenizer.json and *.safetensors")


def byte_level(about, split):
    """A tokenizer.json of a byte-level BPE. Raises KeyError for what is missing."""
    merges = [merge.split(" ") for merge in about["tokenizer.ggml.merges"]]
    return tokenizer_json(about["tokenizer.ggml.tokens"], merges, about, split == "llama-bpe") | {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": SPLITS[split]}, "decoder": BYTES}


def sentencepiece(about, path):
    """
    A tokenizer.json of SentencePiece's BPE: a text gets a space before it, and characters without a
    piece become their bytes. Raises KeyError for what is missing, ValueError.

    Pieces have U+2581 for a space, and Hugging Face puts it into the text as well. Here both have
    spaces, so that U+2581 in a text is a character as any other, and survives.
    """
    tokens = [token.replace("\u2581", " ") for token in about["tokenizer.ggml.tokens"]]
    types, scores = about["tokenizer.ggml.token_type"], about["tokenizer.ggml.scores"]
    if not {f"<0x{i:02X}>" for i in range(256)} <= set(tokens):
        raise ValueError(f"{path}: tokenizer.ggml.tokens lacks some of the 256 bytes, so that not "
                         "each text could be written: use another model")
    pieces = {token: score for token, kind, score in zip(tokens, types, scores)
              if kind == TokenType.NORMAL}
    found = tokenizer_json(tokens, merges_of(pieces), about, True)
    found["model"]["byte_fallback"] = True
    decoders = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if about.get("tokenizer.ggml.add_space_prefix", True):
        found["normalizer"] = {"type": "Prepend", "prepend": " "}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return found | {"decoder": {"type": "Sequence", "decoders": decoders}}


def merges_of(pieces):
    """
    Pairs of pieces in the order in which SentencePiece merges them: any two that make a piece, the
    highest score first. Of several pairs that make the same piece the one with the longest left
    part comes first, as in Hugging Face's converter. pieces: {piece: score}
    """
    found = [(score, whole[:i], whole[i:]) for whole, score in pieces.items()
             for i in range(1, len(whole)) if whole[:i] in pieces and whole[i:] in pieces]
    found.sort(key=lambda merge: (merge[0], len(merge[1])), reverse=True)
    return [[left, right] for _, left, right in found]


def tokenizer_json(tokens, merges, about, begins):
    """
    What the tokenizer.json of both kinds have in common. begins: whether a text begins with a
    special token where the file does not say it. Raises KeyError for what is missing.
    """
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
    types, bos = about["tokenizer.ggml.token_type"], about.get("tokenizer.ggml.bos_token_id")
    begins = about.get("tokenizer.ggml.add_bos_token", begins) and bos is not None
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [{"id": i, "content": token} | added
                         for i, (token, kind) in enumerate(zip(tokens, types)) if kind in SPECIAL],
        "pre_tokenizer": None, "post_processor": beginning(bos, tokens) if begins else None,
        "decoder": None,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": about.get("tokenizer.ggml.pre") == "llama-bpe",
            "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges,
        },
    }


def beginning(bos, tokens):
    """A post_processor that puts the special token `bos`, an id, before a text."""
    name = tokens[bos]
    text = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": text,
            "pair": [*text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {name: {"id": name, "ids": [bos], "tokens": [name]}}}
