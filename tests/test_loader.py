"""data/loader.py: batches made ahead."""
from types import SimpleNamespace

import pytest
import torch

from data.loader import batches


class Counting:
    """A corpus whose batches say which ones they are."""
    place = 7

    def batch(self, config, step, part):
        return torch.tensor([step, part, self.place]), torch.tensor([config.seed])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_in_order_up_to_the_next_evaluation(num_workers):
    config = SimpleNamespace(num_workers=num_workers, seed=5, gradient_accumulation_steps=2, eval_interval=10, max_iters=23)
    found = [list(batches(Counting(), config, step, 1, 3, torch.device("cpu"))) for step in (7, 20)]
    for (first, end), part in zip(((7, 10), (20, 23)), found):  # the second of three processes: parts 1 and 1 + 3 of each update
        assert [x.tolist() for x, _ in part] == [[step, micro, 7] for step in range(first, end) for micro in (1, 4)]
        assert all(y.tolist() == [5] for _, y in part)
