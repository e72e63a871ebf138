"""
What look.py shows of a trace: a text, and what each of its tokens gave to the last one through the
memory. lib/trace_figure.py draws it, lib/trace_page.py writes it as a page.
"""
from codecs import getincrementaldecoder
from typing import NamedTuple

from lib.experiment_tables import markdown
from lib.scores import select, values
from lib.trace import shares, token_shares

STILL = 0.01  # slots none of whose numbers moves so far are said never to change
SOURCES = {"support": "a supporting fact", "fact": "another fact", "text": "other text"}


class Mark(NamedTuple):
    """A sentence of a story in the text."""
    start: int  # its first token
    end: int    # and the one behind its last
    kind: str   # "fact", "support" (a fact the answer rests on), or "question"


class Gift(NamedTuple):
    """What the bank of a block gave to the last token. The shares are those of lib/trace.py."""
    size: float      # norm of g_out * E_mem
    identity: float  # share of what the bank was at the start
    segments: list   # share of each segment before the last token's
    tokens: list     # and of each of their tokens, by where the slots looked


class Look(NamedTuple):
    """A segment that gave something, and where its slots looked most."""
    share: float
    segment: int
    text: str  # what slots looked at stands in [ ], with the text around it


class View(NamedTuple):
    """A text that was read, and what is to be seen of it."""
    title: str
    subtitle: str
    words: list      # the tokens as text
    marks: list      # Marks
    block_size: int
    gifts: dict      # {layer: Gift}; there is none where `why` says so
    why: str
    layer: int       # the block whose bank gave most, or the last bank
    looks: list      # its Looks, the largest share first
    still: list      # the slots of that bank that never changed


def words_of(tokenizer, ids):
    """The text of each token; a character that ends in a later token belongs to that one."""
    decoder = getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(tokenizer.decode_bytes([token])) for token in ids]


def gift(model, found, layer):
    """The Gift of a block's bank. Raises ValueError where there is none."""
    identity, segments = shares(model, found, layer, -1)
    bank = found.banks[layer]
    size = (bank.g_out[-1] * bank.E_mem[-1]).norm()
    tokens = token_shares(model, found, layer, -1)
    return Gift(size.item(), identity.item(), segments.tolist(), tokens.tolist())


def looks_of(gift, words, T):
    """The Looks of a Gift, the largest share first; T tokens are a segment."""
    looks = []
    for segment, share in enumerate(gift.segments):
        tokens = [abs(share) for share in gift.tokens[segment * T:(segment + 1) * T]]
        most = max(range(T), key=tokens.__getitem__)
        near = [i for i in range(T) if abs(i - most) <= 2 and tokens[i] >= tokens[most] / 4]
        start, end = segment * T + near[0], segment * T + near[-1] + 1
        before, after = "".join(words[max(0, start - 40):start]), "".join(words[end:end + 20])
        text = f"{before[-45:]}[{''.join(words[start:end])}]{after[:12]}"
        looks.append(Look(share, segment, " ".join(text.split())))
    return sorted(looks, reverse=True)


def make_view(model, tokenizer, found, marks, title):
    """The View of a Trace of a text with these Marks."""
    T, words = model.config.block_size, words_of(tokenizer, found.ids.tolist())
    gifts, why = {}, ""
    for layer in found.banks:
        try:
            gifts[layer] = gift(model, found, layer)
        except ValueError as e:
            why = str(e)
    layer = max(gifts, key=lambda layer: gifts[layer].size, default=max(found.banks))
    looks = looks_of(gifts[layer], words, T) if gifts else []
    bank = found.banks[layer].banks
    moved = (bank - bank[0]).abs().amax((0, 2))
    sees = (f"Attention sees the last {T:,}, memory what came before."
            if model.config.attention == "window" else "Attention sees all of them.")
    return View(
        title, f"{len(words):,} tokens in segments of {T:,}. {sees}",
        words, marks, T, gifts, why, layer, looks, (moved < STILL).nonzero().flatten().tolist())


# --- Many of them

def source_of(view):
    """
    What stands in the segment that gave most to the answer -> a key of SOURCES. A sentence counts
    with the token behind it, where slots find what attention has gathered.
    """
    T, most = view.block_size, view.looks[0].segment
    kinds = {mark.kind for mark in view.marks if mark.start // T <= most <= mark.end // T}
    return next((kind for kind in ("support", "fact") if kind in kinds), "text")


def count_table(rows):
    """How many right and wrong answers came mostly from what. rows: of look.csv -> Markdown"""
    lines = []
    for length in values(rows, "length"):
        for name, is_right in (("right", True), ("wrong", False)):
            found = [row["source"] for row in select(rows, length=length)
                     if (row["answer"] == row["right"]) == is_right]
            counts = [found.count(source) for source in SOURCES]
            lines.append([length, name, *map(str, [len(found), *counts])])
    header = ["length", "answers", "questions", *(f"from {what}" for what in SOURCES.values())]
    return markdown(header, lines, left=2)
