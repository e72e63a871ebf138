"""
The models that bench.py compares: ours of one size, nanoGPT, and the Llama of Hugging Face's
transformers. How each is trained, and how one without a cache writes.
"""
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from io import StringIO
from pathlib import Path

import torch
from torch import nn

from lib import checkpoint
from lib.optim import make_optimizers
from lm2 import LM2, MLP, LM2Config, draw_token

VOCAB = 512  # tokens that each model knows
WINDOW, FULL, ATTEND = "window", "full attention", "LM2 attend"  # names of ours
NANOGPT, LLAMA = "nanoGPT", "Hugging Face's Llama"               # of others
PLAIN = "full attention as a Llama"                              # of ours beside others


def name_of(size):
    """4 x 128: layers and width."""
    return f"{size['n_layer']} x {size['n_embd']}"


def rivals(size):
    """
    {name: LM2Config} of a size. A bank has a quarter as many slots as a segment has tokens, but for
    `aligned`, which needs as many.
    """
    T = size["block_size"]
    rival = partial(LM2Config, VOCAB, mem_slots=T // 4, **size)
    return {
        WINDOW: rival(memory="none"),
        FULL: rival(memory="none", attention="full"),
        "RMT": rival(memory="rmt"),
        ATTEND: rival(mem_write="attend"),
        "LM2 aligned": rival(mem_write="aligned", mem_slots=T),
    }


def as_if_trained(config, device):
    """
    A new model of an LM2Config, as far from its start as if it were trained. At the start an
    `aligned` memory is shut, and its bank, which nothing enters, falls to denormal numbers, which a
    CPU multiplies at a fraction of its speed.
    """
    model = checkpoint.make_model(config).to(device).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


# --- nanoGPT

def nanogpt(folder, config):
    """
    nanoGPT's GPT of the size of an LM2Config, made by the model.py in a folder. Raises ValueError
    where that is not nanoGPT's.
    """
    spec = spec_from_file_location("nanogpt", Path(folder) / "model.py")
    module = module_from_spec(spec)
    try:
        with redirect_stdout(StringIO()):  # it reports on itself
            spec.loader.exec_module(module)
            model = module.GPT(module.GPTConfig(
                block_size=config.block_size, vocab_size=config.vocab_size, n_layer=config.n_layer,
                n_head=config.n_head, n_embd=config.n_embd, dropout=0.0, bias=False))
        nanogpt_optimizer(model, torch.device("cpu"))
        next(recompute(model, torch.zeros(1, 1, dtype=torch.long), 1))
    except (Exception, SystemExit) as e:  # it may be any program
        raise ValueError(f"nanogpt={folder} has no model.py like nanoGPT's ({e!r}): name a clone "
                         "of github.com/karpathy/nanoGPT") from None
    return model


def nanogpt_optimizer(model, device):
    """The optimizer that nanoGPT makes for itself."""
    with redirect_stdout(StringIO()):
        return model.configure_optimizers(weight_decay=0.0, learning_rate=2e-3, betas=(0.9, 0.99),
                                          device_type=device.type)


# --- Hugging Face's Llama

class HuggingFaceLlama(nn.Module):
    """transformers' LlamaForCausalLM in the shape of an LM2Config without memory."""

    def __init__(self, config):
        """Raises ValueError where transformers is not installed."""
        super().__init__()
        try:
            from transformers import LlamaConfig, LlamaForCausalLM  # not in requirements.txt
        except ImportError as e:
            raise ValueError(f"transformers cannot be imported ({e}): pip install transformers, "
                             "or leave out --transformers") from None
        self.config = config
        self.llama = LlamaForCausalLM(LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.n_embd,
            intermediate_size=MLP(config).w_up.out_features, num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head))

    def forward(self, idx, labels):
        """
        idx, labels (B, L) -> logits (B, L, vocab_size), loss. Labels are the tokens of idx, and not
        the next ones: the model itself shifts them.
        """
        out = self.llama(input_ids=idx, labels=labels)
        return out.logits, out.loss


class OursAsLlama(LM2):
    """Our decoder without what a Llama does not have: QK-norm here, Muon in `optimizers_of`."""

    def __init__(self, config):
        super().__init__(replace(config, qk_norm=False))


# --- How they are trained, and write

def optimizers_of(model):
    """What a model is trained with: ours with Muon and AdamW, as a Llama and others with AdamW."""
    if isinstance(model, (HuggingFaceLlama, OursAsLlama)):
        return [torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0, fused=True)]
    if isinstance(model, LM2):
        return make_optimizers(model, learning_rate=0.02, adam_lr=2e-3, weight_decay=0.0)
    return [nanogpt_optimizer(model, next(model.parameters()).device)]


def training_step(model, context, idx, compiled=False):
    """A function that makes a whole training step: forward, backward and optimizers."""
    model.train()
    optimizers = optimizers_of(model)
    forward = torch.compile(model) if compiled else model

    def job():
        with context:
            loss = forward(idx, idx)[1]
        loss.backward()
        for optimizer in optimizers:
            with context:
                optimizer.step()
            optimizer.zero_grad()
    return job


def reading(model, context, idx):
    """A function that reads a text to its end and draws the first token behind it."""
    def job():
        with context:
            next(model.stream(idx, 1))
    return job


def recompute(model, idx, max_new_tokens):
    """
    `stream` as nanoGPT generates: no cache, each token reads block_size tokens again, of which the
    last one alone gets logits.
    """
    for _ in range(max_new_tokens):
        window = idx[:, -model.config.block_size:]
        if isinstance(model, LM2):
            logits = model.head(model.features(window)[0][:, -1])
        else:
            logits = model(window)[0][:, -1]
        token = draw_token(logits)
        yield token
        idx = torch.cat((idx, token[:, None]), dim=1)
