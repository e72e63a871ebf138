"""
A memory learns in seconds a task that needs it, and answers from the segment that told the answer.

A symbol stands in the first segment between blanks, and is asked for 18 tokens later. Windows of 8
tokens need three blocks to reach that far (7 tokens each); the models have two.
"""
import pytest
import torch
from torch.nn import functional as F

from lib.optim import make_optimizers
from lib.trace import shares, trace
from lm2 import LM2, LM2Config

T = 8
SYMBOLS, BLANK, QUESTION, DISTANCE = 8, 8, 9, 2 * (T - 1) + 4


def recall_batch(rows=64):
    """-> idx (rows, T + DISTANCE), the position of each question, each answer"""
    position, answer = torch.randint(T, (rows,)), torch.randint(SYMBOLS, (rows,))
    idx, row = torch.full((rows, T + DISTANCE), BLANK), torch.arange(rows)
    idx[row, position], idx[row, position + DISTANCE] = answer, QUESTION
    return idx, position + DISTANCE, answer


def logits_of(model, idx, asked):
    """What a model answers where it is asked."""
    return model(idx)[0][torch.arange(len(idx)), asked]


def train_recall(memory, steps=150):
    """A model that was trained on the task."""
    torch.manual_seed(0)
    model = LM2(LM2Config(vocab_size=10, block_size=T, n_layer=2, n_head=2, n_embd=32, mem_slots=4,
                          memory=memory))
    optimizers = make_optimizers(model, 0.02, 5e-3, 0.0)
    for _ in range(steps):
        idx, asked, answer = recall_batch()
        F.cross_entropy(logits_of(model, idx, asked), answer).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def recall_accuracy(model):
    """The share of right answers; a guess is right 1 time in 8."""
    torch.manual_seed(1)
    idx, asked, answer = recall_batch()
    return (logits_of(model, idx, asked).argmax(-1) == answer).float().mean().item()


@pytest.fixture(scope="module")
def trained():
    return train_recall("lm2")


def test_memory_recalls_what_lies_beyond_every_window(trained):
    assert recall_accuracy(trained) > 0.95
    assert recall_accuracy(train_recall("none")) < 0.35


def test_a_trained_model_answers_from_the_segment_that_told_the_answer(trained):
    """The symbol stands in the first segment; the block whose bank gives most has it from there."""
    torch.manual_seed(1)
    idx, asked, answer = recall_batch(30)
    right = logits_of(trained, idx, asked).argmax(-1) == answer
    given = []  # by each segment, for each right answer
    for row in right.nonzero().flatten().tolist():
        found = trace(trained, idx[row, :asked[row] + 1])
        reads = {(bank.g_out[-1] * bank.E_mem[-1]).norm().item(): layer
                 for layer, bank in found.banks.items()}
        _, segments = shares(trained, found, reads[max(reads)], -1)
        given.append(segments[:2])  # all have two; how much is from where varies by machine
    first, second = torch.stack(given).mean(0)
    assert asked.min() >= 2 * T and len(given) > 20
    assert first > 0.5 and first > 2 * second
