"""lib/rivals.py: the models that bench.py compares, and how they train and write."""
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from small_models import CPU, FLOAT32, SIZE, VOCAB, idx, model

from lib.measure import training_flops
from lib.rivals import (
    HuggingFaceLlama,
    OursAsLlama,
    as_if_trained,
    nanogpt,
    optimizers_of,
    recompute,
    rivals,
    training_step,
)
from lm2 import LM2Config


def test_rivals_share_a_size_and_differ_in_memory_alone():
    configs = rivals(SIZE)
    kinds = {name: (c.memory, c.attention, c.mem_write, c.mem_slots)
             for name, c in configs.items()}
    assert kinds == {
        "window": ("none", "window", "attend", 2),
        "full attention": ("none", "full", "attend", 2),
        "RMT": ("rmt", "window", "attend", 2),
        "LM2 attend": ("lm2", "window", "attend", 2),
        "LM2 aligned": ("lm2", "window", "aligned", 8),
    }
    assert {(c.n_layer, c.n_embd, c.block_size) for c in configs.values()} == {(2, 16, 8)}


@pytest.mark.parametrize("kind", [dict(memory="none"), dict(memory="rmt"), dict(),
                                  dict(mem_write="aligned", mem_slots=8)])
def test_a_training_step_trains_all_weights(kind):
    trained = model(**kind)
    before = [p.clone() for p in trained.parameters()]
    training_step(trained, FLOAT32, idx(2, 24))()
    for (name, p), q in zip(trained.named_parameters(), before):
        assert not torch.equal(p, q), name


def test_recomputing_generates_what_the_cache_does_while_the_window_holds_the_text():
    vanilla, prompt = model(memory="none", block_size=32), idx(1, 8)
    torch.manual_seed(0)
    cached = list(vanilla.stream(prompt, 16))
    torch.manual_seed(0)
    assert list(recompute(vanilla, prompt, 16)) == cached


@pytest.mark.parametrize("source", [
    "",                                   # no GPT in it
    "def GPT(",                           # no Python
    "import torch_of_another_world",      # something lacks
    "raise SystemExit(0)",                # a program
    "class GPT: pass\nclass GPTConfig: pass",
    "GPT = GPTConfig = dict",
    None,                                 # no file
])
def test_what_is_not_nanogpt_is_refused_in_one_line(tmp_path, source):
    if source is not None:
        (tmp_path / "model.py").write_text(source)
    with pytest.raises(ValueError, match="nanogpt=.*karpathy/nanoGPT") as e:
        nanogpt(tmp_path, LM2Config(VOCAB, **SIZE, mem_slots=4))
    assert "\n" not in str(e.value)


# --- Hugging Face's Llama

class Llama(torch.nn.Module):
    """Stands for transformers' LlamaForCausalLM."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.embed_tokens = torch.nn.Embedding(shape["vocab_size"], shape["vocab_size"])

    def forward(self, input_ids, labels):
        assert torch.equal(input_ids, labels)  # it shifts them itself
        logits = self.embed_tokens(input_ids)
        return SimpleNamespace(logits=logits, loss=logits.square().mean())


def llama_config(*, vocab_size, hidden_size, intermediate_size, num_hidden_layers,
                 num_attention_heads):
    """Stands for transformers' LlamaConfig."""
    return locals()


@pytest.fixture
def transformers(monkeypatch):
    """A package transformers with a Llama in it."""
    package = ModuleType("transformers")
    package.LlamaConfig, package.LlamaForCausalLM = llama_config, Llama
    monkeypatch.setitem(sys.modules, "transformers", package)


def test_the_llama_of_hugging_face_has_the_shape_of_ours_and_trains(transformers):
    config = rivals(SIZE)["full attention"]
    rival, ours = HuggingFaceLlama(config), as_if_trained(config, CPU)
    assert rival.llama.shape == {
        "vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": len(ours.blocks[0].mlp.w_up.weight)}
    assert training_flops(rival, 64) == 12 * 2 * 16 * 64  # it has an embedding, and no more
    before = rival.llama.embed_tokens.weight.clone()
    training_step(rival, FLOAT32, idx(2, 8))()
    assert not torch.equal(before, rival.llama.embed_tokens.weight)


def test_the_llama_of_hugging_face_trains_with_adamw_and_so_does_ours_beside_it(transformers):
    for rival in (HuggingFaceLlama, OursAsLlama):
        optimizer, = optimizers_of(rival(rivals(SIZE)["full attention"]))
        assert type(optimizer) is torch.optim.AdamW
        assert optimizer.defaults["weight_decay"] == 0 and optimizer.defaults["fused"]


def test_ours_as_a_llama_has_no_qk_norm_and_trains():
    ours = OursAsLlama(rivals(SIZE)["full attention"])
    assert not ours.config.qk_norm and ours.config.attention == "full"
    before = [p.clone() for p in ours.parameters()]
    step = training_step(ours, FLOAT32, idx(2, 24))
    step(), step()  # the head is zero at first, and nothing behind it learns in the first step
    assert not any(torch.equal(p, q) for p, q in zip(ours.parameters(), before))


def test_without_transformers_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install transformers") as e:
        HuggingFaceLlama(LM2Config(VOCAB, **SIZE, mem_slots=4))
    assert "\n" not in str(e.value)
