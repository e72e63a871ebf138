"""
What look.py shows of a trace: a text, and what each of its tokens gave to the last one through the
memory. lib/trace_figure.py draws it, lib/trace_page.py writes it as a page.
"""
import re
from codecs import getincrementaldecoder
from typing import NamedTuple

import torch

from lib.experiment_tables import markdown
from lib.scores import select
from lib.trace import carried_on, contributions, effects
from lm2 import require

STILL = 0.01  # slots none of whose numbers moves so far are said never to change
NEAR = 60     # tokens before and behind what slots looked at, where its sentence's ends are sought
BEFORE, AFTER = 30, 14  # characters of that sentence before and behind it that are shown
SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s|$)|\n")
BEHIND = 4    # tokens behind a sentence that still count as a look at it
KINDS = {"support": "a supporting fact", "fact": "another fact", "text": "other text"}


class Mark(NamedTuple):
    """A sentence of a story in the text."""
    start: int  # its first token
    end: int    # and the one behind its last
    kind: str   # "fact", "support" (a fact the answer rests on), or "question"


def segment_behind(mark, T):
    """The segment, of T tokens, of the token behind a sentence: where it is complete."""
    return mark.end // T


class LastRead(NamedTuple):
    """What the last token read of a bank. The shares are those of lib/trace.py."""
    size: float            # norm of g_out * E_mem
    identity: float        # share of what the bank was at the start
    segments: list         # share of each segment before the last token's
    tokens: list           # and of each of their tokens, by where the slots looked
    weights: torch.Tensor  # (N, D) how much each number of the bank counted, sum 1


class Source(NamedTuple):
    """A segment that gave something, and where its slots looked most."""
    share: float
    segment: int
    text: str  # the sentence there; what slots looked at stands in [ ]


class View(NamedTuple):
    """A text that was read, and what is to be seen of it."""
    title: str
    subtitle: str
    words: list      # the tokens as text
    marks: list      # Marks
    block_size: int
    reads: dict      # {layer: LastRead}; there is none where `why` says so
    why: str
    layer: int       # the block that is shown: the one asked for, or whose bank gave most
    sources: list    # its Sources, the largest share first
    still: list      # the slots of that bank that never changed


def words_of(tokenizer, ids):
    """The text of each token; a character that ends in a later token belongs to that one."""
    decoder = getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(tokenizer.decode_bytes([token])) for token in ids]


def last_read(model, found, layer):
    """The LastRead of a block's bank. Raises ValueError where there is none."""
    parts = contributions(model, found, layer, -1)
    identity, *segments = parts.sum((1, 2)).tolist()
    bank = found.banks[layer]
    size = (bank.g_out[-1] * bank.E_mem[-1]).norm().item()
    weights = effects(model, found, layer, -1).abs()
    return LastRead(size, identity, segments, carried_on(found, layer, parts).tolist(),
                    weights / weights.sum())


def sentence_of(words, start, end):
    """
    The sentence around tokens start to end - 1, which stand in [ ], with one that ends up to BEHIND
    tokens before them; of a long one what is near, with "...".
    """
    begin, looked = max(0, start - BEHIND), "".join(words[start:end])
    far, behind = "".join(words[max(0, begin - NEAR):begin]), "".join(words[end:end + NEAR])
    before = SENTENCE_END.split(far)[-1].lstrip() + "".join(words[begin:start])
    ended = SENTENCE_END.search(looked + behind, len(looked))
    after = behind[:ended.start() - len(looked)] if ended else behind
    before = f"...{before[-BEFORE:]}" if len(before) > BEFORE else before
    after = f"{after[:AFTER].rstrip()}..." if len(after) > AFTER else after
    return " ".join(f"{before}[{looked}]{after}".split())


def sources_of(read, words, T):
    """The Sources of a LastRead, the largest share first; T tokens are a segment."""
    found = []
    for segment, share in enumerate(read.segments):
        tokens = [abs(part) for part in read.tokens[segment * T:(segment + 1) * T]]
        most = max(range(T), key=tokens.__getitem__)
        near = [i for i in range(T) if abs(i - most) <= 2 and tokens[i] >= tokens[most] / 4]
        start, end = segment * T + near[0], segment * T + near[-1] + 1
        while end < len(words) and not any(words[start:end]):  # the beginning of a character
            end += 1
        found.append(Source(share, segment, sentence_of(words, start, end)))
    return sorted(found, key=lambda source: source.share, reverse=True)


def make_view(model, tokenizer, found, marks, title, block=0):
    """
    The View of a Trace of a text with these Marks. It shows a block, from 1 on, 0: the one whose
    bank gave most. Raises ValueError for a text too short.
    """
    T, words = model.config.block_size, words_of(tokenizer, found.ids.tolist())
    require(len(words) > T, f"the text has {len(words)} tokens, and memory is first written after "
            f"{T}: give it a longer one")
    reads, why = {}, ""
    for layer in found.banks:
        try:
            reads[layer] = last_read(model, found, layer)
        except ValueError as e:
            why = str(e)
    most = max(reads, key=lambda layer: reads[layer].size, default=max(found.banks))
    layer = block - 1 if block else most
    require(not reads or layer in reads, f"block={layer + 1} reads nothing: use block={most + 1}")
    sources = sources_of(reads[layer], words, T) if reads else []
    bank = found.banks[layer].banks
    moved = (bank - bank[0]).abs().amax((0, 2))
    sees = {"window": f"Attention sees the last {T:,}, memory what came before.",
            "segment": "Attention sees those of the segment, memory what came before.",
            "full": "Attention sees all of them."}[model.config.attention]
    return View(
        " ".join(title.split()), f"{len(words):,} tokens in segments of {T:,}. {sees}",
        words, marks, T, reads, why, layer, sources, (moved < STILL).nonzero().flatten().tolist())


# --- Many of them

def kind_of(view):
    """
    What most of the last read came from -> a key of KINDS. What slots looked at from a sentence's
    second token on, where attention knows its first, up to BEHIND tokens behind it, where attention
    has gathered it, counts as that sentence's.
    """
    read, found = view.reads[view.layer], dict.fromkeys(KINDS, 0.0)
    for i, share in enumerate(read.tokens):
        kinds = [mark.kind for mark in view.marks if mark.start < i < mark.end + BEHIND
                 and mark.kind in KINDS]
        found[kinds[-1] if kinds else "text"] += share
    return max(found, key=found.get)


def first_tells(view):
    """Whether the segment that gave most has a supporting fact, or what comes right behind one."""
    first, T = view.sources[0].segment, view.block_size
    return any(mark.start // T <= first <= (mark.end + BEHIND - 1) // T
               for mark in view.marks if mark.kind == "support")


def count_table(rows):
    """How many right and wrong answers came mostly from what. rows: of look.csv -> Markdown"""
    lines = []
    for run, length in dict.fromkeys((row["run"], row["length"]) for row in rows):
        for name, is_right in (("right", "1"), ("wrong", "0")):
            found = select(rows, run=run, length=length, correct=is_right)
            counts = [len(found), *(len(select(found, source=kind)) for kind in KINDS)]
            is_known = not select(found, first_tells="")  # it was not always noted
            first = str(len(select(found, first_tells="1"))) if is_known else "–"
            lines.append([run, length, name, *map(str, counts), first])
    header = ["run", "length", "answers", "questions",
              *(f"from {what}" for what in KINDS.values()), "its segment gave most"]
    return markdown(header, lines, left=3)
