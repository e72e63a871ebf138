"""Models of a few numbers for tests of lib/rivals.py and lib/measure.py, which bench.py uses."""
import torch

from lib.rivals import as_if_trained
from lm2 import LM2Config

VOCAB, CPU = 32, torch.device("cpu")
SIZE = dict(n_layer=2, n_head=2, n_embd=16, block_size=8)
FLOAT32 = torch.autocast("cpu", enabled=False)


def model(**kwargs):
    """A model whose head and memory are at work."""
    return as_if_trained(LM2Config(VOCAB, **{"mem_slots": 4} | SIZE | kwargs), CPU)


def idx(*shape):
    return torch.randint(VOCAB, shape)
