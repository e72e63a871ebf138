"""
LM2, the Large Memory Model (Kang et al. 2025, arXiv 2502.06049), in one file.

Notable features:
- a Llama-style decoder: RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases
- every block owns a memory bank: N slots that tokens read and that gates update once a segment
- a block's attention slides over the last T tokens: facts from far before come through the banks
- layer-parallel: a block sees all segments of a sequence at once, only its N slots recur
- a streaming state of constant size: tokens in any chunks give the logits of the whole
- time dilation: in training a segment can count as hundreds, so that memory learns to last

Shapes: B batch, L tokens of one call, T = block_size (a segment), S segments, N = mem_slots,
D = n_embd, nh = n_head, nkv = kv_heads, hs = D / nh. "Eq." numbers are the paper's.
"""
import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F

linear = partial(nn.Linear, bias=False)


def require(condition, message):
    if not condition:
        raise ValueError(message)


@dataclass
class LM2Config:
    # model
    vocab_size: int              # number of token ids
    block_size: int = 64         # T: tokens in a segment, and in the sliding attention window
    n_layer: int = 4             # blocks
    n_head: int = 4              # attention heads, of the memory's read as well
    n_kv_head: int = 0           # heads of keys and values (grouped-query attention), 0: n_head
    n_embd: int = 128            # D: width
    mlp_ratio: float = 8 / 3     # hidden width of the SwiGLU over n_embd
    dropout: float = 0.0         # on the embedding and on what each block adds to the residual
    qk_norm: bool = True         # RMSNorm on queries and keys
    norm_eps: float = 1e-5       # added to the mean square in every RMSNorm
    rope_theta: float = 10000.0  # base of the rotary angles
    rope_factor: float = 1.0     # Llama 3's rope scaling: slow angles turn this many times slower
    rope_context: int = 8192     # longest text in tokens, before that scaling
    tie_head: bool = False       # the head has the embedding's weights
    attention: str = "window"    # window: last T tokens; segment: those of its segment; full: all
    # memory
    memory: str = "lm2"          # lm2: banks; rmt: memory tokens, baselines/rmt.py; none: neither
    mem_slots: int = 16          # N: slots in a bank, or memory tokens of rmt
    mem_layers: int = -1         # blocks with a bank, counted from the first, -1: all
    mem_write: str = "attend"    # attend: slots ask the segment; aligned: slot i takes position i
    window_dropout: float = 0.0  # with banks: share of training batches that attend in the segment

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def kv_heads(self):
        return self.n_kv_head or self.n_head

    @property
    def n_banks(self):  # blocks with a bank
        layers = self.n_layer if self.mem_layers < 0 else self.mem_layers
        return layers if self.memory == "lm2" else 0

    def __post_init__(self):
        """Raises ValueError, one line that says what to change, for what cannot work."""
        value = vars(self)
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "mlp_ratio",
                     "norm_eps", "rope_theta", "rope_factor", "rope_context", "mem_slots"):
            require(0 < value[name] < math.inf, f"{name}={value[name]} must be above 0")
        for name in ("dropout", "window_dropout"):
            require(0 <= value[name] < 1, f"{name}={value[name]} must be from 0 to below 1")
        for name, known in (("attention", "window segment full"), ("memory", "lm2 rmt none"),
                            ("mem_write", "attend aligned")):
            require(value[name] in known.split(),
                    f"{name}={value[name]} is not known: use {known.replace(' ', ' or ')}")
        for name, whole in (("n_head", "n_embd"), ("n_kv_head", "n_head")):
            require(value[name] >= 0 and value[whole] % (value[name] or 1) == 0,
                    f"{name}={value[name]} must divide {whole}={value[whole]}")
        require(self.head_dim % 2 == 0, f"n_embd/n_head={self.head_dim} must be even for RoPE")
        if self.memory != "lm2":
            return
        require(self.attention == "window" or self.window_dropout == 0,
                f"window_dropout={self.window_dropout} needs attention=window")
        require(self.mem_write != "aligned" or self.mem_slots == self.block_size,
                f"mem_slots={self.mem_slots} must be block_size={self.block_size} with aligned")
        for name, lowest, most in (("mem_slots", 1, "n_embd"), ("mem_layers", -1, "n_layer")):
            require(lowest <= value[name] <= value[most],
                    f"{name}={value[name]} must be from {lowest} to {most}={value[most]}")


class BankState(NamedTuple):
    """The memory of one block. Of `unwritten` the first pos % T tokens wait to be written."""
    M: torch.Tensor       # (B, N, D) the bank after the last whole segment, at least float32
    keys: torch.Tensor    # (B, N, nh, hs) what tokens read of it; zero until one is written
    values: torch.Tensor  # (B, N, nh, hs)
    unwritten: list       # keys (before RoPE), values (B, T, nkv, hs); with `aligned` h (B, T, D)


class LayerState(NamedTuple):
    """What a block remembers: rings of the last T tokens, the token of position p at place p % T;
    places not filled yet are zero. attention="full": all tokens, keys, values (B, pos, nkv, hs)."""
    keys: torch.Tensor    # (B, T, nkv, hs) of self-attention, turned to their positions by RoPE
    values: torch.Tensor  # (B, T, nkv, hs)
    bank: BankState | None  # None in a block without memory


class State(NamedTuple):
    """What is kept of the text so far. No call changes it; a later one may share its tensors."""
    pos: int                  # tokens seen so far
    layers: list[LayerState]  # one per block


def put(rings, xs, pos):
    """Copies of rings (B, T, ...) with tokens (B, L, ...) from position pos on in their places."""
    T, i = rings[0].size(1), torch.arange(xs[0].size(1), device=xs[0].device)
    places = (pos + i[-T:]) % T  # only the last T tokens fit
    return [ring.index_copy(1, places, x[:, -T:].to(ring.dtype)) for ring, x in zip(rings, xs)]


def wide(x):
    """x in float32 at least: bfloat16 is too coarse for norms, angles, a loss, a lasting bank."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def rope_angles(pos, length, config, device):
    """Rotary angles of the positions from pos on: cos and sin, (length, 1, hs) each; sin is
    negative in its first half, see `rotate`. In float64: exact at any position. Llama 3 multiplies
    frequencies of up to 1 turn in rope_context by 1 / rope_factor, from 4 by 1; linear between."""
    where = "cpu" if device.type == "mps" else device  # mps has no float64
    arange = partial(torch.arange, dtype=torch.float64, device=where)
    frequencies = config.rope_theta ** (-arange(0, config.head_dim, 2) / config.head_dim)
    turns = config.rope_context * frequencies / (2 * math.pi)
    slowed = ((4 - turns) / 3).clamp(0, 1)
    frequencies = frequencies * (1 - slowed * (1 - 1 / config.rope_factor))
    angles = (pos + arange(length))[:, None, None] * frequencies        # (length, 1, hs / 2)
    cos = torch.cat((angles.cos(), angles.cos()), dim=-1)
    sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)
    return cos.float().to(device), sin.float().to(device)


def rotate(x, rope):
    """Turn x (B, L, heads, hs) by its angles: x_i with x_{i + hs/2}, as Hugging Face's Llama."""
    cos, sin = rope  # the roll puts x_{i + hs/2} under x_i; its minus sign is in sin
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


def norm_heads(x, config):
    """QK-norm: each head of x (..., heads, hs) to a root mean square of one, if config says so."""
    return F.rms_norm(x, x.shape[-1:], eps=config.norm_eps) if config.qk_norm else x


def attend(q, k, v, mask=None, causal=False):
    """Multi-head softmax(Q K^T / sqrt(hs)) V. q (B, Lq, nh, hs); k, v (B, Lk, nkv, hs); mask
    (..., Lq, Lk), True where a query sees a key -> (B, Lq, nh * hs)"""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)   # (B, heads, L, hs)
    grouped = True if q.size(1) != k.size(1) else False  # torch.compile wants it decided here
    with torch.autocast("cpu", enabled=False):  # stays float32: a CPU is slower in bfloat16
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
    return y.transpose(1, 2).flatten(2)


def causal_mask(n_queries, n_keys, window, device, first_key=0):
    """(n_queries, n_keys), True where a query sees a key. The last query stands at the last key;
    each sees `window` keys up to its own, and none before first_key."""
    i = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    j = torch.arange(n_keys, device=device)
    return (j <= i) & (j > i - window) & (j >= first_key)


def window_attention(q, k, v, T, pos=0, within_segment=False):
    """Attention of each token to the last T, its own included, by segments of queries. q (B, L, nh,
    hs) from position pos on; k, v (B, P + L, nkv, hs), P < T of them from before; within_segment,
    a bool or tensor (): attention ends at the segment's border -> (B, L, nh * hs)"""
    L, past, begun = q.size(1), k.size(1) - q.size(1), pos % T
    n_first = min(T - begun, L)  # tokens up to the end of the first segment
    mask = causal_mask(n_first, past + n_first, T, q.device, (past - begun) * within_segment)
    E = attend(q[:, :n_first], k[:, :past + n_first], v[:, :past + n_first], mask)
    if n_first == L:
        return E
    # then all other segments at once: each sees its own keys and those of the segment before
    n, start = math.ceil((L - n_first) / T), past + n_first - T   # where the one before begins
    pad = (0, 0, 0, 0, 0, n * T - (L - n_first))  # of dimension 1: F.pad counts from the last one
    q = F.pad(q[:, n_first:], pad).unflatten(1, (n, T)).flatten(0, 1)   # (B * n, T, nh, hs)
    k, v = (F.pad(x[:, start:], pad).unflatten(1, (-1, T)) for x in (k, v))  # (B, n+1, T, nkv, hs)
    k, v = (torch.cat((x[:, :-1], x[:, 1:]), 2).flatten(0, 1) for x in (k, v))  # (B * n, 2 * T, ..)
    mask = causal_mask(T, 2 * T, T, q.device, T * within_segment)
    others = attend(q, k, v, mask).unflatten(0, (-1, n)).flatten(1, 2)  # (B, n * T, nh * hs)
    return torch.cat((E, others[:, :L - n_first]), dim=1)


class Attention(nn.Module):
    """Causal self-attention over a sliding window, the segment, or everything before."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wqkv = linear(config.n_embd, (config.n_head + 2 * config.kv_heads) * config.head_dim)
        self.wo = linear(config.n_embd, config.n_embd)

    def project(self, h, rope):
        """h (B, L, D) -> queries (B, L, nh, hs) and keys (B, L, nkv, hs), turned to their
        positions; values (B, L, nkv, hs); and the keys before they were turned"""
        c = self.config
        qkv = wide(self.wqkv(h)).unflatten(-1, (-1, c.head_dim))
        # queries and keys stay together for norm and rotation: one operation instead of two
        qk, values = qkv.split((c.n_head + c.kv_heads, c.kv_heads), dim=2)
        qk = norm_heads(qk, c)
        queries, keys = rotate(qk, rope).split((c.n_head, c.kv_heads), dim=2)
        return queries, keys, values, qk[:, :, c.n_head:]

    def forward(self, q, k, v, pos, kept, within_segment=False):
        """q, k, v as from `project`, of the tokens from position pos on, the keys and values that a
        LayerState keeps -> E_attn (B, L, D), and the keys and values to keep"""
        T, L = self.config.block_size, q.size(1)
        if self.config.attention == "full":
            k, v = (torch.cat(pair, dim=1) for pair in zip(kept, (k, v)))
            mask = causal_mask(L, k.size(1), k.size(1), q.device) if pos else None
            return self.wo(attend(q, k, v, mask, causal=not pos)), k, v
        rings = put(kept, (k, v), pos)
        if L == 1 and isinstance(within_segment, bool):  # it sees what the rings hold, in any order
            filled = torch.arange(T, device=q.device)[None] <= (pos % T if within_segment else pos)
            return self.wo(attend(q, *rings, filled)), *rings
        if pos:  # up to T - 1 tokens before these, the oldest first
            k, v = (torch.cat((ring.roll(-(pos % T), 1)[:, T - min(pos, T - 1):], x), dim=1)
                    for ring, x in zip(kept, (k, v)))
        return self.wo(window_attention(q, k, v, T, pos, within_segment)), *rings


class MemoryBank(nn.Module):
    """The memory of one block: N slots of width D. A token of segment s reads the bank as it stood
    after segment s-1, so nothing flows from later tokens to earlier ones."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.n_embd
        self.norm = nn.RMSNorm(D, eps=config.norm_eps)
        self.w_q, self.w_k, self.w_v = linear(D, D), linear(D, D), linear(D, D)
        self.w_out, self.w_in, self.w_forget = (linear(D, D, bias=True) for _ in range(3))
        if config.mem_write != "aligned":
            self.slot_queries = nn.Parameter(torch.empty(config.mem_slots, D))

    def initial_state(self, batch):
        """The BankState before the first token. The bank is the identity, and reads as nothing:
        keys and values of zero stand for it until the first segment is written."""
        c, like = self.config, self.norm.weight  # of its device and type
        M = torch.eye(c.mem_slots, c.n_embd, device=like.device, dtype=like.dtype)
        nothing = (like.new_zeros(batch, c.mem_slots, c.n_head, c.head_dim) for _ in range(2))
        sizes = [(c.n_embd,)] if c.mem_write == "aligned" else 2 * [(c.kv_heads, c.head_dim)]
        rings = [like.new_zeros(batch, c.block_size, *size) for size in sizes]
        return BankState(M.repeat(batch, 1, 1), *nothing, rings)

    def keys_values(self, M):
        """What tokens see of banks (Eq. 1). M (B, S, N, D) -> K and V (B, S, N, nh, hs)"""
        c, slots = self.config, self.norm(M)
        keys = norm_heads(wide(self.w_k(slots)).unflatten(-1, (c.n_head, c.head_dim)), c)
        return keys, wide(self.w_v(slots)).unflatten(-1, (c.n_head, c.head_dim))

    def read(self, h, keys, values):
        """E_mem: each token asks the slots (Eq. 1-2). h (B, S, L, D); keys and values
        (B, S, N, nh, hs) of the bank its segment sees -> (B, S, L, D). L here: of one segment"""
        c = self.config
        q = norm_heads(wide(self.w_q(h)).unflatten(-1, (c.n_head, c.head_dim)), c)
        q, keys, values = q.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1)
        return attend(q, keys, values).view_as(h)

    def output_gate(self, E_mem):
        """g_out (Eq. 3): how much of E_mem (B, L, D) each token takes, of the same shape."""
        return self.w_out(E_mem).sigmoid()                              # Eq. 3

    def content(self, keys, values):
        """C of the `attend` write: each slot asks the segment. keys (not turned, so that content
        has no position) and values of self-attention (B, S, T, nkv, hs) -> (B, S, N, D)"""
        c, n_segments = self.config, keys.size(1)
        q = norm_heads(self.slot_queries.unflatten(-1, (c.n_head, c.head_dim)), c)
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        C = attend(q.expand(len(keys), -1, -1, -1), keys, values)       # (B * S, N, D)
        return C.unflatten(0, (-1, n_segments))

    def gates(self, x, C, repeats=None):
        """Input and forget gate, Eq. 4 and 5, (B, S, N, D), float32. C is what may be written; the
        input gate sees x: C (`attend`) or h (`aligned`). repeats (B, S or more): `LM2.forward`."""
        g_in = wide(self.w_in(x)).sigmoid()                             # Eq. 4
        z = wide(self.w_forget(C)).clamp(max=60)  # beyond 100 `series` would be 0 / 0
        g_forget = z.sigmoid()                                          # Eq. 5
        if repeats is None:
            return g_in, g_forget
        # time dilation: R times `update` is once `update` with other gates, g_forget^R and
        # g_in (1 + g_forget + ... + g_forget^(R-1)) = g_in (1 - g_forget^R) / (1 - g_forget)
        R = repeats[:, :C.size(1), None, None]  # of whole segments
        log_gR = R * F.logsigmoid(z)            # of g_forget^R, exact where g_forget is nearly 1
        series = -log_gR.expm1() / (-z).sigmoid()
        return torch.where(R == 1, g_in, g_in * series), torch.where(R == 1, g_forget, log_gR.exp())

    def update(self, M, C, g_in, g_forget):
        """The bank after a segment, Eq. 6. M, the bank before it, C and gates, all (B, 1, N, D)"""
        return g_in * wide(C).tanh() + g_forget * M                     # Eq. 6 (R times: `gates`)

    def write_attend(self, keys, values, M, repeats=None):
        """Write with any N up to D. keys and values as in `content`, M (B, 1, N, D) -> the bank
        after each segment (B, S, N, D). Content and gates see no bank: only Eq. 6 recurs."""
        C = self.content(keys, values)
        g_in, g_forget = self.gates(C, C, repeats)
        banks = []
        for C_s, g_in_s, g_forget_s in zip(*(x.split(1, dim=1) for x in (C, g_in, g_forget))):
            M = self.update(M, C_s, g_in_s, g_forget_s)
            banks.append(M)
        return torch.cat(banks, dim=1)

    def write_aligned(self, h, M):
        """Write as the paper has it: slot i belongs to position i, so N = T, and writes what that
        token finds in M, even a fresh one. h (B, S, T, D) normed inputs; else as `write_attend`"""
        banks = []
        for h_s in h.split(1, dim=1):
            C = self.read(h_s, *self.keys_values(M))
            g_in, g_forget = self.gates(h_s, C)
            M = self.update(M, C, g_in, g_forget)
            banks.append(M)
        return torch.cat(banks, dim=1)

    def forward(self, h, keys, values, state, pos=0, repeats=None):
        """Read for each token, write each segment that ends here. h (B, L, D) normed inputs of the
        block, keys (not turned) and values (B, L, nkv, hs) of self-attention, of the tokens from
        position pos on, BankState, repeats -> g_out * E_mem (B, L, D), the BankState after them"""
        T, L, aligned = self.config.block_size, h.size(1), self.config.mem_write == "aligned"
        xs = (h,) if aligned else (keys, values)  # what is written from
        begun = pos % T                           # of its first segment: tokens seen before
        n_segments, n_whole = (1 if L == 1 else math.ceil((begun + L) / T)), (begun + L) // T
        require(repeats is None or repeats.shape == (len(h), n_segments),
                f"repeats must have the shape (B, S), here {(len(h), n_segments)}")
        rings = put(state.unwritten, xs, pos)
        if L == 1:  # its segment lies in the rings, in order
            xs = rings
        elif begun:
            xs = [torch.cat((ring[:, :begun], x), 1) for ring, x in zip(state.unwritten, xs)]
        # write: the bank after each whole segment, and what the next segment reads of it
        last = state[:3]
        M, *seen = (x[:, None] for x in last)     # seen: keys and values
        if n_whole:
            xs = [x[:, :n_whole * T].unflatten(1, (n_whole, T)) for x in xs]
            M = self.write_aligned(*xs, M) if aligned else self.write_attend(*xs, M, repeats)
            new = M, *self.keys_values(M)
            seen = [torch.cat(pair, dim=1) for pair in zip(seen, new[1:])]  # (B, n_whole + 1, ..)
            last = (x[:, -1].clone(memory_format=torch.contiguous_format) for x in new)  # no views
        # read: all segments at once, each token in the bank that the segment before left
        before, after = (begun, n_segments * T - begun - L) if n_segments > 1 else (0, 0)
        queries = F.pad(h, (0, 0, before, after)).unflatten(1, (n_segments, -1))
        E_mem = self.read(queries, *(x[:, :n_segments] for x in seen))
        E_mem = E_mem.flatten(1, 2)[:, before:before + L]                # (B, L, D)
        return self.output_gate(E_mem) * E_mem, BankState(*last, rings)  # Eq. 3


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
    """x + E_attn + g_out * E_mem, then the MLP."""

    def __init__(self, config, has_memory):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.norm2 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attention = Attention(config)
        self.memory = MemoryBank(config) if has_memory else None
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, pos, rope, state, within_segment=False, repeats=None):
        """x (B, L, D) of the tokens from position pos on, their rotary angles, the LayerState
        before them, within_segment as in `window_attention`, repeats -> x, the LayerState after"""
        h, bank = self.norm1(x), state.bank
        q, k, v, unturned = self.attention.project(h, rope)
        E, keys, values = self.attention(q, k, v, pos, state[:2], within_segment)
        if self.memory:
            E_gated, bank = self.memory(h, unturned, v, bank, pos, repeats)
            E = E + E_gated
        x = x + self.dropout(E)
        x = x + self.dropout(self.mlp(self.norm2(x)))
        return x, LayerState(keys, values, bank)


class LM2(nn.Module):
    """The language model: embedding, blocks, norm, head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, has_memory=layer < config.n_banks)
                                    for layer in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.head = linear(config.n_embd, config.vocab_size)
        if config.tie_head:
            self.head.weight = self.embedding.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """
        linear layers       normal, std 1/sqrt(fan_in); biases zero
        embedding           normal, std 0.5 (tied: as linear layers); slot queries normal, std 1
        w_v, untied head    zero: memory adds nothing, and the loss is log(vocab_size)
        gates               zero weights, so that they start at their biases: input and output gate
                            half open (closed, they hide the gradient), forget gate +2 (0.88)"""
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(std=0.5)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features ** -0.5)
                if module.bias is not None:
                    module.bias.zero_()
        if not self.config.tie_head:
            self.head.weight.zero_()
        for bank in (block.memory for block in self.blocks if block.memory):
            for layer in (bank.w_v, bank.w_in, bank.w_forget, bank.w_out):
                layer.weight.zero_()
            bank.w_forget.bias.fill_(2.0)
            if bank.config.mem_write != "aligned":
                bank.slot_queries.normal_()

    def initial_state(self, batch):
        """The State before the first token, for `batch` sequences."""
        c = self.config
        kept = 0 if c.attention == "full" else c.block_size
        ring = partial(self.head.weight.new_zeros, batch, kept, c.kv_heads, c.head_dim)
        banks = [block.memory and block.memory.initial_state(batch) for block in self.blocks]
        return State(0, [LayerState(ring(), ring(), bank) for bank in banks])

    def draw_window_dropout(self, device):
        """Besides dropout, all that training does and evaluation does not: in a share of batches
        attention ends at the segment's border -> False, or a bool tensor ()"""
        share = self.config.window_dropout if self.training and self.config.n_banks else 0
        return torch.rand((), device=device) < share if share else False

    def check(self, idx, repeats=None):
        """Raises ValueError where the model cannot run on idx (B, L)."""
        require(idx.size(1) > 0, "idx has no tokens: begin with at least one, such as a newline")
        require(self.head.weight.dtype not in (torch.bfloat16, torch.float16), "half precision is "
                "too coarse for the bank: keep the weights in float32 and use torch.autocast")
        require(repeats is None or (self.config.memory, self.config.mem_write) == ("lm2", "attend"),
                "time dilation needs memory=lm2 and mem_write=attend")

    def features(self, idx, state=None, repeats=None):
        """idx (B, L) token ids, L >= 1; state: the State before them, None at the start of a text;
        repeats as in `forward` -> normed features (B, L, D), the State after. Raises ValueError."""
        self.check(idx, repeats)
        state = state or self.initial_state(len(idx))
        rope = rope_angles(state.pos, idx.size(1), self.config, idx.device)
        within_segment = self.config.attention == "segment" or self.draw_window_dropout(idx.device)
        x, layers = self.dropout(self.embedding(idx)), []
        for block, layer in zip(self.blocks, state.layers):
            x, layer = block(x, state.pos, rope, layer, within_segment, repeats)
            layers.append(layer)
        return self.norm(x), State(state.pos + idx.size(1), layers)

    def forward(self, idx, targets=None, state=None, repeats=None):
        """idx (B, L) token ids, any L >= 1; targets (B, L), -1 where nothing is to be predicted;
        state from an earlier call; repeats (B, S), time dilation: how often each of the S segments
        that idx has tokens of is written if it ends here, None: once -> logits (B, L, vocab_size),
        loss (mean cross-entropy in nats per target, None without targets), state"""
        x, state = self.features(idx, state, repeats)
        logits = self.head(x)
        if targets is None:
            return logits, None, state
        loss = F.cross_entropy(wide(logits).flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss, state

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, compiled=False):
        """Continue idx (B, L), L >= 1: yields the next token of each row (B,), an inference tensor,
        at O(T + N) unless attention="full". temperature 0 is greedy; top_k keeps the k likeliest
        tokens, top_p the likeliest that together reach probability p. compiled: takes seconds for
        each kind of step: the first, those that end a segment, all others. Raises ValueError."""
        state, step = None, self.features
        if compiled:
            require(self.config.attention != "full" and self.config.memory != "rmt",
                    "compiled=True is not for attention=full or memory=rmt: leave it out")
            as_sums = {"post_grad_fusion_options": {"decompose_mm_pass": {}}}
            step = torch.compile(step, options=as_sums)  # matmuls of one token: faster on a CPU
        for chunk in idx.split(16 * self.config.block_size, dim=1):  # a long prompt, in pieces
            x, state = self.features(chunk, state)
        for left in range(max_new_tokens, 0, -1):
            token = draw_token(self.head(x[:, -1]).float(), temperature, top_k, top_p)
            yield token
            if left > 1:
                x, state = step(token[:, None], state)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
        """idx (B, L), L >= 1 -> idx and its continuation (B, L + max_new_tokens); see `stream`."""
        tokens = self.stream(idx, max_new_tokens, temperature, top_k, top_p)
        return torch.cat([idx] + [token[:, None] for token in tokens], dim=1)


def draw_token(logits, temperature=1.0, top_k=None, top_p=None):
    """Draw a token from each row of logits (B, vocab_size) -> (B,)"""
    if temperature == 0:
        return logits.argmax(dim=-1)
    n_tokens = logits.size(-1)
    logits, order = (logits / temperature).topk(min(top_k or n_tokens, n_tokens))  # likeliest first
    probs = logits.softmax(dim=-1)
    if top_p:  # without those whose likelier ones reach it already
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0.0)
    return order.gather(-1, torch.multinomial(probs, num_samples=1)).squeeze(-1)
