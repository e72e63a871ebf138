"""log.csv and loss.png of a run."""
import csv
from pathlib import Path

from data.files import atomic_open, read_utf8


class Log:
    """
    log.csv: a row for each step, with the figures of an evaluation where there was one. Bit for
    bit the same when a run is repeated.
    """

    def __init__(self, path, columns, step=0):
        """
        columns: figures of an evaluation. Keeps the rows before `step`, of a run that goes on; the
        file is touched by the first `add` only. Raises ValueError where it is damaged.
        """
        self.path, self.file = Path(path), None
        self.columns = ("step", "loss", "learning_rate", *columns)
        self.rows = [row for row in self.load(step) if int(row["step"]) < step] if step else []

    def load(self, step):
        """The rows of the file, or at least those before `step`; [] where there is none."""
        rows = []
        if not self.path.exists():
            return rows
        for number, line in enumerate(read_utf8(self.path).splitlines(keepends=True), 1):
            reached = bool(rows) and int(rows[-1]["step"]) >= step - 1
            if reached and not line.endswith("\n"):
                break  # a killed run may have left half a row, which is made again
            cells = line.strip().split(",")
            if number == 1 and cells == list(self.columns):
                continue
            if number == 1 or not is_row(cells, len(self.columns)):
                raise ValueError(f"{self.path}:{number} is damaged, or has other columns than this "
                                 "run: mend it, or move it away and the log begins anew")
            rows.append(dict(zip(self.columns, cells)))
        return rows

    def add(self, **row):
        """Raises OSError."""
        self.rows.append({name: repr(value) for name, value in row.items()})
        if self.file is None:  # the rows so far, whole or not at all; then one by one
            with atomic_open(self.path, "w", encoding="utf-8", newline="") as f:
                writer = csv.DictWriter(f, self.columns)
                writer.writeheader()
                writer.writerows(self.rows)
            self.file = open(self.path, "a", encoding="utf-8", newline="", buffering=1)
            return
        try:
            csv.DictWriter(self.file, self.columns).writerow(self.rows[-1])
        except OSError as e:
            raise OSError(f"{self.path} cannot be written: {e.strerror}") from None


def is_row(cells, n):
    """Whether the cells of a line are a row: n of them, first a step, then numbers or nothing."""
    try:
        [float(cell) for cell in cells if cell]
    except ValueError:
        return False
    return len(cells) == n and cells[0].isdecimal()


def plot_losses(log, path):
    """loss.png: the loss of each step, and what was evaluated."""
    from matplotlib.figure import Figure  # here, since it takes half a second
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for column in log.columns:
        points = [(int(row["step"]), float(row[column])) for row in log.rows if row.get(column)]
        if column in ("step", "learning_rate", "length", "pairs") or not points:
            continue
        steps, values = zip(*points)
        if column == "loss":
            axes.plot(steps, values, lw=0.5, color="0.7", label="loss of a batch")
        else:
            axes.plot(steps, values, marker="o", ms=3, label=column)
    axes.set(xlabel="steps", ylabel="nats per token, accuracy", ylim=(0, None))
    axes.legend()
    with atomic_open(path) as f:
        figure.savefig(f, dpi=120, format="png")
