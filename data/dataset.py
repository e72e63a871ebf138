"""What a data set offers train.py: `Text`, `Stories` or `Pairs`."""
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from torch import Tensor


class EvaluationBatch(NamedTuple):
    column: str      # the column of log.csv that its loss goes into
    x: Tensor        # (rows, L) int64, inputs
    y: Tensor        # (rows, L) int64, targets; -1 where nothing is to be predicted
    continues: bool  # it goes on where the batch before ended: the model's state is carried along
    tasks: list      # the task of each row, to count right answers by; [] for text
    repeats: Tensor | None = None  # (rows, S), how often each segment counts; None: once


class Dataset(Protocol):
    """
    What the training loop asks of its data. The loop runs the model; a data set only makes batches
    and says what the figures mean.
    """
    tokenizer: object    # as data/tokenizer.py describes it
    meta: dict           # as JSON: source, sha256, tokenizer, vocab_size, tokens {train, val}
    columns: tuple       # the figures of an evaluation, as columns of log.csv
    last_is_best: bool   # the last step is the best one, whatever its validation loss
    progress: object     # where in a curriculum, as JSON, kept in a checkpoint; None for text

    def batch(self, config, step, part) -> tuple[Tensor, Tensor, Tensor | None]:
        """
        Inputs and targets (rows, L) int64 of one part of a step, targets -1 where nothing is to be
        predicted, and how often each segment counts (rows, S), None where each does once; a pure
        function of config.seed, step, part and progress.
        """

    def evaluation_batches(self, config) -> Iterator[EvaluationBatch]:
        """The batches of an evaluation, the same ones each time as long as progress is the same."""

    def position(self) -> dict:
        """What a row of the log says of the progress: {"length": 512} for stories, {} for text."""

    def report(self, row) -> str:
        """A row of figures (position and columns) in words."""

    def advance(self, step, row, config) -> None:
        """After an evaluation, its figures in row: move on in the curriculum where it is time."""

    def example(self, model, device) -> str:
        """What the trained model writes, to end a run with."""
