"""
RMT: chunks equal the whole, and nothing but memory tokens crosses the border of a segment.
test_lm2.py tests that nothing leaks.
"""
import math
from functools import partial

import pytest
import test_lm2
import torch
from test_lm2 import RMTS, T, in_chunks, random_sizes
from torch.nn import functional as F

from baselines.rmt import RMT
from lib.optim import make_optimizers
from lm2 import LM2Config, rope_angles

make_small = partial(test_lm2.make_small, memory="rmt")


def naive(model, idx):
    """
    RMT written down as in the paper: whole segments, one mask over [read ; text ; write], attention
    in plain sums.
    """
    c, m = model.config, model.config.mem_slots
    hs, n = c.n_embd // c.n_head, T + 2 * m
    kind = ["read"] * m + ["text"] * T + ["write"] * m
    mask = torch.tensor([[i >= j or kind[i] == kind[j] == "read" for j in range(n)]
                         for i in range(n)])
    frequencies = c.rope_theta ** (-torch.arange(0, hs, 2).double() / hs)
    turn = torch.polar(torch.ones(n, hs // 2).double(), torch.arange(n)[:, None] * frequencies)

    def rotary(x):  # (B, n, heads, hs) as complex numbers x_i + x_{i + hs/2} j
        z = torch.complex(x[..., :hs // 2], x[..., hs // 2:]) * turn[:, None]
        return torch.cat((z.real, z.imag), dim=-1)

    memory, logits = model.memory_tokens.expand(len(idx), -1, -1), []
    for segment in idx.split(T, dim=1):
        x = torch.cat((memory, model.embedding(segment), memory), dim=1)
        for block in model.blocks:
            qkv = block.attention.wqkv(block.norm1(x)).unflatten(-1, (-1, hs))
            q, k, v = qkv.split((c.n_head, c.kv_heads, c.kv_heads), dim=2)
            if c.qk_norm:
                q, k = F.rms_norm(q, (hs,), eps=c.norm_eps), F.rms_norm(k, (hs,), eps=c.norm_eps)
            k, v = (a.repeat_interleave(c.n_head // c.kv_heads, dim=2) for a in (rotary(k), v))
            scores = torch.einsum("bqhd,bkhd->bhqk", rotary(q), k) / math.sqrt(hs)
            weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
            y = torch.einsum("bhqk,bkhd->bqhd", weights, v)
            x = x + block.attention.wo(y.flatten(2))
            x = x + block.mlp(block.norm2(x))
        x = model.norm(x)
        memory = x[:, m + T:]
        logits.append(model.head(x[:, m:m + T]))
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("kwargs", RMTS, ids=str)
@torch.no_grad()
def test_agrees_with_a_plain_loop_over_segments(kwargs):
    # float64: five segments in a row pile up float32's rounding, which differs between CPUs
    model, idx = make_small(**kwargs).double(), torch.randint(13, (2, 5 * T))
    torch.testing.assert_close(model(idx)[0], naive(model, idx), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kwargs", RMTS, ids=str)
@torch.no_grad()
def test_streaming_in_random_chunks_equals_the_whole(kwargs):
    # float64: seven segments of these random weights multiply a rounding error by a hundred
    model, generator = make_small(**kwargs).double(), torch.Generator().manual_seed(3)
    idx = torch.randint(13, (2, 7 * T + 5), generator=generator)
    whole = model(idx)[0]
    for largest in (1, 3, T, 3 * T):
        streamed, state = in_chunks(model, idx, random_sizes(idx.size(1), largest, generator))
        torch.testing.assert_close(streamed, whole)
        assert state.pos == idx.size(1)


@torch.no_grad()
def test_cached_generate_equals_recomputing():
    model = make_small()
    idx = torch.randint(13, (2, 17 * T + 3))  # longer than a piece of the prompt
    fast = model.generate(idx, 2 * T, temperature=0)
    for _ in range(2 * T):
        idx = torch.cat((idx, model(idx)[0][:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    assert torch.equal(fast, idx)


@torch.no_grad()
def test_state_does_not_grow():
    model, state, sizes = make_small(), None, []
    for _ in range(6 * T):
        _, _, state = model(torch.randint(13, (1, 1)), state=state)
        tensors = [state.memory_tokens, *(x for layer in state.layers for x in layer)]
        kept = {x.data_ptr(): x.untyped_storage().nbytes() for x in tensors}  # views and all
        sizes.append(sum(kept.values()))
    assert sizes[T:2 * T] == sizes[2 * T:3 * T] == sizes[-T:]


def test_read_tokens_see_each_other():
    model = make_small()
    memory = torch.randn(1, 4, 16, requires_grad=True)
    out, _ = model.run(memory, rope_angles(0, T + 8, model.config, memory.device), [])
    grad, = torch.autograd.grad(out[0, 0].sum(), memory)
    assert (grad[0].abs().sum(dim=-1) > 0).all()


@pytest.mark.parametrize("severed", [False, True])
def test_gradients_reach_earlier_segments_through_memory_and_nothing_else(severed):
    model, embedded = make_small(), []

    def keep(module, args, out):
        out.retain_grad()
        embedded.append(out)
    model.embedding.register_forward_hook(keep)
    _, _, state = model(torch.randint(13, (1, 2 * T)))
    assert not state.layers  # no keys and values cross the border
    if severed:
        state = state._replace(memory_tokens=state.memory_tokens.detach())
    model(torch.randint(13, (1, T)), state=state)[0][0, -1].sum().backward()
    if severed:
        assert embedded[0].grad is None
    else:
        # every token of both segments before, and the first segment's memory before them
        assert (embedded[0].grad[0].abs().sum(dim=-1) > 0).all()
        assert model.memory_tokens.grad.abs().sum() > 0


def test_bfloat16_autocast_trains_and_streams():
    model, idx = make_small(), torch.randint(13, (2, 3 * T + 2))
    with torch.autocast("cpu", torch.bfloat16):
        whole, loss, _ = model(idx, idx)
        sizes = random_sizes(idx.size(1), T, torch.Generator().manual_seed(4))
        streamed, state = in_chunks(model, idx, sizes)
    loss.backward()
    assert state.memory_tokens.dtype == torch.float32
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert (streamed - whole).abs().mean() < 0.05 * whole.abs().mean()
    assert loss.item() == pytest.approx(model(idx, idx)[1].item(), rel=0.05)


def test_initial_memory_is_drawn_like_an_embedding_and_adamw_takes_it():
    model, idx = RMT(LM2Config(vocab_size=13, memory="rmt")), torch.randint(13, (2, 100))
    assert model(idx, idx)[1].item() == pytest.approx(math.log(13), abs=1e-5)
    assert model.memory_tokens.std().item() == pytest.approx(0.5, rel=0.1)
    muon, adam = ({id(p) for p in optimizer.param_groups[0]["params"]}
                  for optimizer in make_optimizers(model, 0.02, 2e-3, 0.0))
    assert id(model.memory_tokens) in adam - muon
    assert adam | muon == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("kwargs", [dict(memory="none"), dict(attention="full")], ids=str)
def test_a_config_of_another_model_is_refused(kwargs):
    (name, value), = kwargs.items()
    with pytest.raises(ValueError, match=f"^{name}={value} is not for"):
        RMT(LM2Config(**(dict(vocab_size=13, memory="rmt") | kwargs)))


def test_learns_to_recall_a_token_of_the_segment_before():
    """
    A symbol stands between blanks in the first segment and is asked for in the second; a guess is
    right 1 time in 8.
    """
    torch.manual_seed(0)
    symbols, blank, question, rows = 8, 8, 9, torch.arange(64)
    model = RMT(LM2Config(vocab_size=10, block_size=T, n_layer=2, n_head=2, n_embd=32, mem_slots=4,
                          memory="rmt"))
    optimizers = make_optimizers(model, 0.02, 5e-3, 0.0)

    def batch():
        answer, idx = torch.randint(symbols, (64,)), torch.full((64, 2 * T), blank)
        asked = torch.randint(T, 2 * T, (64,))
        idx[rows, torch.randint(T, (64,))], idx[rows, asked] = answer, question
        return idx, asked, answer

    for _ in range(120):
        idx, asked, answer = batch()
        F.cross_entropy(model(idx)[0][rows, asked], answer).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    idx, asked, answer = batch()
    assert (model(idx)[0][rows, asked].argmax(dim=-1) == answer).float().mean() > 0.95
    forgetful = model(idx[:, T:])[0]  # the second segment alone
    assert (forgetful[rows, asked - T].argmax(dim=-1) == answer).float().mean() < 0.35
