"""
The Recurrent Memory Transformer (RMT, Bulatov et al. 2022, arXiv 2207.06881), as a decoder
(Kuratov et al. 2024, arXiv 2402.10790), on the blocks of lm2.py.

A segment of T tokens runs through the whole stack between two copies of m memory tokens:

    [ m read tokens ; T text tokens ; m write tokens ]

What comes out at the write tokens is what the next segment gets as its memory tokens, and
gradients flow through them into the segment before. They are the only way from segment to segment:
so segments run one after the other, where LM2 runs them all at once.

Shapes as in lm2.py, and m = mem_slots.
"""
from typing import NamedTuple

import torch
import torch.nn as nn

from lm2 import LM2, attend, rope_angles


class RMTState(NamedTuple):
    """What lies behind a token. Its size does not grow with the number of tokens seen."""
    pos: int                     # tokens seen so far
    memory_tokens: torch.Tensor  # (B, m, D) of the segment that pos lies in
    layers: list[tuple]          # of each block, keys and values (B, m + pos % T, nkv, hs) of the
    #                              unfinished segment, read tokens first; [] between two segments


class RMT(LM2):
    """
    LM2Config with memory="rmt"; mem_slots is m. A token never sees the segment before, whether
    `attention` is window or segment.
    """

    def __init__(self, config):
        """Raises ValueError on a config with another memory, or with full attention."""
        if config.memory != "rmt":
            raise ValueError(f"memory={config.memory} is not for RMT: use memory=rmt")
        if config.attention == "full":
            raise ValueError("attention=full is not for memory=rmt: use attention=window")
        super().__init__(config)
        # the first segment's memory tokens stand among embeddings, so they are drawn alike
        first = torch.empty(config.mem_slots, config.n_embd).normal_(std=0.5)
        self.memory_tokens = nn.Parameter(first)

    def initial_state(self, batch):
        """The RMTState before the first token, with the learned memory tokens."""
        return RMTState(0, self.memory_tokens.expand(batch, -1, -1), [])

    def run(self, x, rope, layers):
        """
        A stretch of a segment through the whole stack, after the positions whose keys and values
        are in `layers`; causal, but read tokens see each other. x (B, n, D), rope the angles of the
        whole [read ; text ; write]
        -> normed outputs (B, n, D), the new `layers`
        """
        start = layers[0][0].size(1) if layers else 0
        end = start + x.size(1)
        i = torch.arange(start, end, device=x.device)[:, None]
        j = torch.arange(end, device=x.device)
        # causal, but read tokens see each other: they hold only what is past
        mask = (j <= i) | (j < self.config.mem_slots)
        cos, sin = rope
        rope = cos[start:end], sin[start:end]
        seen = []
        for number, block in enumerate(self.blocks):
            q, k, v, _ = block.attention.project(block.norm1(x), rope)
            if layers:
                past_k, past_v = layers[number]
                k, v = torch.cat((past_k, k), dim=1), torch.cat((past_v, v), dim=1)
            seen.append((k, v))
            x = x + block.dropout(block.attention.wo(attend(q, k, v, mask)))
            x = x + block.dropout(block.mlp(block.norm2(x)))
        return self.norm(x), seen

    def features(self, idx, state=None, repeats=None):
        """
        idx (B, L) token ids, state the RMTState before them (None: the start of a text), no repeats
        -> normed features (B, L, D), the RMTState after. Raises ValueError.
        """
        self.check(idx, repeats)
        c = self.config
        T, m = c.block_size, c.mem_slots
        pos, memory_tokens, layers = state or self.initial_state(len(idx))
        # positions count inside the segment: the last of a million segments looks like the first
        rope = rope_angles(0, m + T + m, c, idx.device)
        features, borders = [], tuple(range(T - pos % T, idx.size(1), T))
        for text in self.dropout(self.embedding(idx)).tensor_split(borders, dim=1):
            n, begins, ends = text.size(1), pos % T == 0, pos % T + text.size(1) == T
            # read and write tokens go in with the same vectors: a write token starts from what is
            # stored and adds the segment to it
            pieces = [text]
            if begins:
                pieces.insert(0, memory_tokens)
            if ends:
                pieces.append(memory_tokens)
            x, layers = self.run(torch.cat(pieces, dim=1), rope, layers)
            skip = m if begins else 0
            features.append(x[:, skip:skip + n])
            if ends:
                # taken after the final norm, as in the authors' code: each segment adds to the
                # residual stream of the write tokens, which without a norm would grow on and on
                memory_tokens, layers = x[:, -m:], []
            pos += n
        return torch.cat(features, dim=1), RMTState(pos, memory_tokens, layers)
