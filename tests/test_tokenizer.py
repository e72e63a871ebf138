"""Text survives the way to token ids and back, through JSON as well."""
import json
import random
import re
from pathlib import Path

import pytest
import tiktoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from data.tokenizer import (
    SPACES,
    GPT2Tokenizer,
    HFTokenizer,
    bounded_pieces,
    check_text,
    from_json,
    make_tokenizer,
    prompt_ids,
)

LINES = ("To be, or not to be, that is the question:\n"
         "Whether 'tis nobler in the mind to suffer\n")
CORPUS = LINES * 20
ODD = ["", " ", "\n\n \t\r\n", "naïve café", "日本語と한국어",
       "🙂👩‍👩‍👧‍👦", "e\u0301",
       "\x00\x7f\u2028", "<|endoftext|>", "a" * 300, "مرحبا", "\U0010ffff", "\ufeffa"]
GPT2_PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
                r"|\s++$|\s+(?!\S)|\s")


def random_strings(n):
    generator = random.Random(0)
    ranges = [(0, 0xD800), (0xE000, 0x110000)]  # without the halves of surrogate pairs
    for _ in range(n):
        yield "".join(chr(generator.randrange(*generator.choice(ranges))) for _ in range(20))


def stand_in_for_gpt2():
    """GPT-2's own files need a download: its pattern, with the 256 bytes for a vocabulary."""
    ranks = {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 256})


@pytest.fixture(scope="module")
def bpe():
    return make_tokenizer("bpe", CORPUS, 300)


@pytest.fixture
def gpt2(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: stand_in_for_gpt2())
    return make_tokenizer("gpt2", "", 0)


def test_bpe_gives_back_any_unicode(bpe):
    assert bpe.n_vocab == 300 and len(bpe.encode(CORPUS)) < len(CORPUS)
    for text in [CORPUS, *ODD, *random_strings(200)]:
        assert bpe.decode(bpe.encode(text)) == text


def test_gpt2_gives_back_any_unicode(gpt2):
    for text in [CORPUS, *ODD, *random_strings(200)]:
        assert gpt2.decode(gpt2.encode(text)) == text
    assert from_json(gpt2.to_json()).n_vocab == gpt2.n_vocab == 257


# --- Hugging Face's

TINY = Path(__file__).parent / "tiny_llama/grouped"


@pytest.fixture(scope="module")
def hf():
    return HFTokenizer(json.loads((TINY / "tokenizer.json").read_text()), 300)


def test_hf_gives_back_any_unicode(hf):
    for text in [CORPUS, *ODD, *random_strings(200)]:
        ids = hf.encode(text)
        assert hf.decode(ids) == text and hf.decode_bytes(ids) == text.encode()
    again = from_json(json.loads(json.dumps(hf.to_json())))
    assert again.n_vocab == hf.n_vocab == 300 and again.encode(CORPUS) == hf.encode(CORPUS)
    assert hf.decode_bytes([299]) == b"", "the embedding may have rows without a token"


def test_hf_gives_the_ids_of_its_library_and_takes_special_tokens_only_if_asked(hf):
    for text in json.loads((TINY / "texts.json").read_text()):
        assert hf.encode(text["text"]) == text["ordinary"]
        assert hf.encode(text["text"], special=True) == text["ids"]
    assert hf.encode("<|endoftext|>a", special=True)[0] == 0 not in hf.encode("<|endoftext|>a")
    assert prompt_ids(hf, "<|im_start|>", special=True) == [1]
    assert hf.decode([0, 1]) == "<|endoftext|><|im_start|>" == hf.decode_bytes([0, 1]).decode()


def with_beginning(name, token_id):
    """The tiny Llama's tokenizer.json, with the post_processor of a model that begins its texts."""
    processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single=f"{name} $A", special_tokens=[(name, token_id)])])
    made = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    made.post_processor = processor
    return json.loads(made.to_str())


def test_a_prompt_begins_as_the_models_own_tokenizer_says(hf):
    description = with_beginning("<|im_start|>", 1)
    ours, theirs = HFTokenizer(description), Tokenizer.from_str(json.dumps(description))
    for special in (False, True):
        theirs.encode_special_tokens = not special
        for text in ["", "To be", "\n", "a<|endoftext|>b", "<|endoftext|>", *ODD[:-1]]:
            assert prompt_ids(ours, text, special) == theirs.encode(text).ids
            plain = ours.encode(text, special)
            assert [1, *plain] == theirs.encode(text).ids and ours.decode(plain) == text
            assert plain == hf.encode(text, special)
    assert (hf.begin, prompt_ids(hf, "")) == ([], hf.encode("\n"))


def test_a_prompt_begins_once_where_the_text_says_it_too():
    tokenizer = HFTokenizer(with_beginning("<|im_start|>", 1))
    assert prompt_ids(tokenizer, "<|im_start|>To", special=True) == prompt_ids(tokenizer, "To")
    assert prompt_ids(tokenizer, "<|im_start|>To").count(1) == 1


def test_hf_knows_the_bytes_of_sentencepiece():
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token=None))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(),
                                      decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False,
                                  special_tokens=[f"<0x{i:02X}>" for i in range(256)])
    made.train_from_iterator([LINES], trainer)
    hf = HFTokenizer(json.loads(made.to_str()) | {"added_tokens": []})
    for text in ("To be, or not", "naïve 東京"):
        ids = hf.encode(text)
        assert hf.decode(ids) == text and hf.decode_bytes(ids) == f" {text}".encode()


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
    char = make_tokenizer("char", CORPUS, 0)
    assert char.n_vocab == len(set(CORPUS)) and char.decode(char.encode(CORPUS)) == CORPUS
    with pytest.raises(ValueError, match="'ß'"):
        char.encode("To ß")


# --- What makes the Rust libraries panic, which is no Exception and prints a backtrace

RUNS = {"spaces": " " * 1_000_000 + "x", "tabs": "\t" * 1_000_000, "mixed": " \n\t\u3000" * 300_000,
        "newlines": "\n" * 300_000, "letters": "a" * 1_000_000, "dashes": "-" * 1_000_000,
        "no-break spaces": "x" + "\u00a0" * 1_000_000 + "x"}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_a_long_run_of_one_character_is_learned_and_encoded(run, bpe, gpt2):
    trained = make_tokenizer("bpe", f"{CORPUS}{run}\n{CORPUS}", 300)
    for tokenizer in (trained, bpe, gpt2):
        assert tokenizer.decode(tokenizer.encode(f"a{run}b")) == f"a{run}b"


def test_long_words_are_learned_in_seconds():
    """As in a file of DNA, or of base64 without a line break."""
    word = "".join(random.Random(0).choices("ACGT", k=1_000_000))
    tokenizer = make_tokenizer("bpe", word, 512)
    ids = tokenizer.encode(word)
    assert len(ids) < 400_000 and tokenizer.decode(ids) == word


def test_ids_of_ordinary_text_are_those_of_the_whole(bpe):
    for space in (" ", "\n", " \n\t"):
        text = CORPUS + "x" + (space * SPACES)[:SPACES - 1] + "x" + CORPUS
        assert list(bounded_pieces(text)) == [text]
        assert bpe.encode(text) == bpe.encoding.encode_ordinary(text)


def test_pieces_have_bounded_runs_and_join_to_the_text():
    run = " " * (3 * SPACES + 7)
    for text in (run, f"a{run}b{run}", "\n" + run + "\n"):
        pieces = list(bounded_pieces(text))
        assert "".join(pieces) == text and len(pieces) > 1
        assert max(len(found) for piece in pieces for found in re.findall(r"\s+", piece)) <= SPACES


# --- Refusals

@pytest.mark.parametrize("kind, vocab_size, named", [
    ("bpe", 255, "vocab_size=255 is too small"),
    ("bpe", 50_000, "vocab_size=50000 is more than this text yields: use at most [0-9]+$"),
    ("bpe", 1 << 40, "vocab_size=1099511627776 is more than this text yields"),
    ("word", 9, "tokenizer=word is not known"),
])
def test_tokenizer_that_cannot_be_is_refused(kind, vocab_size, named):
    with pytest.raises(ValueError, match=named):
        make_tokenizer(kind, CORPUS, vocab_size)


def test_the_greatest_vocabulary_that_a_refusal_names_can_be_had():
    with pytest.raises(ValueError) as error:
        make_tokenizer("bpe", CORPUS, 50_000)
    largest = int(str(error.value).split()[-1])
    assert make_tokenizer("bpe", CORPUS, largest).n_vocab == largest


def test_half_of_a_surrogate_pair_is_refused(bpe, hf):
    for tokenizer in (bpe, hf, make_tokenizer("char", CORPUS, 0)):
        with pytest.raises(ValueError, match=r"character '\\ud800' is [^\n]*: leave it out"):
            tokenizer.encode("\ud800")


def test_a_text_is_checked_by_each_of_its_characters(bpe):
    char = make_tokenizer("char", CORPUS, 0)
    check_text(char, CORPUS * 100)
    check_text(bpe, "".join(ODD))
    with pytest.raises(ValueError, match="'ß'"):
        check_text(char, CORPUS + "ß" + CORPUS)
    with pytest.raises(ValueError, match="ud800"):
        check_text(bpe, CORPUS + "\ud800")


# --- Prompts

def test_empty_prompt_starts_from_a_newline_where_there_is_one():
    assert prompt_ids(make_tokenizer("char", "ab\n", 0), "") == [0]
    assert prompt_ids(make_tokenizer("char", "xyz", 0), "") == [0]
    with pytest.raises(ValueError):
        prompt_ids(make_tokenizer("char", "xyz", 0), "a")


def test_prompt_loses_its_byte_order_mark(bpe):
    assert prompt_ids(bpe, "\ufeffTo be") == bpe.encode("To be")
    assert prompt_ids(bpe, "\ufeff") == bpe.encode("\n")


# --- JSON

@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_json_keeps_a_tokenizer(kind):
    first = make_tokenizer(kind, CORPUS, 280)
    again = from_json(json.loads(json.dumps(first.to_json())))
    assert again.kind == kind and again.n_vocab == first.n_vocab
    assert again.encode(CORPUS) == first.encode(CORPUS) and again.to_json() == first.to_json()


def damaged(tokenizer):
    """Values that are nearly a tokenizer's JSON."""
    bpe, tokens = tokenizer.to_json(), tokenizer.to_json()["tokens"]
    return {
        "no object": [],
        "nothing": None,
        "empty": {},
        "another kind": {"kind": "word"},
        "no chars": {"kind": "char"},
        "chars of another type": {"kind": "char", "chars": 3},
        "empty chars": {"kind": "char", "chars": ""},
        "a character twice": {"kind": "char", "chars": "abca"},
        "half of a surrogate pair": {"kind": "char", "chars": "a\ud800"},
        "no tokenizer": {"kind": "hf", "n_vocab": 3, "tokenizer": {"version": "1.0"}},
        "no vocabulary size": {"kind": "hf", "tokenizer": {}},
        "no tokens": {"kind": "bpe", "pattern": bpe["pattern"]},
        "a byte is missing": bpe | {"tokens": tokens[1:]},
        "a token twice": bpe | {"tokens": tokens + tokens[-1:]},
        "a token that is no text": bpe | {"tokens": tokens[:-1] + [3]},
        "a token that is no bytes": bpe | {"tokens": tokens[:-1] + ["日"]},
        "tokens that are no list": bpe | {"tokens": 5},
        "empty pattern": bpe | {"pattern": ""},
        "no pattern": bpe | {"pattern": None},
        "pattern that is none": bpe | {"pattern": "("},
    }


def test_damaged_json_is_refused_in_one_line(bpe):
    for name, value in damaged(bpe).items():
        with pytest.raises(ValueError) as error:
            from_json(value)
            pytest.fail(f"{name} was taken for a tokenizer")
        assert "\n" not in str(error.value)
