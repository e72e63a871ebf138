"""The model: nothing leaks, chunks equal the whole, training and evaluation compute the same."""
import copy
import io
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lib.checkpoint import make_model
from lib.optim import make_optimizers
from lm2 import (
    LM2,
    LM2Config,
    MemoryBank,
    attend,
    draw_token,
    norm_heads,
    rope_angles,
    window_attention,
)

T = 8
WRITES = [dict(mem_write="attend", mem_slots=5), dict(mem_write="aligned", mem_slots=T)]
MODELS = WRITES + [dict(attention="full"), dict(attention="segment"), dict(memory="none"),
                   dict(memory="none", attention="full"), dict(mem_layers=1), dict(n_kv_head=1)]
RMTS = [dict(memory="rmt"), dict(memory="rmt", n_kv_head=1), dict(memory="rmt", mem_slots=1),
        dict(memory="rmt", mem_slots=T + 2, qk_norm=False)]
in_both_modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def make_small(seed=0, training=False, **kwargs):
    """
    A small model with every parameter drawn at random, so that nothing is zero by chance of
    initialisation.
    """
    torch.manual_seed(seed)
    small = dict(vocab_size=13, block_size=T, n_layer=3, n_head=2, n_embd=16, mem_slots=4)
    model = make_model(LM2Config(**small | kwargs))
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model.train(training)


def tokens(*shape, seed=1):
    return torch.randint(13, shape, generator=torch.Generator().manual_seed(seed))


def in_chunks(model, idx, sizes):
    state, logits = None, []
    for piece in idx.split(sizes, dim=1):
        out, _, state = model(piece, state=state)
        logits.append(out)
    return torch.cat(logits, dim=1), state


def random_sizes(total, largest, generator):
    sizes = []
    while sum(sizes) < total:
        size = int(torch.randint(1, largest + 1, (1,), generator=generator))
        sizes.append(min(size, total - sum(sizes)))
    return sizes


@in_both_modes
@pytest.mark.parametrize("kwargs", MODELS + RMTS, ids=str)
@torch.no_grad()
def test_no_later_token_changes_an_earlier_logit(kwargs, training):
    model, generator = make_small(training=training, **kwargs), torch.Generator().manual_seed(1)
    idx = tokens(2, 5 * T + 3)
    before = model(idx)[0]
    anywhere = torch.randint(0, idx.size(1) - 1, (12,), generator=generator).tolist()
    for position in [T - 1, T, 2 * T - 1, *anywhere]:
        changed = idx.clone()
        later = changed[:, position + 1:]
        later += torch.randint(1, 13, later.shape, generator=generator)
        after = model(changed % 13)[0]
        assert torch.equal(before[:, :position + 1], after[:, :position + 1]), \
            f"a token after position {position} leaks"
        assert not torch.equal(before[:, position + 1], after[:, position + 1])


@in_both_modes
@pytest.mark.parametrize("kwargs", MODELS + RMTS, ids=str)
@torch.no_grad()
def test_no_logit_depends_on_how_many_tokens_follow(kwargs, training):
    model, idx = make_small(training=training, **kwargs), tokens(2, 4 * T)
    whole = model(idx)[0]
    for length in (1, T - 1, T, T + 1, 2 * T, 3 * T + 2):
        torch.testing.assert_close(model(idx[:, :length])[0], whole[:, :length],
                                   rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kwargs", MODELS + RMTS, ids=str)
@torch.no_grad()
def test_training_computes_what_evaluation_does(kwargs):
    model, idx = make_small(**kwargs), tokens(2, 4 * T + 3)
    for length in (T - 2, T, idx.size(1)):
        evaluated = model.eval()(idx[:, :length])[0]
        assert torch.equal(model.train()(idx[:, :length])[0], evaluated)


@pytest.mark.parametrize("kwargs", WRITES, ids=str)
@torch.no_grad()
def test_an_early_token_reaches_far_beyond_the_windows_through_memory(kwargs):
    idx = tokens(1, 8 * T, seed=2)
    changed = idx.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 13
    model, vanilla = make_small(**kwargs), make_small(memory="none")
    assert not torch.equal(model(idx)[0][:, -1], model(changed)[0][:, -1])
    assert torch.equal(vanilla(idx)[0][:, -1], vanilla(changed)[0][:, -1])


def tensors_of(state):
    """All tensors of a State, whatever it is made of."""
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state if isinstance(state, (tuple, list)) else []
    return [x for part in parts for x in tensors_of(part)]


@in_both_modes
@pytest.mark.parametrize("kwargs", MODELS, ids=str)
@torch.no_grad()
def test_layer_parallel_equals_the_loop_over_segments(kwargs, training):
    model, idx = make_small(training=training, **kwargs), tokens(2, 6 * T)
    whole, _, state = model(idx)
    looped, looped_state = in_chunks(model, idx, [T] * 6)
    torch.testing.assert_close(looped, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tensors_of(looped_state), tensors_of(state), rtol=1e-4, atol=1e-5)


@in_both_modes
@pytest.mark.parametrize("kwargs", [*MODELS, dict(window_dropout=0.999999)], ids=str)
@torch.no_grad()
def test_streaming_in_random_chunks_equals_the_whole(kwargs, training):
    model, generator = make_small(training=training, **kwargs), torch.Generator().manual_seed(3)
    idx = tokens(2, 7 * T + 5)
    whole = model(idx)[0]
    for largest in (1, 3, T, 3 * T):
        sizes = random_sizes(idx.size(1), largest, generator)
        streamed, state = in_chunks(model, idx, sizes)
        torch.testing.assert_close(streamed, whole, rtol=1e-4, atol=1e-5)
        assert state.pos == idx.size(1)


def test_what_is_generated_can_be_trained_on():
    model = make_small()
    idx = model.generate(torch.zeros(1, 1, dtype=torch.long), T)
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    assert model.blocks[0].attention.wqkv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kwargs", MODELS, ids=str)
@torch.no_grad()
def test_cached_generate_equals_recomputing(kwargs):
    model = make_small(**kwargs)
    idx = tokens(2, 17 * T + 3)  # longer than a piece of the prompt
    fast = model.generate(idx, 3 * T, temperature=0)
    for _ in range(3 * T):
        idx = torch.cat((idx, model(idx)[0][:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    assert torch.equal(fast, idx)


@torch.no_grad()
def test_generate_reads_each_token_once(monkeypatch):
    model, read = make_small(), []
    features = model.features
    monkeypatch.setattr(model, "features", lambda idx, state=None: (
        read.append(idx.size(1)), features(idx, state))[1])
    model.generate(tokens(2, 17 * T + 3), 3 * T)
    assert read == [16 * T, T + 3] + [1] * (3 * T - 1)


@pytest.mark.parametrize("kwargs", [dict(n_layer=2, mem_layers=1, **WRITES[0]), WRITES[1],
                                    dict(attention="segment"), dict(memory="none", n_kv_head=1)],
                         ids=str)
def test_compiled_streaming_is_one_graph_a_kind_of_token(kwargs, monkeypatch):
    model, idx, real = make_small(**{"n_layer": 1} | kwargs), tokens(1, T + 3), torch.compile
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    expected = list(model.stream(idx, 5 * T, temperature=0))
    monkeypatch.setattr(torch, "compile", lambda function, options: real(
        function, backend="eager", fullgraph=True))  # what is compiled is traced, and runs as it is
    assert list(model.stream(idx, 5 * T, temperature=0, compiled=True)) == expected
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= 3, "the first token, others, the last of a segment"


def test_compiled_streaming_of_a_model_of_another_size_has_no_break(monkeypatch):
    torch.compiler.reset()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, options: real(
        function, backend="eager", fullgraph=True))
    for n_head in (2, 4):
        model = make_small(n_layer=1, n_embd=8 * n_head, n_head=n_head)
        assert len(list(model.stream(tokens(1, T + 3), T, compiled=True))) == T


@pytest.mark.parametrize("kwargs", [dict(attention="full"), dict(memory="rmt")], ids=str)
def test_compiled_streaming_needs_a_state_of_fixed_size(kwargs):
    with pytest.raises(ValueError, match="^compiled=True is not for attention=full or memory=rmt"):
        next(make_small(**kwargs).stream(tokens(1, 3), 3, compiled=True))


def test_generate_from_no_tokens_says_what_is_wrong():
    for model in (make_small(), make_small(memory="rmt")):
        nothing = torch.zeros(1, 0, dtype=torch.long)
        with pytest.raises(ValueError, match="no tokens: begin with at least one"):
            model.generate(nothing, 3)


@pytest.mark.parametrize("kwargs", [*WRITES, dict(memory="none")], ids=str)
@pytest.mark.parametrize("chunk", [1, 3, 2 * T])
@torch.no_grad()
def test_the_shapes_of_a_state_are_fixed(kwargs, chunk):
    model = make_small(**kwargs)
    first = state = model.initial_state(1)
    for _ in range(3 * T):
        _, _, state = model(tokens(1, chunk), state=state)
        assert [x.shape for x in tensors_of(state)] == [x.shape for x in tensors_of(first)]


@torch.no_grad()
def test_a_state_is_a_value():
    model, idx = make_small(), tokens(1, 9 * T + 3)
    _, _, state = model(idx)
    kept = copy.deepcopy(state)
    onward = in_chunks(model, idx, [1] * idx.size(1))[0]
    for _ in range(T):
        model(idx[:, :1], state=state)
    torch.testing.assert_close(tensors_of(state), tensors_of(kept), rtol=0, atol=0)
    torch.save(state, file := io.BytesIO())
    n_bytes = sum(4 * x.numel() for x in tensors_of(state))
    assert file.tell() < 1.1 * n_bytes + 10_000, "it keeps banks of segments that are long past"
    torch.testing.assert_close(onward, model(idx)[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_bank_is_projected_once_a_segment(monkeypatch):
    model, calls, project = make_small(), [], MemoryBank.keys_values

    def counted(bank, M):
        calls.append(bank)
        return project(bank, M)
    monkeypatch.setattr(MemoryBank, "keys_values", counted)
    in_chunks(model, tokens(1, 3 * T), [1] * 3 * T)
    assert [calls.count(block.memory) for block in model.blocks] == [3, 3, 3]


@torch.no_grad()
def test_the_first_segment_reads_nothing_and_the_second_reads():
    model, idx = make_small(), tokens(2, 2 * T)
    read = model(idx)[0]
    for block in model.blocks:
        block.memory.output_gate = torch.zeros_like  # silenced by hand
    silent = model(idx)[0]
    assert torch.equal(read[:, :T], silent[:, :T])
    assert not torch.isclose(read[:, T:], silent[:, T:]).all(dim=-1).any()


def masked_attention(q, k, v, visible):
    """Attention in plain sums, where visible (Lq, Lk) is True."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.size(-1) ** 0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


@pytest.mark.parametrize("within_segment", [False, True, torch.tensor(True), torch.tensor(False)],
                         ids=str)
@torch.no_grad()
def test_window_attention_is_masked_full_attention(within_segment):
    for pos, length in ((0, 3), (0, T), (0, 4 * T + 1), (5, 1), (T - 1, T), (3, 2 * T), (T, 1),
                        (T - 1, 3 * T + 2), (2 * T + 3, 3 * T + 1), (5 * T, 2 * T), (T + 2, 3)):
        past = min(pos, T - 1)
        q = torch.randn(2, length, 2, 4)
        k, v = torch.randn(2, 2, past + length, 2, 4)
        i = torch.arange(pos, pos + length)[:, None]
        j = torch.arange(pos - past, pos + length)[None]
        visible = (j <= i) & (j > i - T)
        if within_segment:
            visible &= i // T == j // T
        torch.testing.assert_close(window_attention(q, k, v, T, pos, within_segment),
                                   masked_attention(q, k, v, visible))


@torch.no_grad()
def test_segment_attention_reads_each_segment_as_a_text_of_its_own():
    model, idx = make_small(memory="none", attention="segment"), tokens(2, 3 * T)
    alone = [model(segment)[0] for segment in idx.split(T, dim=1)]  # only distances turn a head
    torch.testing.assert_close(model(idx)[0], torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory, share", [("lm2", 0.0), ("lm2", 0.5), ("none", 0.5)])
@torch.no_grad()
def test_window_dropout_ends_attention_at_the_border_in_a_share_of_training_batches(memory, share):
    model = make_small(memory=memory, window_dropout=share)
    for block in model.blocks:
        if block.memory:
            block.memory.w_v.weight.zero_()  # nothing is read: only attention crosses the border
    idx = tokens(1, 3 * T, seed=3)
    changed = idx.clone()
    changed[0, T - 1] = (changed[0, T - 1] + 1) % 13

    def crosses(seed):
        logits = []
        for ids in (idx, changed):
            torch.manual_seed(seed)
            logits.append(model(ids)[0][:, T:])
        return not torch.equal(*logits)

    assert all(crosses(seed) for seed in range(5)), "never outside of training"
    model.train()
    crossed = sum(crosses(seed) for seed in range(60))
    assert 18 <= crossed <= 42 if memory == "lm2" and share else crossed == 60


# --- What a student may change

def test_a_config_can_be_changed_by_replace():
    config = LM2Config(vocab_size=13, n_layer=4, n_head=4, n_embd=32)
    deeper = LM2(replace(config, n_layer=8))
    assert sum(block.memory is not None for block in deeper.blocks) == 8
    assert replace(config, n_head=8).kv_heads == 8
    assert replace(config, memory="none").n_banks == 0


@pytest.mark.parametrize("kwargs", [dict(), dict(memory="rmt")], ids=str)
def test_a_model_can_be_copied(kwargs):
    model, idx = make_small(**kwargs), tokens(2, 3 * T)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(idx)[0], model(idx)[0])
    nn.init.zeros_(copied.head.weight)
    assert model(idx)[0].any()


class Scaled(LM2):
    """As a student might change the model: new parameters and layers of any shape, anywhere."""

    def __init__(self, config):
        super().__init__(config)
        self.temperature = nn.Parameter(torch.tensor(2.0))            # of no dimension
        self.mixing = nn.Parameter(torch.ones(2, 3, 4))
        self.blocks[0].gain = nn.Parameter(torch.ones(config.n_embd))
        self.blocks[0].mlp.w_up = nn.Linear(config.n_embd, self.blocks[0].mlp.w_up.out_features)
        self.blocks[0].convolution = nn.Conv1d(4, 4, 3)
        self.blocks[0].memory.per_slot = nn.Parameter(torch.zeros(config.mem_slots, 1))
        self.init_weights()

    def forward(self, idx, targets=None, state=None):
        logits, loss, state = super().forward(idx, targets, state)
        return logits / self.temperature, loss, state


def test_new_parameters_and_biases_anywhere_break_nothing():
    config = LM2Config(vocab_size=13, block_size=T, n_layer=2, n_embd=32, n_head=2, mem_slots=4)
    model, idx = Scaled(config), tokens(2, 2 * T)
    assert model.mixing.eq(1).all() and model.temperature == 2.0, "they keep their first values"
    assert not model.blocks[0].mlp.w_up.bias.any()
    muon, adam = make_optimizers(model, 0.02, 2e-3, 0.1)
    model(idx, idx)[1].backward()
    muon.step()
    adam.step()
    taken = [p for o in (muon, adam) for p in o.param_groups[0]["params"]]
    assert {id(p) for p in taken} == {id(p) for p in model.parameters()}
    assert len(taken) == len(list(model.parameters()))


@pytest.mark.parametrize("kwargs", [dict(), dict(memory="rmt"), dict(memory="none")], ids=str)
@pytest.mark.parametrize("half", ["half", "bfloat16"])
def test_weights_in_half_precision_are_refused_in_one_line(kwargs, half):
    model = getattr(make_small(**kwargs), half)()
    with pytest.raises(ValueError, match="in float32 and use torch.autocast") as e:
        model(tokens(1, 3))
    assert "\n" not in str(e.value)
    model.float()(tokens(1, 3))


def test_double_precision_runs_whole_and_in_chunks():
    model, idx = make_small().double(), tokens(2, 3 * T + 1)
    whole = model(idx)[0]
    assert whole.dtype == torch.float64
    torch.testing.assert_close(in_chunks(model, idx, [T + 3, 2 * T - 2])[0], whole)


def test_a_tied_head_is_the_embedding_and_learns():
    torch.manual_seed(0)
    model = LM2(LM2Config(vocab_size=13, n_layer=1, n_head=2, n_embd=16, mem_slots=4,
                          tie_head=True))
    assert model.head.weight is model.embedding.weight
    model.load_state_dict(model.state_dict())  # as from a checkpoint
    optimizer, idx, losses = torch.optim.AdamW(model.parameters(), 0.01), torch.arange(13)[None], []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(idx, idx.roll(-1))[1]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert model.head.weight is model.embedding.weight
    assert losses[0] < 1.5 * math.log(13) and losses[-1] < 0.5 * losses[0]


# --- Parts

def test_attention_on_a_cpu_stays_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(*torch.randn(3, 1, T, 2, 4)).dtype == torch.float32


def test_rotary_angles_are_exact_at_position_1000000():
    config = LM2Config(vocab_size=11, n_embd=8, n_head=1, mem_slots=4)
    cos, sin = rope_angles(1_000_000, 2, config, torch.device("cpu"))
    for i in range(4):
        angle = 1_000_001 * 10000.0 ** (-2 * i / 8)
        assert cos[1, 0, i] == pytest.approx(math.cos(angle), abs=1e-7) == cos[1, 0, i + 4]
        assert sin[1, 0, i + 4] == pytest.approx(math.sin(angle), abs=1e-7) == -sin[1, 0, i]


@torch.no_grad()
def test_rotary_positions_are_relative():
    model, idx = make_small(memory="none", n_layer=1), torch.randint(13, (1, 2 * T))
    first = model(idx)[0]
    state = model.initial_state(1)._replace(pos=1_000_000)  # its window is full of zeros
    later = model(idx, state=state)[0]
    torch.testing.assert_close(later[:, T:], first[:, T:], rtol=1e-4, atol=1e-4)


def test_loss_counts_only_targets_that_are_not_minus_1():
    model, idx = make_small(), torch.randint(13, (2, 2 * T))
    targets = torch.full_like(idx, -1)
    targets[0, 3], targets[1, 9] = 5, 7
    logits, loss, _ = model(idx, targets)
    losses = [F.cross_entropy(logits[0, 3], torch.tensor(5)),
              F.cross_entropy(logits[1, 9], torch.tensor(7))]
    torch.testing.assert_close(loss, sum(losses) / 2)


def test_first_loss_is_that_of_a_uniform_guess():
    model, idx = LM2(LM2Config(vocab_size=13)), torch.randint(13, (2, 64))
    assert model(idx, idx)[1].item() == pytest.approx(math.log(13), abs=1e-5)


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    model = LM2(LM2Config(vocab_size=13, n_layer=1))
    names = {p: name for name, p in model.named_parameters()}
    in_muon, in_adam = ({names[p] for p in optimizer.param_groups[0]["params"]}
                        for optimizer in make_optimizers(model, 0.02, 2e-3, 0.0))
    assert in_muon | in_adam == set(names.values()) and not in_muon & in_adam
    assert in_adam == {name for name in names.values()
                       if name.startswith(("embedding", "head")) or "norm" in name
                       or name.endswith(("bias", "slot_queries"))}


def test_sampling_obeys_temperature_top_k_and_top_p():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(500, -1)
    assert set(draw_token(logits, temperature=0).tolist()) == {0}
    assert set(draw_token(logits, top_k=2).tolist()) == {0, 1}
    assert set(draw_token(logits, top_k=99).tolist()) <= {0, 1, 2, 3}
    assert set(draw_token(logits, top_p=0.5).tolist()) == {0}       # the first alone has 0.64
    assert set(draw_token(logits, top_p=0.8).tolist()) == {0, 1}
    assert set(draw_token(logits, temperature=0.3, top_p=0.8).tolist()) == {0}
    assert set(draw_token(logits, temperature=0.01).tolist()) == {0}
    hot = draw_token(logits, temperature=100).bincount()
    assert (hot > 75).all() and (hot < 175).all(), "all alike: 125 of 500"


@pytest.mark.parametrize("memory", ["lm2", "none", "rmt"])
def test_dropout_is_on_the_embedding_and_on_what_each_block_adds_in_training_alone(memory):
    torch.manual_seed(0)
    model = make_model(LM2Config(vocab_size=13, n_layer=1, n_head=2, n_embd=16, block_size=8,
                                 mem_slots=4, memory=memory, dropout=0.5))
    idx = torch.randint(13, (1, 8))
    assert torch.equal(model.eval()(idx)[0], model(idx)[0])
    places = [model.dropout, model.blocks[0].dropout]
    drawn = []
    for place in places:
        place.register_forward_hook(lambda _, inputs, x: drawn.append((inputs[0] != 0) & (x == 0)))
    model.train()(idx)
    assert len(drawn) == 3 and all(0.2 < zeros.float().mean() < 0.8 for zeros in drawn)


@pytest.mark.parametrize("kwargs, named", [
    (dict(n_embd=30, n_head=4), "n_head=4"), (dict(n_head=4, n_kv_head=3), "n_kv_head=3"),
    (dict(n_head=4, n_kv_head=-1), "n_kv_head=-1"), (dict(n_head=2, n_kv_head=4), "n_kv_head=4"),
    (dict(n_embd=8, mem_slots=9, n_head=2), "mem_slots=9"), (dict(mem_slots=0), "mem_slots=0"),
    (dict(mem_write="aligned", mem_slots=7), "mem_slots=7"),
    (dict(n_embd=12, n_head=4), "n_embd/n_head=3"), (dict(mem_layers=9), "mem_layers=9"),
    (dict(mem_layers=-2), "mem_layers=-2"), (dict(attention="half"), "attention=half"),
    (dict(memory="rnn"), "memory=rnn"), (dict(mem_write="x"), "mem_write=x"),
    (dict(n_layer=0), "n_layer=0"), (dict(dropout=1.0), "dropout=1.0"),
    (dict(dropout=math.nan), "dropout=nan"), (dict(window_dropout=-0.1), "window_dropout=-0.1"),
    (dict(norm_eps=0.0), "norm_eps=0.0"), (dict(rope_theta=math.nan), "rope_theta=nan"),
    (dict(rope_factor=0.0), "rope_factor=0.0"), (dict(rope_context=0), "rope_context=0"),
    (dict(vocab_size=0), "vocab_size=0"), (dict(mlp_ratio=-1.0), "mlp_ratio=-1.0"),
    (dict(window_dropout=0.5, attention="full"), "window_dropout=0.5"),
    (dict(mlp_ratio=math.inf), "mlp_ratio=inf")], ids=str)
def test_config_that_cannot_work_is_refused_in_one_line(kwargs, named):
    with pytest.raises(ValueError, match=named) as e:
        LM2Config(**dict(vocab_size=13) | kwargs)
    assert "\n" not in str(e.value)


def test_norm_eps_reaches_every_norm():
    model, idx = make_small(n_layer=1), tokens(1, 2 * T)
    other = LM2(replace(model.config, norm_eps=0.1))
    other.load_state_dict(model.state_dict())
    norms = [module for module in other.modules() if isinstance(module, nn.RMSNorm)]
    assert len(norms) == 4 and all(norm.eps == 0.1 for norm in norms)
    plain = LM2(replace(model.config, norm_eps=0.1, qk_norm=False))
    assert not torch.equal(other(idx)[0], model(idx)[0])
    x = torch.full((1, 1, 2, 8), 0.1)
    assert norm_heads(x, other.config).max() < norm_heads(x, model.config).max()
    assert torch.equal(norm_heads(x, plain.config), x)


@pytest.mark.parametrize("kwargs", MODELS[:4] + RMTS[:1], ids=str)
def test_training_step_compiles_to_one_graph(kwargs):
    torch._dynamo.reset()
    model, idx = make_small(n_layer=2, **kwargs), torch.randint(13, (2, 4 * T))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    loss = compiled(idx, idx)[1]  # raises where the graph would break
    assert loss.item() == pytest.approx(model(idx, idx)[1].item(), rel=1e-5)
    loss.backward()
