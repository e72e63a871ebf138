"""Text survives the way to token ids and back, through JSON as well."""
import json
import random

import pytest
import tiktoken

from data.files import atomic_open
from data.tokenizer import GPT2Tokenizer, build, from_json, prompt_ids

CORPUS = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 20
ODD = ["", " ", "\n\n \t\r\n", "naïve café", "日本語と한국어", "🙂👩‍👩‍👧‍👦", "e\u0301", "\x00\x7f\u2028", "<|endoftext|>", "a" * 300, "مرحبا", "\U0010ffff"]


def random_strings(n):
    generator = random.Random(0)
    for _ in range(n):
        yield "".join(chr(generator.choice([generator.randrange(0xD800), generator.randrange(0xE000, 0x110000)])) for _ in range(20))


@pytest.fixture(scope="module")
def bpe():
    return build("bpe", CORPUS, 300)


def test_bpe_gives_back_any_unicode(bpe):
    assert bpe.n_vocab == 300 and len(bpe.encode(CORPUS)) < len(CORPUS)
    for text in [CORPUS, *ODD, *random_strings(200)]:
        assert bpe.decode(bpe.encode(text)) == text


def test_gpt2_gives_back_any_unicode(monkeypatch):
    """GPT-2's own files need a download, so its class speaks here with a stand-in of the same making."""
    stand_in = tiktoken.Encoding("gpt2", pat_str=r"\s+|\w+|[^\s\w]+", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={"<|endoftext|>": 256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: stand_in)
    gpt2 = build("gpt2", "", 0)
    for text in [CORPUS, *ODD, *random_strings(200)]:
        assert gpt2.decode(gpt2.encode(text)) == text
    assert from_json(gpt2.to_json()).n_vocab == gpt2.n_vocab == 257


def test_gpt2_says_what_to_do_without_a_network(monkeypatch):
    def unreachable(name):
        raise ConnectionError("no route")
    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR"):
        GPT2Tokenizer()


def test_bytes_may_be_cut_inside_a_character(bpe):
    ids = bpe.encode("🙂")
    assert len(ids) > 1 and b"".join(bpe.decode_bytes([i]) for i in ids) == "🙂".encode()


def test_char_gives_back_its_own_text_and_names_the_unknown_character():
    char = build("char", CORPUS, 0)
    assert char.n_vocab == len(set(CORPUS)) and char.decode(char.encode(CORPUS)) == CORPUS
    with pytest.raises(ValueError, match="'ß'"):
        char.encode("To ß")


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_json_keeps_a_tokenizer(kind):
    first = build(kind, CORPUS, 280)
    again = from_json(json.loads(json.dumps(first.to_json())))
    assert again.kind == kind and again.n_vocab == first.n_vocab and again.encode(CORPUS) == first.encode(CORPUS)


@pytest.mark.parametrize("kind, vocab_size, named", [("bpe", 255, "vocab_size=255"), ("bpe", 50000, "vocab_size=50000"), ("word", 9, "tokenizer=word")])
def test_tokenizer_that_cannot_be_is_refused(kind, vocab_size, named):
    with pytest.raises(ValueError, match=named):
        build(kind, CORPUS, vocab_size)


def test_half_of_a_surrogate_pair_is_refused(bpe):
    with pytest.raises(ValueError):
        bpe.encode("\ud800")


def test_empty_prompt_starts_from_a_newline_where_there_is_one():
    assert prompt_ids(build("char", "ab\n", 0), "") == [0]
    assert prompt_ids(build("char", "xyz", 0), "") == [0]
    with pytest.raises(ValueError):
        prompt_ids(build("char", "xyz", 0), "a")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError):
        with atomic_open(path) as f:
            f.write(b"half of the n")
            raise RuntimeError("killed")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
