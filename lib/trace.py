"""
Where a token's memory comes from. With the `attend` write Eq. 6 is linear in the bank, so that each
number of a bank is a sum over the segments that were written,

    M_S = sum over s of (product of g_forget,r for all r > s) * g_in,s * tanh(C_s)
          + (product of all g_forget,r) * M_0

and what a token reads is linear in that sum, once the weights of its read and the norm of each slot
are given. So every segment has its share of a read, and the identity, M_0, has the rest.

    found = trace(model, ids)
    identity, segments = shares(model, found, layer=2, token=-1)

Shapes as in lm2.py: L tokens, S whole segments, T = block_size, N slots, D width, nh heads.
"""
from functools import partial
from typing import NamedTuple

import torch

from lm2 import norm_heads, require


class BankTrace(NamedTuple):
    """
    What the bank of one block did while a text was read: float32, on the CPU.

    g_in      (S, N, D)      the input gate of each segment, Eq. 4
    g_forget  (S, N, D)      its forget gate, Eq. 5
    content   (S, N, D)      tanh(C): what the input gate lets in
    looked    (S, N, nh, T)  where slots looked: weights over a segment's tokens; not with `aligned`
    banks     (S + 1, N, D)  the bank after 0, 1, ..., S segments, Eq. 6
    queries   (L, nh, hs)    what tokens ask the bank with, Eq. 1
    E_mem     (L, D)         what was read; zero in the first segment
    g_out     (L, D)         the output gate, Eq. 3
    """
    g_in: torch.Tensor
    g_forget: torch.Tensor
    content: torch.Tensor
    looked: torch.Tensor
    banks: torch.Tensor
    queries: torch.Tensor
    E_mem: torch.Tensor
    g_out: torch.Tensor


class Trace(NamedTuple):
    """
    What all banks did while a text was read.

    ids     (L,)          the text
    logits  (vocab_size,) after its last token
    banks   {layer, from 0: its BankTrace}
    """
    ids: torch.Tensor
    logits: torch.Tensor
    banks: dict


def attention_weights(q, k):
    """softmax(Q K^T / sqrt(hs)). q (Lq, nh, hs), k (Lk, nkv, hs) -> (Lq, nh, Lk)"""
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
    return (torch.einsum("qhd,khd->qhk", q, k) * q.size(-1) ** -0.5).softmax(-1)


def by_heads(x, memory):
    """x (n, D) as queries (n, nh, hs), normed as memory's config says."""
    c = memory.config
    return norm_heads(x.unflatten(-1, (c.n_head, c.head_dim)), c)


def note(seen, memory, inputs, outputs):
    """
    A hook of a MemoryBank: adds what it did with one segment to `seen`, a BankTrace whose fields
    are still lists. It calls the parts of MemoryBank.forward once more: change both together.
    """
    h, keys, values, before, *_ = inputs
    _, after = outputs
    E_mem = memory.read(h[:, None], before.keys[:, None], before.values[:, None])[0, 0]
    seen.queries.append(by_heads(memory.w_q(h[0]), memory))
    seen.E_mem.append(E_mem)
    seen.g_out.append(memory.output_gate(E_mem))
    if h.size(1) < memory.config.block_size:
        return  # the rest of the text is not written
    if memory.config.mem_write == "attend":
        C = memory.content(keys[:, None], values[:, None])
        g_in, g_forget = memory.gates(C, C)
        seen.looked.append(attention_weights(by_heads(memory.slot_queries, memory), keys[0])[None])
    else:
        C = memory.read(h[:, None], *memory.keys_values(before.M[:, None]))
        g_in, g_forget = memory.gates(h[:, None], C)
    seen.g_in.append(g_in[0])
    seen.g_forget.append(g_forget[0])
    seen.content.append(C[0].tanh())
    seen.banks.append(after.M)


@torch.no_grad()
def trace(model, ids):
    """
    Read a text with a model, segment by segment. ids (L,) -> Trace: its banks are BankTraces, which
    say names and shapes (`help(BankTrace)`); their size grows with L. Raises ValueError for a model
    without banks and a text without tokens.
    """
    c = model.config
    require(c.n_banks, f"memory={c.memory} with mem_layers={c.mem_layers} has no bank to look "
            "into: name a run with banks")
    layers = {layer: block.memory for layer, block in enumerate(model.blocks) if block.memory}
    state, ids = model.initial_state(1), ids.to(model.head.weight.device)
    seen, hooks = {}, []
    for layer, memory in layers.items():
        seen[layer] = BankTrace(*([] for _ in BankTrace._fields))
        seen[layer].banks.append(state.layers[layer].bank.M)
        hooks.append(memory.register_forward_hook(partial(note, seen[layer])))
    try:
        for segment in ids[None].split(c.block_size, dim=1):
            x, state = model.features(segment, state)
    finally:
        for hook in hooks:
            hook.remove()
    none = torch.zeros(0, c.mem_slots, c.n_embd)  # of a text shorter than a segment
    banks = {layer: BankTrace._make(torch.cat(parts).float().cpu() if parts else none
                                    for parts in found)
             for layer, found in seen.items()}
    return Trace(ids.cpu(), model.head(x[0, -1]).float().cpu(), banks)


@torch.no_grad()
def read_weights(model, found, layer, tokens, s):
    """
    Where tokens would look in the bank as it stood after s segments (Eq. 2). tokens: a slice
    -> (tokens, N, nh). After 0 segments there is nothing to read, and all slots weigh the same.
    """
    memory, bank = model.blocks[layer].memory, found.banks[layer]
    keys, _ = memory.keys_values(bank.banks[s].to(memory.norm.weight))
    keys = keys if s else torch.zeros_like(keys)
    weights = attention_weights(bank.queries[tokens].to(keys), keys)
    return weights.transpose(1, 2).float().cpu()


# --- Shares

@torch.no_grad()
def effects(model, found, layer, token):
    """
    What each number of the bank that a token reads does to what its block adds to it, g_out *
    E_mem, along that direction (N, D): their products with the bank's numbers sum to 1. Raises
    ValueError where nothing is read, and with `aligned`, whose content comes from the bank.
    """
    c, memory, bank = model.config, model.blocks[layer].memory, found.banks[layer]
    require(c.mem_write == "attend", "a bank written by mem_write=aligned is no sum over segments: "
            "what it writes comes from the bank")
    token = range(len(found.ids))[token]
    s = token // c.block_size
    g_out, E_mem = bank.g_out[token].double(), bank.E_mem[token].double()
    added = g_out * E_mem
    require(added.any(), f"token {token} reads nothing: memory is empty in the first segment, and "
            "gives nothing before it is trained")
    # g_out * E_mem is linear in the bank: each step from there back to its numbers
    of_E_mem = g_out * added / added.square().sum()                     # (D,)
    reads = read_weights(model, found, layer, slice(token, token + 1), s)[0].double()
    of_values = reads.repeat_interleave(c.head_dim, dim=-1) * of_E_mem  # (N, D) of V, by head
    of_normed = of_values @ memory.w_v.weight.cpu().double()            # V = norm(M) W_V
    M = bank.banks[s].double()
    norm = (M.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()      # (N, 1), as it is
    return of_normed * memory.norm.weight.cpu().double() / norm


def contributions(model, found, layer, token):
    """
    What each number of a bank brings along to what a token reads, by the segment that wrote it
    -> (s + 1, N, D): what is left of the identity, then of the s segments before the token's. Their
    sum is 1. Raises as `effects`.
    """
    s = range(len(found.ids))[token] // model.config.block_size
    bank = found.banks[layer]
    written = torch.cat((bank.banks[:1], bank.g_in[:s] * bank.content[:s])).double()
    # of three segments the identity keeps g_0 g_1 g_2, the first one g_1 g_2, then g_2, then 1
    g_forget = torch.cat((bank.g_forget[:s], torch.ones_like(bank.banks[:1]))).double()
    kept = g_forget.flip(0).cumprod(0).flip(0)
    return written * kept * effects(model, found, layer, token)


def shares(model, found, layer, token):
    """
    The shares of the identity, (), and of each segment before the token's, (s,), in what a token
    reads. They sum to 1; one that points the other way is negative. Raises as `contributions`.
    """
    by_segment = contributions(model, found, layer, token).sum((1, 2))
    return by_segment[0], by_segment[1:]


def token_shares(model, found, layer, token):
    """
    The shares of the s * T tokens before the token's segment (s * T,). Raises as `contributions`.
    """
    return carried_on(found, layer, contributions(model, found, layer, token))


def carried_on(found, layer, parts):
    """
    What `contributions` found of s segments, carried on to their tokens (s * T,): by where the
    slots looked, head by head.
    """
    looked = found.banks[layer].looked[:len(parts) - 1].double()        # (s, N, nh, T)
    by_head = parts[1:].unflatten(-1, (looked.size(2), -1)).sum(-1)     # (s, N, nh)
    return torch.einsum("snh,snht->st", by_head, looked).flatten()
