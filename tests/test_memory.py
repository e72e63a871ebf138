"""
The memory bank against a NumPy reference that is written from the paper's equations, one segment
after the other.
"""
import numpy as np
import pytest
import torch

from lib.checkpoint import make_model
from lm2 import LM2, LM2Config, MemoryBank, norm_heads

T, N, D, HEADS, SEGMENTS, BATCH = 6, 4, 16, 2, 3, 2
ALIGNED = dict(mem_write="aligned", mem_slots=T)
CASES = [dict(), dict(qk_norm=False), ALIGNED, dict(qk_norm=False, **ALIGNED)]
REPEATS = np.array([[1, 3, 1], [4, 1, 7]])  # (B, S), of time dilation
WITH_REPEATS = [(case, None) for case in CASES] + [(case, REPEATS) for case in CASES[:1]]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms_norm(x, config):
    return x / np.sqrt(np.mean(x ** 2, axis=-1, keepdims=True) + config.norm_eps)


def qk_norm(x, config):
    """Each head of queries or keys (L, D) by itself."""
    return rms_norm(x.reshape(len(x), HEADS, -1), config).reshape(x.shape) if config.qk_norm else x


def cross_attention(q, k, v):
    """softmax(Q K^T / sqrt(d)) V, head by head. q (Lq, D), k and v (Lk, D) -> (Lq, D)"""
    d, heads = D // HEADS, []
    for i in range(HEADS):
        columns = slice(i * d, (i + 1) * d)
        scores = q[:, columns] @ k[:, columns].T / np.sqrt(d)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        heads.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, columns])
    return np.concatenate(heads, axis=1)


def reference(bank, h, k, v, M, repeats=None):
    """
    One row of a batch: h and keys and values of self-attention, their heads side by side (S, T, D),
    M (N, D), how often each segment is written (S,)
    -> g_out * E_mem (S, T, D), the bank at the end (N, D)
    """
    config = bank.config
    p = {name: value.detach().numpy() for name, value in bank.named_parameters()}
    outputs = []
    repeats = np.ones(len(h), dtype=int) if repeats is None else repeats
    for h_s, k_s, v_s, R in zip(h, k, v, repeats):
        slots = rms_norm(M, config) * p["norm.weight"]
        Q = h_s @ p["w_q.weight"].T                                            # Eq. 1
        K, V = slots @ p["w_k.weight"].T, slots @ p["w_v.weight"].T            # Eq. 1
        Q, K = qk_norm(Q, config), qk_norm(K, config)
        E = cross_attention(Q, K, V)                                           # Eq. 2
        g_out = sigmoid(E @ p["w_out.weight"].T + p["w_out.bias"])             # Eq. 3
        outputs.append(g_out * E)
        if config.mem_write == "attend":
            C = cross_attention(qk_norm(p["slot_queries"], config), k_s, v_s)
            x = C
        else:
            C, x = E, h_s
        g_in = sigmoid(x @ p["w_in.weight"].T + p["w_in.bias"])                # Eq. 4
        g_forget = sigmoid(C @ p["w_forget.weight"].T + p["w_forget.bias"])    # Eq. 5
        for _ in range(R):
            M = g_in * np.tanh(C) + g_forget * M                               # Eq. 6
    return np.stack(outputs), M


def make_bank(**kwargs):
    """A bank with every parameter drawn at random, and inputs for it, all in float64."""
    torch.manual_seed(0)
    kwargs = dict(mem_slots=N) | kwargs
    config = LM2Config(vocab_size=11, n_embd=D, block_size=T, n_head=HEADS, **kwargs)
    bank = MemoryBank(config).double()
    for p in bank.parameters():
        torch.nn.init.normal_(p, std=0.5)
    h, k, v = torch.randn(3, BATCH, SEGMENTS * T, D).double()
    k = norm_heads(k.unflatten(-1, (HEADS, -1)), config).flatten(2)
    return bank, h, k, v, torch.randn(BATCH, config.mem_slots, D).double()


def run(bank, h, k, v, M, repeats=None):
    """
    As `reference` does it, for a batch whose bank was written before: h, k, v (B, S * T, D),
    M (B, N, D) -> g_out * E_mem, the bank at the end
    """
    keys, values = bank.keys_values(M[:, None])
    k, v = k.unflatten(-1, (HEADS, -1)), v.unflatten(-1, (HEADS, -1))
    state = bank.initial_state(len(h))._replace(M=M, keys=keys[:, 0], values=values[:, 0])
    repeats = None if repeats is None else torch.from_numpy(repeats)
    out, state = bank(h, k, v, state, repeats=repeats)
    return out, state.M


def rows(*tensors):
    """(S * T, D) -> (S, T, D) for NumPy"""
    return [x.detach().view(SEGMENTS, T, D).numpy() for x in tensors]


@pytest.mark.parametrize("kwargs, repeats", WITH_REPEATS, ids=str)
def test_values_agree_with_numpy(kwargs, repeats):
    bank, h, k, v, M = make_bank(**kwargs)
    out, after = run(bank, h, k, v, M, repeats)
    for b in range(BATCH):
        often = None if repeats is None else repeats[b]
        expected, expected_after = reference(bank, *rows(h[b], k[b], v[b]), M[b].numpy(), often)
        found = out[b].view(SEGMENTS, T, D).detach()
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(after[b].detach(), expected_after, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kwargs, repeats", WITH_REPEATS, ids=str)
def test_gradients_agree_with_finite_differences_of_numpy(kwargs, repeats):
    bank, *inputs = make_bank(**kwargs)
    often = None if repeats is None else repeats[1]
    h, k, v, M = inputs = [x[:1].requires_grad_() for x in inputs]
    generator = np.random.default_rng(0)
    # a random direction to look along
    a, b = generator.normal(size=h.shape[1:]), generator.normal(size=M.shape[1:])

    def scalar():
        out, after = reference(bank, *rows(h[0], k[0], v[0]), M[0].detach().numpy(), often)
        return np.sum(out.reshape(-1, D) * a) + np.sum(after * b)

    out, after = run(bank, *inputs, None if repeats is None else repeats[1:])
    ((out[0] * torch.from_numpy(a)).sum() + (after[0] * torch.from_numpy(b)).sum()).backward()
    written = dict(k=k, v=v) if bank.config.mem_write == "attend" else {}
    for name, x in dict(bank.named_parameters(), h=h, M=M, **written).items():
        flat = x.detach().view(-1)
        for i in generator.choice(len(flat), size=min(5, len(flat)), replace=False):
            was, eps = flat[i].item(), 1e-6
            flat[i] = was + eps
            up = scalar()
            flat[i] = was - eps
            down = scalar()
            flat[i] = was
            slope = (up - down) / (2 * eps)
            assert x.grad.view(-1)[i].item() == pytest.approx(slope, rel=1e-4, abs=1e-7), name


# --- Time dilation

def bank_of_logits(z):
    """A float32 bank whose forget gate has these logits (D,) for any content."""
    bank = MemoryBank(LM2Config(vocab_size=11, n_embd=D, block_size=T, n_head=HEADS, mem_slots=N))
    for p in bank.parameters():
        torch.nn.init.normal_(p, std=0.5)
    torch.nn.init.zeros_(bank.w_forget.weight)
    bank.w_forget.bias.data.copy_(z)
    return bank


@pytest.mark.parametrize("R", [2, 64, 1000, 10_000])
def test_a_segment_that_counts_often_is_stable_for_logits_from_minus_30_to_30(R):
    torch.manual_seed(0)
    z = torch.linspace(-30, 30, D)
    bank, C = bank_of_logits(z), torch.randn(1, 1, N, D, requires_grad=True)
    g_in, g_forget = bank.gates(C, C, torch.full((1, 1), float(R)))
    z = z.double().numpy()
    log_kept, lost = -R * np.log1p(np.exp(-z)), sigmoid(-z)     # of g^R; 1 - g
    once, _ = bank.gates(C, C)
    np.testing.assert_allclose(g_forget.detach()[0, 0, 0], np.exp(log_kept), rtol=1e-3, atol=1e-25)
    np.testing.assert_allclose((g_in / once).detach()[0, 0, 0], -np.expm1(log_kept) / lost,
                               rtol=1e-4)
    (slope,) = torch.autograd.grad(g_forget.sum(), bank.w_forget.bias, retain_graph=True)
    expected = N * R * np.exp(log_kept) * lost                   # of g^R, by the logit of g
    np.testing.assert_allclose(slope, expected, rtol=1e-3, atol=1e-20)
    (g_in.sum() + g_forget.sum()).backward()
    assert C.grad.isfinite().all() and bank.w_forget.bias.grad.isfinite().all()


def test_saturated_forget_gates_give_finite_gradients():
    bank = bank_of_logits(torch.linspace(-1e4, 1e4, D))
    C = torch.randn(1, 1, N, D, requires_grad=True)
    sum(gate.sum() for gate in bank.gates(C, C, torch.full((1, 1), 100.0))).backward()
    for x in (C, *bank.w_forget.parameters(), *bank.w_in.parameters()):
        assert x.grad.isfinite().all()


def test_segments_that_count_once_are_what_they_were_bit_for_bit():
    torch.manual_seed(0)
    model = LM2(LM2Config(vocab_size=11, n_layer=2, n_embd=D, n_head=HEADS, block_size=T,
                          mem_slots=N))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    idx = torch.randint(11, (2, 3 * T + 2))
    found = []
    for repeats in (None, torch.ones(2, 4)):
        model.zero_grad()
        logits, loss, state = model(idx, idx, repeats=repeats)
        loss.backward()
        found.append([logits, state.layers[1].bank.M, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found))
    # and one that counts often changes what follows in its row, nothing else
    often = model(idx, repeats=torch.tensor([[1, 50.0, 1, 1], [1, 1, 1, 1]]))[0]
    assert not torch.allclose(often[0, 2 * T:], found[0][0][0, 2 * T:])
    assert torch.equal(often[1], found[0][0][1]) and torch.equal(often[0, :2 * T],
                                                                 found[0][0][0, :2 * T])


def test_a_segment_may_be_written_often_in_any_chunks():
    torch.manual_seed(0)
    model = LM2(LM2Config(vocab_size=11, n_layer=2, n_embd=D, n_head=HEADS, block_size=T,
                          mem_slots=N))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    idx, repeats = torch.randint(11, (1, 3 * T)), torch.tensor([[3.0, 20.0, 1.0]])
    whole = model(idx, repeats=repeats)[0]
    first, _, state = model(idx[:, :T + 2], repeats=repeats[:, :2])
    rest = model(idx[:, T + 2:], state=state, repeats=repeats[:, 1:])[0]
    torch.testing.assert_close(torch.cat((first, rest), dim=1), whole)


@pytest.mark.parametrize("shape", [(2, 3), (2, 5), (1, 4), (2, 1), (4,)], ids=str)
def test_repeats_of_another_shape_are_refused(shape):
    config = LM2Config(vocab_size=11, n_layer=1, n_embd=D, n_head=HEADS, block_size=T,
                       mem_slots=N)
    with pytest.raises(ValueError, match=r"^repeats must have the shape \(B, S\), here \(2, 4\)$"):
        LM2(config)(torch.zeros(2, 3 * T + 1, dtype=torch.long), repeats=torch.ones(shape))


@pytest.mark.parametrize("kwargs", [ALIGNED, dict(memory="none"), dict(memory="rmt")], ids=str)
def test_time_dilation_needs_the_attend_write(kwargs):
    config = LM2Config(vocab_size=11, n_layer=1, n_embd=D, n_head=HEADS, block_size=T, **kwargs)
    with pytest.raises(ValueError, match="^time dilation needs memory=lm2 and mem_write=attend$"):
        make_model(config)(torch.zeros(1, T, dtype=torch.long), repeats=torch.ones(1, 1))


# --- The bank in the model

def test_bank_starts_as_identity_and_reads_as_nothing():
    bank, h, *_ = make_bank()
    state = bank.initial_state(BATCH)
    for M in state.M:
        np.testing.assert_array_equal(M, np.eye(N, D))
    assert not bank.read(h[:, None], state.keys[:, None], state.values[:, None]).any()


def gates_at(bank, g_in=None, g_forget=None):
    """Fix gates by their biases: 1 is open, 0 is closed."""
    for layer, value in ((bank.w_in, g_in), (bank.w_forget, g_forget)):
        if value is not None:
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.constant_(layer.bias, 1e4 if value else -1e4)


@pytest.mark.parametrize("kwargs", CASES, ids=str)
def test_closed_input_gate_and_open_forget_gate_keep_the_bank(kwargs):
    bank, *inputs = make_bank(**kwargs)
    gates_at(bank, g_in=0, g_forget=1)
    assert torch.equal(run(bank, *inputs)[1], inputs[-1])


@pytest.mark.parametrize("kwargs", CASES, ids=str)
def test_closed_forget_gate_erases_the_bank(kwargs):
    bank, *inputs = make_bank(**kwargs)
    gates_at(bank, g_in=0, g_forget=0)
    assert not run(bank, *inputs)[1].any()


@pytest.mark.parametrize("kwargs", CASES[:1] + CASES[3:4], ids=str)
def test_gates_lie_between_0_and_1(kwargs):
    bank, h, k, v, M = make_bank(**kwargs)
    keys, values = bank.keys_values(M[:, None])
    E = C = bank.read(h[:, None], keys, values)
    if bank.config.mem_write == "attend":
        C = bank.content(*(x.view(BATCH, SEGMENTS, T, HEADS, -1) for x in (k, v)))
    for gate in (bank.output_gate(E), *bank.gates(C, C)):
        assert (gate > 0).all() and (gate < 1).all()


def test_gates_start_half_open_but_the_forget_gate_at_its_bias_of_2():
    bank = LM2(LM2Config(vocab_size=11)).blocks[0].memory
    C = torch.randn(1, 16, 128)
    for gate, bias in zip((*bank.gates(C, C), bank.output_gate(C)), (0.0, 2.0, 0.0)):
        torch.testing.assert_close(gate, torch.full_like(gate, bias).sigmoid())


def test_bank_stays_float32_under_autocast():
    model = LM2(LM2Config(vocab_size=11, n_layer=1, block_size=T))
    with torch.autocast("cpu", torch.bfloat16):
        _, _, state = model(torch.randint(11, (1, 2 * T)))
        C = torch.randn(1, T, 128, dtype=torch.bfloat16)
        gates = model.blocks[0].memory.gates(C, C)
    assert {x.dtype for x in (state.layers[0].bank.M, *gates)} == {torch.float32}


@pytest.mark.parametrize("write", ["attend", "aligned"])
def test_what_is_written_does_not_depend_on_where_the_segment_stands(write):
    torch.manual_seed(0)
    model = LM2(LM2Config(vocab_size=11, n_layer=1, n_embd=D, n_head=HEADS, block_size=T,
                          mem_slots=T, mem_write=write))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    before, segment = torch.randint(11, (2, 1, T))
    first = model(segment)[2].layers[0].bank.M
    state, fresh = model(before)[2], model.initial_state(1).layers[0].bank
    state = state._replace(layers=[state.layers[0]._replace(bank=fresh)])
    later = model(segment, state=state)[2].layers[0].bank.M
    torch.testing.assert_close(later, first)


@pytest.mark.parametrize("write", ["attend", "aligned"])
def test_closed_output_gate_gives_the_decoder_without_memory(write):
    torch.manual_seed(0)
    kwargs = dict(vocab_size=11, n_layer=2, n_embd=D, n_head=HEADS, block_size=T, mem_slots=T)
    model = LM2(LM2Config(mem_write=write, **kwargs))
    vanilla = LM2(LM2Config(memory="none", **kwargs))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    for block in model.blocks:
        torch.nn.init.zeros_(block.memory.w_out.weight)
        torch.nn.init.constant_(block.memory.w_out.bias, -1e4)
    vanilla.load_state_dict({name: p for name, p in model.state_dict().items()
                             if "memory" not in name})
    idx = torch.randint(11, (2, 3 * T + 2))
    assert torch.equal(model(idx)[0], vanilla(idx)[0])
