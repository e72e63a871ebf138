"""
Text to token ids and back, four ways behind one interface:

    char    a token per character of the text, small and easy to look at
    bpe     byte-pair encoding trained on the text (rustbpe trains it, tiktoken runs it)
    gpt2    GPT-2's byte-pair encoding (tiktoken)
    hf      a tokenizer.json of Hugging Face, of a pretrained model (tokenizers)

A tokenizer has `kind`, `n_vocab`, `encode(text) -> list[int]`, `decode(ids) -> str`,
`decode_bytes(ids) -> bytes` (UTF-8, maybe ending inside a character), `begin`, the ids that stand
before a prompt, `prefix`, the space that `encode` puts before a text and `decode` takes away again
(SentencePiece's; "" for others), and `to_json() -> dict`, which `from_json` reads.
"""
import json
import re
from itertools import takewhile

import rustbpe
import tiktoken
from tokenizers import Tokenizer

SPACES = 10_000  # whitespace characters in a row that the Rust libraries get at most
LONG_SPACE = re.compile(rf"(?<!\s)\s{{{SPACES},}}")


class CharTokenizer:
    kind, begin, prefix = "char", (), ""

    def __init__(self, chars):
        """chars: string of the known characters; the index of a character is its id."""
        self.chars = chars
        self.ids = {c: i for i, c in enumerate(chars)}
        self.n_vocab = len(chars)

    def encode(self, text):
        """Raises ValueError on a character that the tokenizer lacks."""
        try:
            return [self.ids[c] for c in text]
        except KeyError as e:
            raise ValueError(
                f"character {e.args[0]!r} is not in the vocabulary of the char tokenizer: "
                "leave it out, or train with --tokenizer=bpe") from None

    def decode_bytes(self, ids):
        return self.decode(ids).encode()

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids)

    def to_json(self):
        return {"kind": self.kind, "chars": self.chars}


class BPETokenizer:
    kind, begin, prefix = "bpe", (), ""

    def __init__(self, pattern, tokens):
        """
        pattern: regular expression that splits text into words
        tokens: list of bytes in the order of their ids, each of the 256 bytes among them
        """
        self.pattern, self.tokens = pattern, tokens
        ranks = {token: i for i, token in enumerate(tokens)}
        self.encoding = tiktoken.Encoding(
            "bpe", pat_str=pattern, special_tokens={}, mergeable_ranks=ranks)
        self.n_vocab = len(tokens)

    def encode(self, text):
        """Raises ValueError on what is no Unicode text (half of a surrogate pair)."""
        check_unicode(text)
        ids = []
        for piece in bounded_pieces(text):
            ids += self.encoding.encode_ordinary(piece)
        return ids

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes(ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_json(self):
        tokens = [token.decode("latin-1") for token in self.tokens]
        return {"kind": self.kind, "pattern": self.pattern, "tokens": tokens}


class GPT2Tokenizer(BPETokenizer):
    kind = "gpt2"

    def __init__(self):
        """Raises ValueError where GPT-2's files are neither cached nor to be had."""
        try:
            self.encoding = tiktoken.get_encoding("gpt2")
        except OSError as e:
            raise ValueError(
                f"tokenizer gpt2 cannot be downloaded ({type(e).__name__}): go online once, set "
                "TIKTOKEN_CACHE_DIR to a folder that has its files, or use --tokenizer=bpe"
            ) from None
        self.n_vocab = self.encoding.n_vocab

    def to_json(self):
        return {"kind": self.kind}


class HFTokenizer:
    kind = "hf"

    def __init__(self, description, n_vocab=0):
        """
        description: the dict in a tokenizer.json; n_vocab: rows of the embedding, where it has more
        than the tokenizer has tokens. Raises ValueError where it describes no tokenizer.
        """
        try:
            self.tokenizer = Tokenizer.from_str(json.dumps(description))
        except Exception as e:  # tokenizers raises nothing more special
            raise ValueError(f"tokenizers cannot read it: {e}") from None
        if type(self.tokenizer.model).__name__ != "BPE":
            raise ValueError(f"it is of type {type(self.tokenizer.model).__name__}, only BPE is "
                             "known here")
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.description = description
        self.n_vocab = max(n_vocab, self.tokenizer.get_vocab_size())
        self.bytes = dict(bytes_of_tokens(description))
        self.begin = begin_of(self.tokenizer)
        self.prefix = " " if self.decode_bytes(self.encode("a")).startswith(b" ") else ""

    def encode(self, text, special=False):
        """
        special: whether the special tokens that stand in the text, such as <|im_start|>, are meant
        as such, and not as their characters. Raises ValueError on what is no Unicode text.
        """
        check_unicode(text)
        self.tokenizer.encode_special_tokens = not special
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode_bytes(self, ids):
        return b"".join(self.bytes.get(i, b"") for i in ids)

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def to_json(self):
        return {"kind": self.kind, "n_vocab": self.n_vocab, "tokenizer": self.description}


def begin_of(tokenizer):
    """The ids that its own library puts before a text, such as <|begin_of_text|> of Llama 3."""
    found = tokenizer.encode("a")
    return found.ids[:len([*takewhile(bool, found.special_tokens_mask)])]


def bytes_of_tokens(description):
    """(id, bytes) of each token of a tokenizer.json, as they stand inside a text."""
    model = description["model"]
    in_bytes = "ByteLevel" in json.dumps(description.get("decoder"))
    for token, i in model["vocab"].items():
        if in_bytes:  # each byte is written as a character that can be seen
            yield i, b"".join(BYTE_OF.get(c, c.encode()) for c in token)
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):  # SentencePiece: what has no token of its own
            yield i, bytes([int(token[3:5], 16)])
        else:
            yield i, token.replace("\u2581", " ").encode()
    for token in description.get("added_tokens", ()):
        yield token["id"], token["content"].encode()


def visible_bytes():
    """{character: byte}, the 256 characters in which byte-level tokenizers write bytes."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as Latin-1 they are visible
    unseen = [i for i in range(256) if i not in seen]
    return ({chr(i): bytes([i]) for i in seen}
            | {chr(256 + n): bytes([i]) for n, i in enumerate(unseen)})


BYTE_OF = visible_bytes()


def check_unicode(text):
    """Raises ValueError on what is no Unicode text."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"character {text[e.start]!r} is half of a surrogate pair, "
                         "which no text has: leave it out") from None


def bounded_pieces(text):
    """
    A text in pieces that rustbpe and tiktoken can take: their regular expressions overflow the
    stack on a run of about 700,000 whitespace characters. Text without a run of more than SPACES
    stays one piece.
    """
    start = 0
    for run in LONG_SPACE.finditer(text):
        for end in range(run.start() + SPACES, run.end(), SPACES):
            yield text[start:end]
            start = end
    yield text[start:]


def train_bpe(text, vocab_size):
    """
    A BPETokenizer of vocab_size tokens, the 256 bytes among them.
    Raises ValueError where the text does not yield as many.
    """
    if vocab_size < 256:
        raise ValueError(f"vocab_size={vocab_size} is too small for tokenizer bpe: "
                         "use at least 256, one for each byte")
    trainer = rustbpe.Tokenizer()
    lines = (line for piece in bounded_pieces(text) for line in piece.splitlines(keepends=True))
    trainer.train_from_iterator(lines, min(vocab_size, 1 << 31))  # it counts in 32 bits
    if trainer.vocab_size < vocab_size:
        raise ValueError(f"vocab_size={vocab_size} is more than this text yields: "
                         f"use at most {trainer.vocab_size}")
    ranks = dict(trainer.get_mergeable_ranks())
    return BPETokenizer(trainer.get_pattern(), sorted(ranks, key=ranks.get))


def make_tokenizer(kind, text, vocab_size):
    """
    The tokenizer of a kind for a text. text: its training split for bpe, all of it for char;
    vocab_size: tokens of bpe, the others bring their own. Raises ValueError.
    """
    if kind == "char":
        return CharTokenizer("".join(sorted(set(text))))
    if kind == "bpe":
        return train_bpe(text, vocab_size)
    if kind == "gpt2":
        return GPT2Tokenizer()
    raise ValueError(f"tokenizer={kind} is not known: use char, bpe or gpt2")


def check_text(tokenizer, text):
    """Raises ValueError where a character of the text cannot be encoded: each is tried once."""
    tokenizer.encode("".join(sorted(set(text))))


def prompt_ids(tokenizer, text, special=False):
    """
    The ids of a prompt, without a byte order mark. A pretrained model's prompt begins as the texts
    that it was trained on; an empty one of others starts from a newline, or from token 0 where the
    vocabulary has none. special: see HFTokenizer.encode. Raises ValueError on a character that
    cannot be encoded.
    """
    text, begin = text.removeprefix("\ufeff"), [*tokenizer.begin]
    if text or begin:
        ids = tokenizer.encode(text, special=True) if special else tokenizer.encode(text)
        return ids if ids[:len(begin)] == begin else begin + ids  # a special one may be there
    try:
        return tokenizer.encode("\n")
    except ValueError:
        return [0]


def encode_inside(tokenizer, text):
    """
    The ids of a text that begins with a space, as they stand inside a longer one: where the
    tokenizer puts a space before a text, it is that one. Raises ValueError as `encode`.
    """
    return tokenizer.encode(text.removeprefix(tokenizer.prefix))


def decode_inside(tokenizer, ids):
    """The text of ids as they stand inside a longer text: a space in front stays."""
    return tokenizer.decode_bytes(ids).decode(errors="replace")


def is_char_vocabulary(chars):
    """Whether chars is a string of different characters, none of them half of a surrogate pair."""
    if not isinstance(chars, str) or not chars or len(set(chars)) < len(chars):
        return False
    return not any("\ud800" <= c <= "\udfff" for c in chars)


def is_bpe_vocabulary(tokens):
    """Whether tokens are different byte strings, and each single byte is one of them."""
    return len(tokens) == len(set(tokens)) and {bytes([i]) for i in range(256)} <= set(tokens)


def from_json(value):
    """The tokenizer that to_json described. Raises ValueError where value describes none."""
    try:
        kind = value["kind"]
        if kind == "gpt2":
            return GPT2Tokenizer()
        if kind == "hf":
            return HFTokenizer(value["tokenizer"], value["n_vocab"])
        if kind == "char" and is_char_vocabulary(value["chars"]):
            return CharTokenizer(value["chars"])
        if kind == "bpe" and value["pattern"]:
            tokens = [token.encode("latin-1") for token in value["tokens"]]
            if is_bpe_vocabulary(tokens):
                return BPETokenizer(value["pattern"], tokens)
    except (KeyError, TypeError, AttributeError, UnicodeError):
        pass  # parts are missing or of other types
    raise ValueError("this describes no tokenizer: copy tokenizer.json again")
