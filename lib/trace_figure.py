"""
The picture of look.py: which segments an answer comes from, what each block writes and keeps, which
slots the last tokens ask, and what a bank holds.
"""
import warnings

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator

from lib.figure import COLORS, PALE, STYLE, clean, new_figure, png_of
from lib.trace import read_weights
from lib.view import segment_behind

HEIGHT = 9.6                          # inches
TITLE = 72                            # characters of a title in full size; longer ones are smaller
LEFT, MIDDLE = 0.085, 0.57            # where axes begin, as shares of the width
SUPPORT, FACT = COLORS[6], "#9A9A9A"  # facts that the answer rests on, and the others
BLUES = LinearSegmentedColormap.from_list("blues", ["#FFFFFF", COLORS[0]])
LABELS = 3                            # places in the text that are named beside their shares
LEAST = 0.1                           # share that is named
TOKENS_SHOWN = 16                     # of the last ones, in the picture of their reads
BLOCKS_NAMED = 5                      # beside their gates, for more there is no room
SEGMENTS_NAMED = 100                  # by whom their facts are about, for more there is no room


def draw(model, found, view):
    """The View (lib/view.py) of a Trace -> the bytes of a PNG."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a text may be in any script
        figure = new_figure(HEIGHT)
        size = 14 * TITLE / max(TITLE, len(view.title))
        put(figure, 0.97, view.title, size=size, weight="bold")
        put(figure, 0.945, view.subtitle, size=9.5, color=PALE)
        draw_shares(figure, view)
        over = "what the last token reads" if view.reads else "the bank"
        shown = f"gate, white 0, blue 1, mean over {over}"
        g_in = {layer: bank.g_in for layer, bank in found.banks.items()}
        g_forget = {layer: bank.g_forget for layer, bank in found.banks.items()}
        draw_gates(figure, 0.565, view, g_in, f"What is written: input {shown}")
        draw_gates(figure, 0.43, view, g_forget, f"What is kept: forget {shown}")
        draw_reads(figure, model, found, view)
        draw_banks(figure, found, view)
        legend(figure, view)
        return png_of(figure)


def legend(figure, view):
    """What the marks below the axes mean."""
    for x, kind, color, text in ((0.70, "support", SUPPORT, "supporting fact"),
                                 (0.86, "fact", FACT, "another fact")):
        if any(mark.kind == kind for mark in view.marks):
            put(figure, 0.945, "\u25b2", x=x, size=9, color=color)
            put(figure, 0.945, text, x=x + 0.017, size=9, color=PALE)


def put(figure, y, text, x=0.02, **style):
    figure.text(x=x, y=y, s=text, va="center", **style)


def segments_axes(figure, bottom, height, view, title):
    """Axes over segments; below are marked those of the tokens behind the story's sentences."""
    axes = figure.add_axes((LEFT, bottom, 0.81, height))
    put(figure, bottom + height + 0.016, title, size=10.5, weight="bold")
    n_segments = len(view.words) // view.block_size
    axes.set_xlim(-0.5, n_segments - 0.5)
    for kind, color in (("fact", FACT), ("support", SUPPORT)):
        x = [segment_behind(mark, view.block_size) for mark in view.marks if mark.kind == kind]
        x = [segment for segment in x if segment < n_segments]  # the last one is not yet written
        axes.plot(x, np.full(len(x), -0.05), "^", transform=axes.get_xaxis_transform(), ms=6,
                  color=color, clip_on=False, zorder=5)
    axes.tick_params(length=0, pad=10, labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(min(8, n_segments), integer=True, min_n_ticks=1))
    return axes


# --- Which segments the answer comes from

def draw_shares(figure, view):
    axes = segments_axes(figure, 0.72, 0.175, view, "Where the answer comes from: what its token "
                         f"read, by the segment that wrote it (block {view.layer + 1})")
    clean(axes, "y")
    if not view.reads:
        axes.set_xlabel("segment", size=9, labelpad=1)
        axes.text(0.5, 0.5, view.why, transform=axes.transAxes, ha="center", color=PALE)
        axes.set_yticks([])
        return
    axes.set_xlabel("segment; what its slots looked at most stands in [ ]", size=9, labelpad=1)
    shares = 100 * np.asarray(view.reads[view.layer].segments)
    axes.bar(range(len(shares)), shares, color=COLORS[0], width=0.8)
    axes.set_ylim(min(0, shares.min() * 1.1), max(100, shares.max() * 1.1))
    axes.set_ylabel("share in %", size=9)
    named = [source for source in view.sources[:LABELS] if source.share >= LEAST]
    if len(shares) <= SEGMENTS_NAMED:
        name_facts(axes, view, shares, {source.segment for source in named})
    for rank, source in enumerate(named):
        x = source.segment
        left = x < len(shares) / 2
        color = SUPPORT if rank == 0 else PALE
        axes.annotate(f"{source.share:.0%}  {source.text}",
                      (x, shares[x]), xytext=(12 if left else -12, 90 - 18 * rank),
                      textcoords=("offset points", "data"), ha="left" if left else "right",
                      va="center", size=9.5, color=color,
                      arrowprops={"arrowstyle": "-", "color": color, "lw": 0.8,
                                  "relpos": (0 if left else 1, 0.5)})


def name_facts(axes, view, shares, named):
    """Whom or what each segment's facts are about, their first words; not of named segments."""
    about = {}
    for mark in view.marks:
        segment = segment_behind(mark, view.block_size)
        if mark.kind != "question" and segment < len(shares) and segment not in named:
            first_word = "".join(view.words[mark.start:mark.end]).split()[0]
            about.setdefault(segment, []).append(first_word)
    for segment, words in about.items():
        axes.text(segment, 3 + max(0, shares[segment]), ", ".join(words), rotation=90,
                  ha="center", va="bottom", size=8, color=PALE)


# --- What is written and kept

def draw_gates(figure, bottom, view, gates, title):
    """gates: {layer: (S, N, D)}, each number of a bank weighted as the last token reads it."""
    axes = segments_axes(figure, bottom, 0.075, view, title)
    rows, layers = [], list(gates)
    for layer, gate in gates.items():
        read = view.reads.get(layer)
        rows.append((gate * read.weights).sum((1, 2)) if read else gate.mean((1, 2)))
    axes.imshow(np.stack(rows), aspect="auto", cmap=BLUES, vmin=0, vmax=1, interpolation="nearest")
    named = range(0, len(rows), -(-len(rows) // BLOCKS_NAMED))
    axes.set_yticks(named, [f"block {layers[i] + 1}" for i in named])
    right = axes.twinx()
    right.set_ylim(axes.get_ylim())
    right.tick_params(length=0, labelsize=8, labelcolor=PALE)
    right.set_yticks(named, [f"{rows[i].min():.2f} to {rows[i].max():.2f}" for i in named])


# --- Who reads what

def draw_reads(figure, model, found, view):
    """The last tokens' reads of the bank before and after the segment that matters (Figure 6)."""
    first = view.marks[-1].start if view.marks else 0  # of the question
    tokens = slice(max(first, len(view.words) - TOKENS_SHOWN), len(view.words))
    put(figure, 0.365, f"Who reads what, block {view.layer + 1}: the last tokens and the slots",
        size=10.5, weight="bold")
    last = len(found.banks[view.layer].banks) - 1
    segment = view.sources[0].segment if view.sources else last - 1
    pictures = [read_weights(model, found, view.layer, tokens, s).mean(-1).numpy()
                for s in (segment, segment + 1)]
    most = max(picture.max() for picture in pictures)
    for i, (weights, when) in enumerate(zip(pictures, ("before", "after"))):
        axes = figure.add_axes((LEFT + 0.225 * i, 0.065, 0.2, 0.255))
        axes.imshow(weights, aspect="auto", cmap=BLUES, vmin=0, vmax=most, interpolation="nearest")
        axes.set_title(f"{when} segment {segment}", size=9, color=PALE)
        axes.set_xlabel("slot", size=9)
        axes.tick_params(length=0, labelsize=8)
        words = [" ".join(word.split()) for word in view.words[tokens]] if i == 0 else []
        axes.set_yticks(range(len(words)), words)


# --- What the slots hold

def draw_banks(figure, found, view):
    """The bank of the block as an image, after chosen segments."""
    put(figure, 0.365, f"What the slots hold, block {view.layer + 1}", x=MIDDLE, size=10.5,
        weight="bold")
    banks = found.banks[view.layer].banks
    last = len(banks) - 1
    chosen = sorted({0, view.sources[0].segment + 1 if view.sources else last, last})
    width = 0.4 / len(chosen)
    for i, s in enumerate(chosen):
        axes = figure.add_axes((MIDDLE + width * i, 0.065, width - 0.012, 0.255))
        axes.imshow(banks[s].numpy(), aspect="auto", cmap="RdBu", vmin=-1, vmax=1,
                    interpolation="nearest")
        axes.set_title("at the start" if s == 0 else f"after segment {s - 1}", size=9, color=PALE)
        axes.set_xlabel("width", size=9)
        axes.tick_params(length=0, labelsize=8)
        if i:
            axes.set_yticks([])
    if view.still:
        still = ", ".join(map(str, view.still))
        put(figure, 0.015, f"never changed: slots {still}", x=MIDDLE, size=9, color=PALE)
