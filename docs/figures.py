"""
The picture of README.md: `python docs/figures.py` makes docs/babilong.png from results/qa1.csv.

Accuracy over the length of the text, a line for each model: the mean of three seeds, in a band
from the worst seed to the best. 1800 x 1000 pixels, to be shown at half of that: sharp anywhere.
"""
from io import BytesIO
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from tables import ROOT, load, of_seeds, replace, select, values

MODELS = {  # model in results/: its name here, its colour (after Okabe and Ito), its line
    "LM2, gates x 2": ("LM2, gates × 2", "#0072B2", "-"),
    "RAG": ("retrieval (RAG)", "#D08700", "--"),
    "LM2": ("LM2 as trained", "#3C9FE0", "-"),
    "RMT": ("RMT", "#009E73", "-"),
    "window": ("window, no memory", "#707070", "-"),
    "full attention": ("full attention", "#C2639A", "-"),
}
BOLD = "LM2, gates x 2"
LONGEST = "2k"  # the longest texts in training
GAP = 7         # points of accuracy between two names


def draw_model(axes, model, seeds, name_at):
    """
    A model's line and band, and its name. seeds: for each length the accuracies of its seeds;
    name_at: the height of its name beside the end of the line, or None: below the end.
    """
    name, color, style = MODELS[model]
    width, size, weight = (3.2, 7, "bold") if model == BOLD else (2, 4.5, "normal")
    x, y = range(len(seeds)), [mean(found) for found in seeds]
    axes.fill_between(x, [min(found) for found in seeds], [max(found) for found in seeds],
                      color=color, alpha=0.11, lw=0)
    axes.plot(x, y, style, color=color, lw=width, marker="o", ms=size, clip_on=False,
              zorder=4 if model == BOLD else 3)
    if name_at is None:
        axes.text(x[-1], y[-1] - 5, name, color=color, ha="center", va="top")
    else:
        axes.plot([x[-1] + 0.12, x[-1] + 0.28], [y[-1], name_at], color=color, lw=1, clip_on=False)
        axes.text(x[-1] + 0.35, name_at, name, color=color, va="center", weight=weight)


def draw(axes, rows):
    """All models. The names of those that were asked to the end stand in a column, GAP apart."""
    lengths, height = values(rows, "length"), None
    for model in MODELS:
        seeds = [of_seeds(select(rows, model=model, length=length)) for length in lengths]
        seeds = [found for found in seeds if found]  # full attention reads no further than 16k
        name_at = None
        if len(seeds) == len(lengths):
            end = mean(seeds[-1])
            name_at = height = end + 2 if height is None else min(end, height - GAP)
        draw_model(axes, model, seeds, name_at)


def decorate(axes, lengths):
    """Axes, grid, and where training ends."""
    last, border = len(lengths) - 1, lengths.index(LONGEST) + 0.5
    axes.set(xlim=(-0.15, last + 0.05), ylim=(0, 103), xlabel="tokens of text",
             ylabel="accuracy in %", xticks=range(len(lengths)), xticklabels=lengths)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E4E4E4", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.axvline(border, color="#444444", lw=1, ls=(0, (4, 3)))
    style = dict(y=106, color="#444444", fontsize=9.5, va="center")
    axes.text(border - 0.12, s="lengths of training", ha="right", **style)
    axes.text(border + 0.12, s="longer than any text in training", ha="left", **style)
    axes.plot(border, 106, "|", color="#444444", clip_on=False, ms=9)


def main():
    rows = load("results/qa1.csv")
    plt.rcParams.update({"font.size": 11, "text.color": "#222222", "axes.labelcolor": "#222222",
                         "xtick.color": "#222222", "ytick.color": "#222222",
                         "axes.edgecolor": "#999999"})
    figure, axes = plt.subplots(figsize=(9, 5), dpi=200, facecolor="white")
    figure.subplots_adjust(left=0.075, right=0.785, top=0.79, bottom=0.115)
    draw(axes, rows)
    decorate(axes, values(rows, "length"))
    figure.text(0.075, 0.945, "Where is Mary? One fact, hidden in ever longer text",
                size=14, weight="bold", va="center")
    millions = int(rows[0]["parameters"]) / 1e6
    figure.text(0.075, 0.888, f"BABILong qa1, {millions:.1f} million parameters, trained in "
                "minutes on a CPU; mean of three seeds, band: worst to best",
                size=9.5, va="center", color="#444444")
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    picture = picture.quantize(256, dither=Image.Dither.NONE)  # 256 colours: a third of the bytes
    file = BytesIO()
    picture.save(file, "png", optimize=True)
    replace(ROOT / "docs" / "babilong.png", file.getvalue())


if __name__ == "__main__":
    main()
