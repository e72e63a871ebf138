"""
LM2, the Large Memory Model (Kang et al. 2025, arXiv 2502.06049), in one file.

Notable features:
- a Llama-style decoder: RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases, untied head
- every block owns a memory bank: N slots that tokens read by cross-attention and that gates update once a segment
- layer-parallel: a block sees all segments of a sequence at once, only the N slots recur from segment to segment
- attention slides over the last `block_size` tokens: what lies further back must come through the memory
- a streaming state: any number of tokens at a time, in constant memory, with the same logits as all at once

Shapes: B batch, L tokens of one call, T = block_size, S segments, N = mem_slots, D = n_embd, nh heads, hs = D / nh.
"""
import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F

from lib.optim import Muon

linear = partial(nn.Linear, bias=False)


@dataclass
class LM2Config:
    vocab_size: int              # number of token ids
    block_size: int = 64         # T: tokens in a segment, and in the sliding attention window
    n_layer: int = 4             # blocks
    n_head: int = 4              # attention heads
    n_kv_head: int = 0           # heads of keys and values (grouped-query attention), 0: n_head
    n_embd: int = 128            # D: width
    mlp_ratio: float = 8 / 3     # hidden width of the SwiGLU over n_embd
    dropout: float = 0.0         # on the embedding and on what each block adds to the residual stream
    qk_norm: bool = True         # RMSNorm on queries and keys
    rope_theta: float = 10000.0  # base of the rotary angles
    attention: str = "window"    # window: the last block_size tokens; full: all tokens before
    memory: str = "lm2"          # lm2: a memory bank in each block; rmt: memory tokens, see rmt.py; none: the vanilla decoder
    mem_slots: int = 16          # N: slots in a bank, or memory tokens
    mem_heads: int = 0           # heads of the memory's read, 0: n_head
    mem_layers: int = -1         # blocks with memory, counted from the first, -1: all
    mem_topk: int = 0            # slots that a token reads in each head, 0: all
    mem_write: str = "attend"    # attend: slots attend to the segment; aligned: slot i takes position i, as in the paper
    window_dropout: float = 0.0  # lm2: share of training batches whose window ends at the segment's border, so that memory is needed

    def __post_init__(self):
        """Fills in the zeros; raises ValueError, one line that says what to change, for what cannot work."""
        self.n_kv_head, self.mem_heads = self.n_kv_head or self.n_head, self.mem_heads or self.n_head
        self.mem_layers = self.n_layer if self.mem_layers < 0 else self.mem_layers
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "mlp_ratio", "mem_slots", "mem_heads"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        for name, known in (("attention", ("window", "full")), ("memory", ("lm2", "rmt", "none")), ("mem_write", ("attend", "aligned"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)} is not known: use {' or '.join(known)}")
        for name, total in (("n_head", "n_embd"), ("n_kv_head", "n_head"), ("mem_heads", "n_embd")):
            if getattr(self, total) % getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} must divide {total}={getattr(self, total)}")
        if self.n_embd // self.n_head % 2:
            raise ValueError(f"n_embd/n_head={self.n_embd // self.n_head} must be even for rotary positions")
        if not (0 <= self.dropout < 1 and 0 <= self.window_dropout < 1):
            raise ValueError(f"dropout={self.dropout} and window_dropout={self.window_dropout} must be at least 0 and below 1")
        if self.memory != "lm2":
            return
        if self.mem_write == "aligned" and self.mem_slots != self.block_size:
            raise ValueError(f"mem_write=aligned needs mem_slots={self.mem_slots} to equal block_size={self.block_size}")
        for name, total in (("mem_slots", "n_embd"), ("mem_layers", "n_layer"), ("mem_topk", "mem_slots")):
            if not 0 <= getattr(self, name) <= getattr(self, total):
                raise ValueError(f"{name}={getattr(self, name)} must be between 0 and {total}={getattr(self, total)}")


class LayerState(NamedTuple):
    """What a block remembers. With attention="window" its size does not depend on the number of tokens seen."""
    k: torch.Tensor         # (B, P, n_kv_head, hs) keys of the last P = min(pos, T - 1) tokens, of all with attention="full"
    v: torch.Tensor         # (B, P, n_kv_head, hs) their values
    M: torch.Tensor | None  # (B, N, D) the bank after the last whole segment, float32; None without memory
    kv: tuple | None        # its keys and values (B, N, mem_heads, hs), None until a token reads it
    unwritten: list[torch.Tensor]  # (B, pos % T, ...) each: of the unfinished segment, what is written from when it ends


class State(NamedTuple):
    pos: int                  # tokens seen so far
    layers: list[LayerState]  # one per block


def wide(x):
    """Out of bfloat16, which is too coarse for norms, angles, a loss, and a bank that gates update thousands of times."""
    return x.float() if x.dtype == torch.bfloat16 else x


def rope_angles(pos, length, head_dim, theta, device):
    """cos and signed sin (length, 1, head_dim) of the rotary angles from position pos on, in float64: exact at any position."""
    where = "cpu" if device.type == "mps" else device  # mps has no float64
    freq = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=where) / head_dim)
    angles = torch.arange(pos, pos + length, dtype=torch.float64, device=where)[:, None, None] * freq
    return [torch.cat(pair, dim=-1).float().to(device) for pair in ((angles.cos(), angles.cos()), (-angles.sin(), angles.sin()))]


def rotate(x, cos, sin):
    """Turn x (B, L, heads, hs) by its rotary angles, x_i with x_{i + hs/2} as in Hugging Face's Llama."""
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


def norm_heads(x, config):
    """QK-norm: queries or keys (..., heads, hs) to a root mean square of one, if the config says so."""
    return F.rms_norm(x, x.shape[-1:]) if config.qk_norm else x


def attend(q, k, v, mask=None, causal=False):
    """Multi-head softmax(Q K^T / sqrt(hs)) V. q (B, Lq, nh, hs), k and v (B, Lk, nkv, hs) -> (B, Lq, nh * hs)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with torch.autocast("cpu", enabled=False):  # on a CPU this kernel takes several times as long in bfloat16
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2).flatten(2)


def causal_mask(n_q, n_k, window, device, cut=False):
    """(n_q, n_k): does query i (the last at the last key) see key j? `window` keys at most, and with cut none before query 0."""
    i, j = torch.arange(n_k - n_q, n_k, device=device)[:, None], torch.arange(n_k, device=device)
    return (j <= i) & (j > i - window) & (j >= (n_k - n_q) * cut)


def window_attention(q, k, v, window, cut=False):
    """
    Attention of each token to the last `window` tokens, its own included, in blocks of `window` queries; cut, a bool or tensor (): within
    the block only. q (B, L, nh, hs); k, v (B, P + L, nkv, hs), P < window of them from before the first query -> (B, L, nh * hs)
    """
    past, first = k.size(1) - q.size(1), min(window, q.size(1))
    mask = causal_mask(first, past + first, window, q.device) if first > 1 else None  # one token sees all that is cached
    y = attend(q[:, :first], k[:, :past + first], v[:, :past + first], mask)
    if not (rest := q.size(1) - first):
        return y
    n, pad = math.ceil(rest / window), -rest % window  # further blocks of queries, each sees its own keys and those of the block before
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, pad)) if pad else x for x in (q[:, first:], k[:, past:], v[:, past:]))
    q = q.reshape(-1, window, *q.shape[2:])                                          # (B*n, T, nh, hs)
    k, v = (x.unflatten(1, (n + 1, window)) for x in (k, v))
    k, v = (torch.cat((x[:, :-1], x[:, 1:]), dim=2).flatten(0, 1) for x in (k, v))   # (B*n, 2T, nkv, hs)
    more = attend(q, k, v, causal_mask(window, 2 * window, window, q.device, cut))
    return torch.cat((y, more.view(y.size(0), n * window, -1)[:, :rest]), dim=1)


class Attention(nn.Module):
    """Causal self-attention, over a sliding window or over everything before."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.head_dim = config.n_embd // config.n_head
        self.wqkv = linear(config.n_embd, (config.n_head + 2 * config.n_kv_head) * self.head_dim)
        self.wo = linear(config.n_embd, config.n_embd)

    def project(self, h, rope):
        """h (B, L, D) -> queries, keys (both turned to their positions), values, and keys not turned, (B, L, n_head or n_kv_head, hs) each"""
        c = self.config
        qk, v = wide(self.wqkv(h)).unflatten(-1, (-1, self.head_dim)).split((c.n_head + c.n_kv_head, c.n_kv_head), dim=2)
        qk = norm_heads(qk, c)
        return *rotate(qk, *rope).split((c.n_head, c.n_kv_head), dim=2), v, qk[:, :, c.n_head:]

    def forward(self, q, k, v, k_past, v_past, cut=False):
        """What `project` gives, keys and values of the P tokens before -> E_attn (B, L, D), keys and values to remember."""
        c = self.config
        if past := k_past.size(1):
            k, v = torch.cat((k_past, k), dim=1), torch.cat((v_past, v), dim=1)
        if c.attention == "window":
            y, start = window_attention(q, k, v, c.block_size, cut), max(0, k.size(1) - c.block_size + 1)
        else:
            mask = causal_mask(q.size(1), k.size(1), k.size(1), q.device) if past else None
            y, start = attend(q, k, v, mask, causal=not past), 0
        return self.wo(y), k[:, start:], v[:, start:]


class MemoryBank(nn.Module):
    """
    The memory of one block: N slots of width D. `read` is the paper's Eq. 1-2, `output_gate` Eq. 3, `gates` Eq. 4-5, `update`
    Eq. 6. A token of segment s reads the bank as it stood after segment s-1, so nothing flows from later tokens to earlier ones.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.n_embd
        self.norm = nn.RMSNorm(D)
        self.w_q, self.w_k, self.w_v = linear(D, D), linear(D, D), linear(D, D)
        self.w_out, self.w_in, self.w_forget = (linear(D, D, bias=True) for _ in range(3))
        if config.mem_write == "attend":  # with keys and values of self-attention
            self.slots = nn.Parameter(torch.empty(config.mem_slots, D))  # a learned query for each slot

    def initial(self, batch, device):
        """The bank before the first segment: the identity, (B, N, D)."""
        return torch.eye(self.config.mem_slots, self.config.n_embd, device=device).expand(batch, -1, -1)

    def heads(self, x):
        """x (..., L, D) -> (B, L, mem_heads, hs), with all leading dimensions in B"""
        return wide(x).unflatten(-1, (self.config.mem_heads, -1)).flatten(0, -4)

    def keys_values(self, M):
        """K and V of the slots (Eq. 1). M (..., N, D) -> (B, N, mem_heads, hs) each"""
        slots = self.norm(M)
        return norm_heads(self.heads(self.w_k(slots)), self.config), self.heads(self.w_v(slots))

    def read(self, h, k, v):
        """E_mem: each token asks the slots (Eq. 1-2). h (..., L, D), their k and v as `keys_values` gives them -> (..., L, D)"""
        q, topk, mask = norm_heads(self.heads(self.w_q(h)), self.config), self.config.mem_topk, None
        if topk:
            scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
            mask = scores >= scores.topk(topk).values[..., -1:]  # (B, heads, L, N)
        return attend(q, k, v, mask).view_as(h)

    def output_gate(self, E):
        """g_out: how much of what was read enters the residual stream (Eq. 3)."""
        return self.w_out(E).sigmoid()

    def content(self, k, v):
        """C of the `attend` write: each slot asks the segment. k, v (B, S, T, n_kv_head, hs) -> (B, S, N, D)"""
        q = norm_heads(self.slots.unflatten(-1, (self.config.n_head, -1)), self.config)
        return attend(q.expand(k.size(0) * k.size(1), -1, -1, -1), k.flatten(0, 1), v.flatten(0, 1)).unflatten(0, k.shape[:2])

    def gates(self, x, C):
        """Input gate (Eq. 4) and forget gate (Eq. 5), (..., N, D), in float32."""
        return wide(self.w_in(x)).sigmoid(), wide(self.w_forget(C)).sigmoid()

    def update(self, M, C, g_in, g_forget):
        """The bank after the segment (Eq. 6)."""
        return g_in * wide(C).tanh() + g_forget * M

    def write(self, source, M):
        """
        Write whole segments. source: for `attend` keys and values of self-attention (B, S, T, n_kv_head, hs), for `aligned` h
        (B, S, T, D); M (B, N, D) -> M and the S banks after it (B, S + 1, N, D). Content and gates of `attend` do not depend on the
        bank: they are made for all segments at once, and only Eq. 6 recurs.
        """
        banks = [M]
        if self.config.mem_write == "attend":
            C = self.content(*source)
            for segment in zip(*(x.unbind(1) for x in (C, *self.gates(C, C)))):
                banks.append(self.update(banks[-1], *segment))
        else:  # slot i belongs to position i, and what it read is what it writes
            for h in source[0].unbind(1):
                C = self.read(h, *self.keys_values(banks[-1]))
                banks.append(self.update(banks[-1], C, *self.gates(h, C)))
        return torch.stack(banks, dim=1)

    def forward(self, h, k, v, M, kv, unwritten):
        """
        h (B, L, D) normed inputs, their keys (not yet turned) and values (B, L, n_kv_head, hs); M, kv, unwritten as in LayerState
        -> g_out * E_mem (B, L, D), the new M, kv and unwritten
        """
        T, L = self.config.block_size, h.size(1)
        source = (k, v) if self.config.mem_write == "attend" else (h,)
        if unwritten:
            source = [torch.cat(pair, dim=1) for pair in zip(unwritten, source)]
        o, whole = source[0].size(1) - L, source[0].size(1) // T
        banks = self.write([x[:, :whole * T].unflatten(1, (whole, T)) for x in source], M) if whole else M[:, None]
        if o + L <= T:  # all tokens in one segment
            kv = kv or self.keys_values(M)
            E = self.read(h, *kv)
        else:           # put each token into its segment, read all segments at once
            n, pad = math.ceil((o + L) / T), -(o + L) % T
            queries = (F.pad(h, (0, 0, o, pad)) if o or pad else h).unflatten(1, (n, T))
            E = self.read(queries, *self.keys_values(banks[:, :n])).flatten(1, 2)[:, o:o + L]
        return self.output_gate(E) * E, banks[:, -1], None if whole else kv, [x[:, whole * T:] for x in source]


class MLP(nn.Module):
    """SwiGLU, its hidden width rounded up to a multiple of 8."""

    def __init__(self, config):
        super().__init__()
        hidden = 8 * math.ceil(config.mlp_ratio * config.n_embd / 8)
        self.w_gate, self.w_up = linear(config.n_embd, hidden), linear(config.n_embd, hidden)
        self.w_down = linear(hidden, config.n_embd)

    def forward(self, x):
        return self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))


class Block(nn.Module):
    """x + E_attn + g_out * E_mem (Eq. 3), then the MLP."""

    def __init__(self, config, has_memory):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(config.n_embd), nn.RMSNorm(config.n_embd)
        self.attention = Attention(config)
        self.memory = MemoryBank(config) if has_memory else None
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, state, cut=False):
        """x (B, L, D), state LayerState, cut as in `window_attention` -> x (B, L, D), the state after these tokens."""
        h = self.norm1(x)
        q, k, v, unturned = self.attention.project(h, rope)
        y, *past = self.attention(q, k, v, state.k, state.v, cut)
        memory = state[2:]  # M, kv, unwritten
        if self.memory:
            E, *memory = self.memory(h, unturned, v, *memory)
            y = y + E
        x = x + self.dropout(y)
        return x + self.dropout(self.mlp(self.norm2(x))), LayerState(*past, *memory)


class LM2(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, config.memory == "lm2" and l < config.mem_layers) for l in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd)
        self.head = linear(config.n_embd, config.vocab_size)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """
        embedding, slots       normal, std 0.5 and 1
        head, memory's w_v     zero: the first loss is log(vocab_size), and memory adds nothing at first
        gates (w_in, ...)      zero, so they start at their biases: input and output half open (closed, they hide the gradient), forget +2 (0.88)
        other matrices         normal, std 1/sqrt(fan_in); gains one
        """
        biases = {"w_in": 0.0, "w_forget": 2.0, "w_out": 0.0}
        for name, p in self.named_parameters():
            *_, kind, last = name.split(".")
            if p.ndim == 1:
                p.fill_(biases[kind] if last == "bias" else 1.0)
            elif kind in ("head", "w_v", *biases):
                p.zero_()
            else:
                p.normal_(std=1.0 if last == "slots" else 0.5 if kind == "embedding" else p.size(1) ** -0.5)

    def configure_optimizers(self, learning_rate, adam_lr, weight_decay, device_type, momentum=0.9):
        """Muon for the hidden matrices, AdamW for embedding, head, gains, biases and slot queries: a list of two optimizers."""
        muon = {name: p for name, p in self.named_parameters() if p.ndim == 2 and name.startswith("blocks") and "slots" not in name}
        adam = [p for name, p in self.named_parameters() if name not in muon]
        return [Muon(muon.values(), lr=learning_rate, weight_decay=weight_decay, momentum=momentum),
                torch.optim.AdamW(adam, lr=adam_lr, betas=(0.9, 0.99), weight_decay=0.0, fused=device_type != "mps")]

    def initial_state(self, batch, device, silent=False):
        """The State before the first token. silent: nothing is read before a segment was written, so no update goes into reading the identity."""
        c, banks = self.config, [block.memory for block in self.blocks]
        kv = torch.empty(batch, 0, c.n_kv_head, c.n_embd // c.n_head, device=device)
        zeros = [torch.zeros(batch, c.mem_slots, c.mem_heads, c.n_embd // c.mem_heads, device=device)] * 2
        return State(0, [LayerState(kv, kv, bank and bank.initial(batch, device), zeros if silent and bank else None, []) for bank in banks])

    def features(self, idx, state=None):
        """idx (B, L) token ids, state the State before them (None: a fresh start) -> normed features (B, L, D), the State after."""
        state = state or self.initial_state(idx.size(0), idx.device, silent=self.training and idx.size(1) <= self.config.block_size)
        x = self.dropout(self.embedding(idx))
        rope = rope_angles(state.pos, idx.size(1), self.config.n_embd // self.config.n_head, self.config.rope_theta, idx.device)
        share = self.config.window_dropout if self.training and self.blocks[0].memory else 0.0
        cut = bool(share) and torch.rand((), device=idx.device) < share
        layers = []
        for block, layer in zip(self.blocks, state.layers):
            x, layer = block(x, rope, layer, cut)
            layers.append(layer)
        return self.norm(x), State(state.pos + idx.size(1), layers)

    def forward(self, idx, targets=None, state=None):
        """
        idx (B, L) token ids, any L >= 1; targets (B, L), -1 where nothing is to be predicted; state from an earlier call
        -> logits (B, L, vocab_size), loss (mean cross-entropy in nats per target, None without targets), state
        """
        x, state = self.features(idx, state)
        logits = self.head(x)
        loss = None if targets is None else F.cross_entropy(wide(logits).flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss, state

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
        """
        Continue idx (B, L), L >= 1, yielding the next token of each row (B,), an inference tensor, at O(T + N) with attention="window".
        temperature 0 is greedy; top_k keeps the k likeliest tokens, top_p the likeliest that together reach probability p.
        """
        chunk, state = 16 * self.config.block_size, None  # a long prompt is read piece by piece
        for start in range(0, idx.size(1), chunk):
            x, state = self.features(idx[:, start:start + chunk], state)
        for _ in range(max_new_tokens):
            token = sample(self.head(x[:, -1]).float(), temperature, top_k, top_p)
            yield token
            x, state = self.features(token[:, None], state)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
        """idx (B, L), L >= 1 -> idx with its continuation (B, L + max_new_tokens). Arguments as in `stream`."""
        return torch.cat((idx, *(t[:, None] for t in self.stream(idx, max_new_tokens, temperature, top_k, top_p))), dim=1)


def sample(logits, temperature=1.0, top_k=None, top_p=None):
    """Draw a token from each row of logits (B, vocab_size) -> (B,)"""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:], -torch.inf)
    probs = logits.softmax(dim=-1)
    if top_p:
        sorted_probs, order = probs.sort(dim=-1, descending=True)
        cut = sorted_probs.cumsum(dim=-1) - sorted_probs >= top_p  # the likelier ones reach p already
        probs = probs.scatter(-1, order, sorted_probs.masked_fill(cut, 0.0))
    return torch.multinomial(probs, num_samples=1).squeeze(-1)
