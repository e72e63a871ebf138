"""
Text to token ids and back, three ways behind one interface:

    char    a token per character of the corpus, small and easy to look at
    bpe     byte-pair encoding trained on the corpus (rustbpe trains it, tiktoken runs it)
    gpt2    GPT-2's byte-pair encoding (tiktoken)

A tokenizer has `kind`, `n_vocab`, `encode(text) -> list[int]`, `decode_bytes(ids) -> bytes` (UTF-8, maybe cut inside a
character), `decode(ids) -> str` and `to_json() -> dict`, which `from_json` reads.
"""
import rustbpe
import tiktoken


class CharTokenizer:
    kind = "char"

    def __init__(self, chars):
        """chars: string of the known characters; a character's place is its id."""
        self.chars = chars
        self.ids = {c: i for i, c in enumerate(chars)}
        self.n_vocab = len(chars)

    def encode(self, text):
        """Raises ValueError on a character that is not in the corpus."""
        try:
            return [self.ids[c] for c in text]
        except KeyError as e:
            raise ValueError(f"character {e.args[0]!r} is not in the vocabulary of the char tokenizer: "
                             "leave it out, or train with --tokenizer=bpe") from None

    def decode_bytes(self, ids):
        return self.decode(ids).encode()

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids)

    def to_json(self):
        return {"kind": self.kind, "chars": self.chars}


class BPETokenizer:
    kind = "bpe"

    def __init__(self, pattern, tokens):
        """pattern: regular expression that splits text into words; tokens: list of bytes in the order of their ids."""
        self.pattern, self.tokens = pattern, tokens
        self.encoding = tiktoken.Encoding("bpe", pat_str=pattern, special_tokens={},
                                          mergeable_ranks={token: i for i, token in enumerate(tokens)})
        self.n_vocab = len(tokens)

    def encode(self, text):
        """Raises ValueError on what is no Unicode text (half of a surrogate pair)."""
        text.encode()
        return self.encoding.encode_ordinary(text)

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes(ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_json(self):
        return {"kind": self.kind, "pattern": self.pattern, "tokens": [t.decode("latin-1") for t in self.tokens]}


class GPT2Tokenizer(BPETokenizer):
    kind = "gpt2"

    def __init__(self):
        """Raises ValueError where GPT-2's files are neither cached nor to be had."""
        try:
            self.encoding = tiktoken.get_encoding("gpt2")
        except OSError as e:
            raise ValueError(f"tokenizer gpt2 cannot be downloaded ({type(e).__name__}): go online once, set TIKTOKEN_CACHE_DIR "
                             "to a folder that has its files, or use --tokenizer=bpe") from None
        self.n_vocab = self.encoding.n_vocab

    def to_json(self):
        return {"kind": self.kind}


def train_bpe(text, vocab_size):
    """A BPETokenizer of vocab_size tokens, the 256 bytes among them. Raises ValueError where the text does not yield as many."""
    if vocab_size < 256:
        raise ValueError(f"vocab_size={vocab_size} is too small for tokenizer bpe: use at least 256, one for each byte")
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(text.splitlines(keepends=True), vocab_size)
    if trainer.vocab_size < vocab_size:
        raise ValueError(f"vocab_size={vocab_size} is more than this text yields: use at most {trainer.vocab_size}")
    return BPETokenizer(trainer.get_pattern(), [token for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda t: t[1])])


def build(kind, text, vocab_size):
    """The tokenizer of a kind for a corpus. text: its training split for bpe, all of it for char."""
    if kind == "char":
        return CharTokenizer("".join(sorted(set(text))))
    if kind == "bpe":
        return train_bpe(text, vocab_size)
    if kind == "gpt2":
        return GPT2Tokenizer()
    raise ValueError(f"tokenizer={kind} is not known: use char, bpe or gpt2")


def prompt_ids(tokenizer, text):
    """The ids of a prompt; an empty one starts from a newline, or from token 0 where the vocabulary has none."""
    try:
        return tokenizer.encode(text or "\n")
    except ValueError:
        if text:
            raise
        return [0]


def from_json(value):
    """The tokenizer that to_json described."""
    if value["kind"] == "char":
        return CharTokenizer(value["chars"])
    if value["kind"] == "gpt2":
        return GPT2Tokenizer()
    return BPETokenizer(value["pattern"], [t.encode("latin-1") for t in value["tokens"]])
