"""
The baseline: the Recurrent Memory Transformer (RMT, Bulatov et al. 2022, arXiv 2207.06881), as a decoder (Bulatov et al. 2024,
arXiv 2402.10790), on the blocks of lm2.py.

A segment of T tokens runs through the whole stack between two copies of m memory tokens:

    [ m read tokens ; T text tokens ; m write tokens ]

What comes out at the write tokens is the memory of the next segment, and gradients flow through it into the segment before.
Memory is the only way from segment to segment: so segments run one after the other, where LM2 runs them all at once.

Shapes as in lm2.py, and m = mem_slots.
"""
from typing import NamedTuple

import torch
import torch.nn as nn

from lm2 import LM2, attend, rope_angles


class RMTState(NamedTuple):
    """What lies behind a token. Its size depends on the place in the segment only, not on the number of tokens seen."""
    pos: int                                         # tokens seen so far
    memory: torch.Tensor                             # (B, m, D) the memory tokens of the segment that pos lies in
    layers: list[tuple[torch.Tensor, torch.Tensor]]  # of each block, keys and values (B, m + pos % T, n_kv_head, hs) of the
                                                     # unfinished segment, its read tokens first; [] between two segments


class RMT(LM2):
    """LM2Config with memory="rmt"; mem_slots is m. `attention` means nothing here: a token never sees the segment before."""

    def __init__(self, config):
        """Raises ValueError on a config with another memory."""
        if config.memory != "rmt":
            raise ValueError(f"memory={config.memory} is not for RMT: use memory=rmt")
        super().__init__(config)
        # the first segment's memory tokens stand among embeddings, so they are drawn as embeddings are
        self.memory = nn.Parameter(torch.empty(config.mem_slots, config.n_embd).normal_(std=0.5))

    def initial_state(self, batch, device):
        """The RMTState before the first token. The memory is learned, and already on the model's device."""
        return RMTState(0, self.memory.expand(batch, -1, -1), [])

    def run(self, x, rope, layers):
        """
        A stretch of a segment through the whole stack, after the positions whose keys and values are in `layers`.
        x (B, n, D), rope the angles of the whole [read ; text ; write] -> normed outputs (B, n, D), the new `layers`
        """
        start = layers[0][0].size(1) if layers else 0
        end = start + x.size(1)
        i, j = torch.arange(start, end, device=x.device)[:, None], torch.arange(end, device=x.device)
        mask = (j <= i) | (j < self.config.mem_slots)  # causal, but read tokens see each other: they hold only what is past
        rope, seen = [angle[start:end] for angle in rope], []
        for l, block in enumerate(self.blocks):
            q, k, v, _ = block.attention.project(block.norm1(x), rope)
            if layers:
                k, v = torch.cat((layers[l][0], k), dim=1), torch.cat((layers[l][1], v), dim=1)
            seen.append((k, v))
            x = x + block.dropout(block.attention.wo(attend(q, k, v, mask)))
            x = x + block.dropout(block.mlp(block.norm2(x)))
        return self.norm(x), seen

    def features(self, idx, state=None):
        """idx (B, L) token ids, state the RMTState before them (None: a fresh start) -> normed features (B, L, D), the RMTState after."""
        c = self.config
        T, m = c.block_size, c.mem_slots
        pos, memory, layers = state or self.initial_state(idx.size(0), idx.device)
        # positions count inside the segment: the last of a million segments looks like the first
        rope = rope_angles(0, m + T + m, c.n_embd // c.n_head, c.rope_theta, idx.device)
        features, borders = [], tuple(range(T - pos % T, idx.size(1), T))
        for text in self.dropout(self.embedding(idx)).tensor_split(borders, dim=1):
            n, first, last = text.size(1), pos % T == 0, pos % T + text.size(1) == T
            # read and write tokens go in with the same vectors: a write token starts from what is stored and adds the segment to it
            x, layers = self.run(torch.cat([memory] * first + [text] + [memory] * last, dim=1), rope, layers)
            features.append(x[:, m * first:m * first + n])
            if last:
                # taken after the final norm, as in the authors' code: each segment adds to the residual stream of the write tokens,
                # which without a norm between the segments would grow with their number
                memory, layers = x[:, -m:], []
            pos += n
        return torch.cat(features, dim=1), RMTState(pos, memory, layers)
