"""
A task that needs memory, learned in seconds: a symbol stands in the first segment between blanks,
and is asked for 18 tokens later. Windows of 8 tokens need three blocks to reach that far (7 tokens
each); the models have two.
"""
import torch
from torch.nn import functional as F

from lib.optim import make_optimizers
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
    return model


def recall_accuracy(model):
    """The share of right answers; a guess is right 1 time in 8."""
    idx, asked, answer = recall_batch()
    return (logits_of(model, idx, asked).argmax(-1) == answer).float().mean().item()
