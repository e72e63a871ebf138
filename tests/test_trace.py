"""
lib/trace.py says what each segment gave to a read: shares sum to one, are what a change of a
segment's write would do, and are what follows by hand where gates are set by hand.
"""
import pytest
import torch

from lib.checkpoint import make_model
from lib.trace import contributions, read_weights, shares, token_shares, trace
from lm2 import LM2, LM2Config

SHAPE = dict(vocab_size=50, block_size=8, n_layer=3, n_head=4, n_embd=32, mem_slots=6)
L, S = 45, 5  # tokens of the text, and its whole segments
KINDS = {"attend": {}, "two heads of keys": {"n_kv_head": 2}, "one bank": {"mem_layers": 1},
         "no QK-norm": {"qk_norm": False}, "full attention": {"attention": "full"}}
each_kind = pytest.mark.parametrize("kind", KINDS)


def make(**changes):
    """A model with weights of all sizes, and a text."""
    torch.manual_seed(0)
    model = LM2(LM2Config(**{**SHAPE, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
    return model, torch.randint(0, 50, (L,))


def traced(kind):
    """A model, the Trace of its text, and of each bank its layer, MemoryBank and BankTrace."""
    model, ids = make(**kind)
    found = trace(model, ids)
    return model, found, [(layer, model.blocks[layer].memory, bank)
                          for layer, bank in found.banks.items()]


ALIGNED = {"mem_write": "aligned", "mem_slots": 8}


@pytest.mark.parametrize("kind", [*KINDS.values(), ALIGNED], ids=[*KINDS, "aligned"])
def test_what_is_noted_is_what_the_model_does(kind):
    model, ids = make(**kind)
    found, outputs = trace(model, ids), {}
    for layer, block in enumerate(model.blocks):
        if block.memory:  # what it adds to each token
            block.memory.register_forward_hook(
                lambda *args, layer=layer: outputs.setdefault(layer, []).append(args[-1][0][0]))
    state, logits = model.initial_state(1), None
    for segment in ids[None].split(8, dim=1):
        logits, _, state = model(segment, state=state)
    torch.testing.assert_close(found.logits, logits[0, -1].detach())
    assert list(found.banks) == list(range(model.config.n_banks))
    for layer, bank in found.banks.items():
        assert bank.E_mem.shape == bank.g_out.shape == (L, 32)
        assert not bank.E_mem[:8].any(), "the first segment reads nothing"
        torch.testing.assert_close(bank.banks[-1], state.layers[layer].bank.M[0].detach())
        torch.testing.assert_close(bank.g_out * bank.E_mem, torch.cat(outputs[layer]).detach())
        for s in range(S):
            M = bank.g_in[s] * bank.content[s] + bank.g_forget[s] * bank.banks[s]
            torch.testing.assert_close(bank.banks[s + 1], M)


@each_kind
def test_a_read_is_the_sum_of_its_slots_by_their_weights(kind):
    model, found, banks = traced(KINDS[kind])
    for layer, memory, bank in banks:
        weights = read_weights(model, found, layer, slice(40, 45), S)
        _, values = memory.keys_values(bank.banks[S])
        E_mem = torch.einsum("lnh,nhd->lhd", weights, values).flatten(1)
        torch.testing.assert_close(E_mem.detach(), bank.E_mem[40:])


@each_kind
def test_what_slots_looked_at_is_what_they_write(kind):
    model, found, _ = traced(KINDS[kind])
    seen = {}
    for layer, block in enumerate(model.blocks):
        if block.memory:
            block.memory.register_forward_hook(
                lambda memory, inputs, outputs, layer=layer: seen.setdefault(layer, []).append(
                    inputs[2][0]))  # the values of a segment's tokens
    state = model.initial_state(1)
    for segment in found.ids[None].split(8, dim=1):
        _, state = model.features(segment, state)
    for layer, bank in found.banks.items():
        for looked, values, content in zip(bank.looked, seen[layer], bank.content, strict=False):
            values = values.repeat_interleave(4 // values.size(1), dim=1)
            C = torch.einsum("nht,thd->nhd", looked, values).flatten(1)
            torch.testing.assert_close(C.tanh().detach(), content)


@each_kind
def test_shares_sum_to_one(kind):
    model, found, banks = traced(KINDS[kind])
    for layer, _, _ in banks:
        for token in (8, 20, -1):
            identity, segments = shares(model, found, layer, token)
            assert len(segments) == range(L)[token] // 8
            assert abs(identity + segments.sum() - 1) < 1e-5
            tokens = token_shares(model, found, layer, token)
            torch.testing.assert_close(tokens.view(-1, 8).sum(1), segments)


@each_kind
def test_shares_are_finite_differences_of_the_read(kind):
    """Eq. 6 in a loop, one segment written a little more: what is then read, by Eq. 1 to 3?"""
    model, found, banks = traced(KINDS[kind])
    for layer, memory, bank in banks:
        weights = read_weights(model, found, layer, slice(L - 1, L), S)[0].double()

        def added(more):
            """g_out * E_mem of the last token, with a slot's norm and the weights as they were."""
            M = bank.banks[0].double() * more[0]
            for s in range(S):
                M = bank.g_in[s] * bank.content[s] * more[s + 1] + bank.g_forget[s] * M
            norm = (bank.banks[S].double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
            V = (M / norm * memory.norm.weight) @ memory.w_v.weight.double().T
            return bank.g_out[-1] * torch.einsum("nh,nhd->hd", weights, V.view(6, 4, 8)).flatten()

        identity, segments = shares(model, found, layer, -1)
        with torch.no_grad():
            u = added(torch.ones(S + 1))
            for s, share in enumerate([identity, *segments]):
                difference = added(torch.ones(S + 1) + 1e-3 * torch.eye(S + 1)[s]) - u
                assert abs(difference @ u / (u @ u) / 1e-3 - share) < 1e-4


def with_gates(model, g_in, g_forget):
    """The model, its gates the same for all that is written."""
    for block in model.blocks:
        for layer, gate in ((block.memory.w_in, g_in), (block.memory.w_forget, g_forget)):
            layer.weight.data.zero_()
            layer.bias.data.fill_(torch.logit(torch.tensor(gate)))
    return model


def test_with_gates_set_by_hand_shares_are_those_computed_by_hand():
    """Five equal segments in a first block write the same, and half of it is kept each time."""
    model, ids = make(n_layer=1)
    found = trace(with_gates(model, 1.0, 0.5), ids[:8].repeat(5)[:39])
    identity, segments = shares(model, found, 0, -1)
    half = torch.tensor([1 / 8, 1 / 4, 1 / 2, 1.0])
    torch.testing.assert_close(segments / segments[-1], half.double())


def test_what_is_forgotten_at_once_has_no_share():
    model, ids = make()
    found = trace(with_gates(model, 1.0, 0.0), ids)
    for layer in found.banks:
        identity, segments = shares(model, found, layer, -1)
        torch.testing.assert_close(segments, torch.eye(5)[4].double())
        assert identity == 0


def test_what_is_never_written_leaves_the_identity():
    model, ids = make()
    found = trace(with_gates(model, 0.0, 1.0), ids)
    for layer in found.banks:
        identity, segments = shares(model, found, layer, -1)
        assert abs(identity - 1) < 1e-5 and not segments.any()


def test_a_token_of_the_first_segment_has_read_nothing():
    model, ids = make()
    with pytest.raises(ValueError, match="token 3 reads nothing"):
        contributions(model, trace(model, ids), 0, 3)


def test_a_text_shorter_than_a_segment_is_noted():
    model, ids = make()
    found = trace(model, ids[:3])
    assert found.banks[0].g_in.shape == (0, 6, 32) and found.banks[0].banks.shape == (1, 6, 32)


def test_aligned_is_noted_but_has_no_shares():
    model, ids = make(**ALIGNED)
    with pytest.raises(ValueError, match="mem_write=aligned is no sum"):
        shares(model, trace(model, ids), 0, -1)


@pytest.mark.parametrize("memory", ["none", "rmt"])
def test_a_model_without_banks_is_refused(memory):
    model = make_model(LM2Config(**{**SHAPE, "memory": memory}))
    with pytest.raises(ValueError, match=f"memory={memory} with mem_layers=-1 has no bank"):
        trace(model, torch.arange(10))
    assert not any(module._forward_hooks for module in model.modules())


def test_no_hook_stays_behind():
    model, ids = make()
    trace(model, ids)
    with pytest.raises(IndexError):
        trace(model, torch.tensor([1, 2, 50]))  # there is no token 50
    assert not any(module._forward_hooks for module in model.modules())
