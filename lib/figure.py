"""
The picture of an experiment: accuracy over the length of the text, a line for each row. Where
losses alone were measured, or a single length, each seed is a dot beside its row's name. A loss can
be shown over the tokens of training instead; and accuracies of tasks as bars.

1800 x 1000 pixels (dots: as high as they need), to be shown at half of that: sharp anywhere.
"""
from io import BytesIO
from statistics import mean
from textwrap import fill

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image

from data.files import atomic_open
from lib import scores
from lib.scores import select, values

# After Okabe and Ito, whom the colour-blind can tell apart; darker, since words have them, too
COLORS = ("#0072B2", "#009E73", "#D08700", "#C2639A", "#707070", "#3C9FE0", "#D55E00", "#8A7A00")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))  # of eight rows each; the last also of all others
INK, PALE, GRID = "#222222", "#555555", "#E4E4E4"
STYLE = {"font.size": 11, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK,
         "ytick.color": INK, "axes.edgecolor": "#999999", "text.parse_math": False}
WIDTH, DPI = 9, 200  # inches, pixels an inch


def plot(rows, path, title, log=(), curve="", current=None):
    """
    Draw an experiment's rows, as lib/measured.py has them, into a PNG, which appears whole or not
    at all. log, curve: the evaluations of its runs, and the column to show over tokens, if any.
    current: see scores.by_run.
    Raises ValueError where there are no rows, OSError.
    """
    if not rows:
        raise ValueError(f"{path} cannot be drawn: nothing was measured yet")
    named = scores.by_run(rows, current)
    curves = curves_of(rows, named, log, curve)
    with matplotlib.rc_context(STYLE):
        if curves:
            figure = draw_curves(curves, curve)
            each_seed = "band: worst to best"
        elif len(scores.lengths_of(rows)) > 1:
            figure = draw_accuracy(named)
            each_seed = "band: worst to best"
        else:
            figure = draw_dots(named)
            each_seed = "a dot for each seed"
        write(figure, path, title, subtitle(named, each_seed))


def write(figure, path, title, about):
    """Put a title and a line about it above a figure, and all of it into a PNG. Raises OSError."""
    height, style = figure.get_figheight(), {"x": 0.02, "va": "center"}
    figure.text(y=1 - 0.28 / height, s=title, size=14, weight="bold", **style)
    figure.text(y=1 - 0.56 / height, s=about, size=9.5, color=PALE, **style)
    png = png_of(figure)
    with atomic_open(path) as f:
        f.write(png)


def subtitle(rows, each_seed):
    """What was measured, in a line. each_seed: how the picture shows the seeds."""
    parts, tasks = [], [task for task in values(rows, "task") if task]
    if tasks:
        some = f"mean of {len(tasks)} tasks" if len(tasks) > 1 else tasks[0]
        parts.append(f"BABILong, {some}")
    sizes = [int(row["parameters"]) / 1e6 for row in rows if row["parameters"]]
    if sizes:
        low, high = (f"{size:.{1 if size >= 1 else 2}f}" for size in (min(sizes), max(sizes)))
        parts.append(f"{low} million parameters" if low == high else
                     f"{low} to {high} million parameters")
    n = max(len(values(select(rows, row=name), "seed")) for name in values(rows, "row"))
    if n > 1:
        parts.append(f"mean of {n} seeds, {each_seed}")
    return "; ".join(parts)


def new_figure(height):
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)  # it knows how large a text is
    return figure


def png_of(figure):
    """The bytes of a PNG of 256 colours, a third of what all colours would need."""
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    file = BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return file.getvalue()


def color_of(i):
    return COLORS[i % len(COLORS)]


def clean(axes, grid):
    """Axes without frame and ticks, with pale lines along one direction, x or y."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


# --- Lines: accuracy over length, or what was evaluated over tokens

def draw_line(axes, names, name, x, y, low, high):
    """The line of one of several names, in a band from low to high."""
    i = names.index(name)
    dashes = DASHES[min(i // len(COLORS), len(DASHES) - 1)]
    axes.fill_between(x, low, high, color=color_of(i), lw=0, alpha=min(0.12, 0.8 / len(names)))
    axes.plot(x, y, color=color_of(i), ls=dashes, lw=2 if i else 3.2, marker="o",
              ms=4.5 if i else 7, zorder=3 if i else 4, clip_on=False, label=name)


def draw_accuracy(rows):
    """A line for each row, the mean of its seeds, in a band from the worst seed to the best."""
    figure, lengths, ends = new_figure(5), scores.lengths_of(rows), {}
    axes = figure.add_axes((0.075, 0.115, 0.7, 0.725))
    axes.set(xlim=(-0.15, len(lengths) - 0.95), ylim=(0, 103), xlabel="tokens of text",
             ylabel="accuracy in %", xticks=range(len(lengths)), xticklabels=lengths)
    clean(axes, "y")
    names = values([row for row in rows if row["length"]], "row")
    for name in names:
        cells = [select(rows, row=name, length=length) for length in lengths]
        x = [place for place, cell in enumerate(cells) if cell]
        found = [scores.accuracy(cell) for cell in cells if cell]
        y = [accuracy.mean for accuracy in found]
        low, high = ([extreme(a.seeds or [a.mean]) for a in found] for extreme in (min, max))
        draw_line(axes, names, name, x, y, low, high)
        ends[name] = x[-1], y[-1]
    put_names(axes, ends, len(lengths) - 2)
    return figure


def curves_of(rows, named, log, column):
    """
    {name: {tokens: [figure of each seed]}} of a column of a log, without that of the first step.
    named: the rows with the names that they have in tables.
    """
    names = {(row["row"], row["seed"]): new["row"] for row, new in zip(rows, named)}
    curves = {}
    for line in log:
        name, tokens = names.get((line["row"], line["seed"])), int(line.get("tokens") or 0)
        if name and tokens and line.get(column):
            curve = curves.setdefault(name, {})
            curve.setdefault(tokens, []).append(float(line[column]))
    return curves


def draw_curves(curves, column):
    """A line for each row over the tokens of training: the mean of its seeds, in their band."""
    figure, ends = new_figure(5), {}
    axes = figure.add_axes((0.075, 0.115, 0.7, 0.725))
    for name, curve in curves.items():
        x = sorted(curve)
        y, low, high = ([some(curve[tokens]) for tokens in x] for some in (mean, min, max))
        draw_line(axes, list(curves), name, x, y, low, high)
        ends[name] = x[-1], y[-1]
    last = max(x for x, _ in ends.values())
    axes.set(xlim=(0, 1.01 * last), ylim=axes.get_ylim(), xlabel="tokens of training",
             ylabel=column)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    clean(axes, "y")
    put_names(axes, ends, 0.9 * last)
    return figure


def put_names(axes, ends, far):
    """
    Names at the ends of their lines, {name: (x, y)}, in the lines' colours. Those of lines that end
    at x = far or behind stand in a column on the right, the others at the nearest place where
    nothing is.
    """
    texts, last = {}, max(x for x, _ in ends.values())
    for i, name in enumerate(ends):
        weight = "normal" if i else "bold"
        texts[name] = axes.text(0, 0, name, color=color_of(i), weight=weight, va="center", zorder=6)
    column = [name for name, (x, _) in ends.items() if x >= far]
    box = axes.get_window_extent()
    for size in np.arange(11, 5, -0.5):  # the column gets at most 40% of the picture
        for text in texts.values():
            text.set_size(size)
        width, height = np.max([size_of(texts[name]) for name in column], axis=0)
        if width < 0.4 * WIDTH * DPI and height * len(column) < box.height:
            break
    left, bottom, _, tall = axes.get_position().bounds
    axes.set_position((left, bottom, 1 - left - (width + 85) / (WIDTH * DPI), tall))
    pixel = np.ptp(axes.get_xlim()) / axes.get_window_extent().width  # its width in units of x
    bottom, top = axes.get_ylim()
    gap = 1.1 * height * (top - bottom) / box.height                  # from name to name
    heights = spread([ends[name][1] for name in column], gap,
                     low=bottom - 0.04 * (top - bottom), high=top + 0.01 * (top - bottom))
    for name, y in zip(column, heights):
        texts[name].set_position((last + 70 * pixel, y))
        lead(axes, name, ends[name], (last + 60 * pixel, y), 18 * pixel)
    drawn = points_of(axes)
    for name in ends:
        if name not in column:
            own = put_where_nothing_is(axes, name, texts[name], ends[name], drawn)
            drawn = np.concatenate([drawn, own])


def lead(axes, name, end, to, space):
    """A thin line from the end of a name's line to its name."""
    line = next(line for line in axes.lines if line.get_label() == name)
    axes.plot([end[0] + space, to[0]], [end[1], to[1]], color=line.get_color(), lw=1.2,
              ls=line.get_linestyle(), clip_on=False)


def size_of(text):
    """Width and height of a text in pixels."""
    box = text.get_window_extent()
    return box.width, box.height


def spread(wanted, gap, low, high):
    """
    Heights near the wanted ones and in the same order, at least a gap apart, between low and high
    if all fit there: where names would touch, they stand as one block around their middle.
    """
    order = sorted(range(len(wanted)), key=lambda i: -wanted[i])  # from above; equal ones as given
    blocks = []  # lists of heights that would be equal if each were moved up by its gaps
    for place, i in enumerate(order):
        blocks.append([wanted[i] + place * gap])
        while len(blocks) > 1 and mean(blocks[-2]) < mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    found, place = [0.0] * len(wanted), 0
    for block in blocks:
        for _ in block:
            lowest = low + (len(wanted) - 1 - place) * gap
            height = min(max(mean(block) - place * gap, lowest), high - place * gap)
            found[order[place]] = height
            place += 1
    return found


def points_of(axes):
    """Points all along the lines of the axes, in pixels (n, 2)."""
    found = [np.zeros((0, 2))]
    for line in axes.lines:
        corners = axes.transData.transform(line.get_xydata())
        steps = np.linspace(0, 1, 50)[:, None]
        found += [a + steps * (b - a) for a, b in zip(corners, corners[1:])]
    return np.concatenate(found)


def put_where_nothing_is(axes, name, text, end, drawn):
    """Put a name near the end of its line, away from the points drawn -> points of its own."""
    text.set_horizontalalignment("center")
    size, frame = np.array(size_of(text)), axes.get_window_extent()
    start, to_data = axes.transData.transform(end), axes.transData.inverted().transform

    def cost(way):
        """Points behind the name are worse than a long way; outside of the axes it is not seen."""
        low, high = start + way - size / 2 - 8, start + way + size / 2 + 8
        behind = ((low < drawn) & (drawn < high)).all(axis=1).sum()
        outside = (low < frame.min).any() or (high > frame.max).any()
        return behind + (1000 if outside else 0) + np.hypot(*way) / size[1]

    aside, up = size[0] / 2 + 20, size[1] / 2
    ways = [np.array([x, y * up]) for x in (aside, 0, -aside) for y in range(-20, 21)
            if x or abs(y) > 2]
    middle = start + min(ways, key=cost)
    text.set_position(to_data(middle))
    nearest = start.clip(middle - size / 2 - 5, middle + size / 2 + 5)
    if np.hypot(*(nearest - start)) > 1.5 * size[1]:
        lead(axes, name, end, to_data(nearest), 0)
    grid = np.stack(np.meshgrid(*[np.linspace(-0.5, 0.5, 20)] * 2), axis=-1).reshape(-1, 2)
    return middle + grid * size


# --- Dots

def panels_of(rows):
    """{what was measured: {row: [the figure of each seed, None where there is none]}}"""
    panels = {}
    for name in values(rows, "row"):
        own = select(rows, row=name)
        for length in scores.lengths_of(own):
            seeds = scores.accuracy(select(own, length=length)).seeds
            panels.setdefault(f"accuracy in % at {length}", {})[name] = seeds
        for measure in scores.measures_of(own):
            found = scores.figures(select(own, length="", measure=measure))
            panels.setdefault(measure, {})[name] = list(found.values())
    return panels


def draw_dots(rows):
    """A panel for each measure: a line for each row, a dot for each seed, a bar for the mean."""
    names, panels = values(rows, "row"), panels_of(rows)
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    figure = new_figure(0.75 + down * (0.8 + 0.3 * len(names)))
    grid = figure.subplots(down, across, sharey=True, squeeze=False)
    for axes, (measure, found) in zip(grid.flat, panels.items()):
        draw_panel(axes, names, measure, found)
    for axes in grid.flat[len(panels):]:
        axes.set_visible(False)
    grid[0, 0].set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
    for axes in grid[:, 0]:
        for i, label in enumerate(axes.get_yticklabels()):
            label.set(color=color_of(i), weight="normal" if i else "bold")
    widest = max(size_of(label)[0] for label in grid[0, 0].get_yticklabels())
    height = figure.get_figheight()
    figure.subplots_adjust(left=0.035 + widest / (WIDTH * DPI), right=0.93, wspace=0.35,
                           top=1 - 1.2 / height, bottom=0.35 / height, hspace=2.5 / len(names))
    return figure


def draw_panel(axes, names, measure, found):
    """One measure: found is {row: figures of its seeds}. The mean stands beside as a number."""
    axes.set_title(fill(measure, 28), size=10, loc="left")
    clean(axes, "x")
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.tick_params("x", labelsize=9)
    axes.margins(x=0.1)
    for i, name in enumerate(names):
        known = [figure for figure in found.get(name, []) if figure is not None]
        axes.plot(known, [i] * len(known), "o", color=color_of(i), ms=6, alpha=0.45, mew=0)
        if known and len(known) == len(found[name]):
            axes.plot(mean(known), i, "|", color=color_of(i), ms=15, mew=2.5)
            number = f"{mean(known):.0f}" if mean(known) >= 10 else f"{mean(known):.3f}"
            axes.text(1.03, i, number, color=color_of(i), size=10, va="center",
                      weight="normal" if i else "bold", transform=axes.get_yaxis_transform())


# --- Bars

def plot_bars(bars, path, title, about):
    """
    Draw accuracies in %, {row: {group: accuracy}}, into a PNG. about: a line below the title.
    Raises OSError.
    """
    with matplotlib.rc_context(STYLE):
        write(draw_bars(bars), path, title, about)


def draw_bars(bars):
    """A bar for each row in each group, its number above it."""
    figure, width = new_figure(4.5), 0.88 / len(bars)
    axes = figure.add_axes((0.075, 0.13, 0.905, 0.63))
    for i, (name, groups) in enumerate(bars.items()):
        x = np.arange(len(groups)) + (i - (len(bars) - 1) / 2) * width
        drawn = axes.bar(x, groups.values(), 0.92 * width, color=color_of(i), label=name)
        axes.bar_label(drawn, fmt="%.0f", color=color_of(i), size=8.5, padding=1)
    axes.set(ylim=(0, 103), ylabel="accuracy in %", xticks=range(len(groups)), xticklabels=groups)
    axes.tick_params("x", labelsize=10.5)
    clean(axes, "y")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.07), ncols=len(bars), frameon=False,
                labelcolor="linecolor", handlelength=0.8, borderpad=0, borderaxespad=0)
    return figure
