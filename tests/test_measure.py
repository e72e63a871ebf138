"""lib/measure.py: what the figures of bench.py mean. How large they are, is not tested."""
import os
import re
import time
from types import SimpleNamespace

import pytest
import torch
from small_models import CPU, FLOAT32, SIZE, VOCAB, idx, model
from torch.autograd import DeviceType

from lib import measure
from lib.measure import (
    matmul_flops,
    peak_memories,
    peak_memory,
    print_scopes,
    resident,
    soak,
    time_by_scope,
    training_flops,
)
from lib.rivals import training_step
from lm2 import MLP, LM2Config, MemoryBank

LINUX_TELLS = resident("VmHWM") is not None


# --- Time and operations

@pytest.mark.parametrize("attention, length, seen", [
    ("window", 4, 4), ("window", 64, 8), ("full", 4, 4), ("full", 64, 64)])
def test_flops_are_six_a_parameter_and_attention_to_what_is_seen(attention, length, seen):
    vanilla = model(memory="none", attention=attention)
    parameters = sum(p.numel() for p in vanilla.parameters()) - VOCAB * 16
    assert training_flops(vanilla, length) == 6 * parameters + 12 * 2 * 16 * seen


@pytest.mark.parametrize("vectors", ["wpe", "memory_tokens"])  # of nanoGPT, of RMT
def test_what_no_token_is_multiplied_by_costs_no_flops(vectors):
    vanilla = model(memory="none")
    before = training_flops(vanilla, 8)
    vanilla.register_parameter(vectors, torch.nn.Parameter(torch.zeros(8, 16)))
    assert training_flops(vanilla, 8) == before


@pytest.mark.parametrize("kind", [
    dict(memory="none"), dict(), dict(mem_write="aligned"), dict(memory="rmt")], ids=str)
@pytest.mark.parametrize("segments", [1, 8])
def test_flops_are_near_those_of_the_matmuls(kind, segments):
    slots = 32 if kind.get("mem_write") == "aligned" else 8
    big = model(n_embd=64, n_layer=2, n_head=2, block_size=32, mem_slots=slots, **kind)
    tokens = idx(2, 32 * segments)
    counted = matmul_flops(lambda: big(tokens, tokens)[1].backward()) / tokens.numel()
    assert training_flops(big, 32 * segments) == pytest.approx(counted, rel=0.15)


@pytest.mark.parametrize("backward", [False, True])
def test_matmul_flops_of_a_matrix_product_and_of_attention(backward):
    x = torch.randn(2, 3, 8, 4, requires_grad=backward)  # batch, heads, tokens, width

    def job():
        y = torch.nn.functional.scaled_dot_product_attention(x, x, x) @ x.mT
        if backward:
            y.sum().backward()

    product = 2 * 2 * 3 * 8 * 8 * 4
    attention = 2 * product
    if backward:  # attention computes its scores again
        product, attention = 3 * product, 3.5 * attention
    assert matmul_flops(job) == attention + product


@pytest.mark.parametrize("kind, write", [(dict(), "write_attend"),
                                         (dict(mem_write="aligned", mem_slots=8), "write_aligned")])
def test_each_scope_has_its_time(kind, write):
    assert hasattr(MemoryBank, write)
    seconds = time_by_scope(training_step(model(**kind), FLOAT32, idx(2, 32)), CPU)
    assert seconds.keys() == {"queries, keys, values", "attention", "read", "output gate", "write",
                              "gates", "MLP", "optimizer", "rest"}
    assert min(seconds.values()) > 0


class SlowBackward(torch.autograd.Function):
    """The identity, whose backward pass takes long."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        work(0.3)
        return grad


def work(seconds):
    """Keep the processor busy, however fast it is."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_kernel_counts_for_the_operation_that_started_it(monkeypatch):
    def event(name, device_type, parent, own):
        return SimpleNamespace(name=name, device_type=device_type, cpu_parent=parent,
                               sequence_nr=-1, self_device_time_total=own)
    mlp = event("scope MLP", DeviceType.CPU, None, 0.0)
    product = event("aten::mm", DeviceType.CPU, mlp, 100.0)
    events = [mlp, product, event("gemm", DeviceType.CUDA, None, 100.0),
              event("scope MLP", DeviceType.CUDA, None, 100.0)]
    monkeypatch.setattr("lib.measure.profiled", lambda job, device: events)
    seconds = time_by_scope(None, torch.device("cuda"))
    assert {name: own for name, own in seconds.items() if own} == {"MLP": pytest.approx(1e-4)}


def test_time_goes_to_the_innermost_scope(monkeypatch):
    gates = MemoryBank.gates

    def slow_gates(self, *args):
        work(0.3)
        return gates(self, *args)

    monkeypatch.setattr(MemoryBank, "gates", slow_gates)
    seconds = time_by_scope(training_step(model(), FLOAT32, idx(2, 32)), CPU)
    assert max(seconds, key=seconds.get) == "gates"  # not "write", which calls it


def test_backward_pass_counts_for_its_scope(monkeypatch):
    forward = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x: SlowBackward.apply(forward(self, x)))
    seconds = time_by_scope(training_step(model(), FLOAT32, idx(2, 32)), CPU)
    assert max(seconds, key=seconds.get) == "MLP"


def test_profile_leaves_the_model_as_it_was():
    before = {name: getattr(owner, name) for _, owner, name in measure.SCOPES}
    time_by_scope(lambda: None, CPU)
    assert before == {name: getattr(owner, name) for _, owner, name in measure.SCOPES}


def test_scopes_add_up_to_the_whole(capsys):
    jobs = {"a": training_step(model(), FLOAT32, idx(2, 32))}
    print_scopes("ms", jobs, 1, 1e15, CPU)
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.split("\n") if line]
    found = {name: float(cell) for name, cell in lines[2:]}
    floor = found.pop("its matmuls at the matmul peak")
    assert sum(found.values()) == pytest.approx(2 * found["all of it"], abs=0.1 * len(found))
    assert floor == 0  # at such a peak


# --- Peak memory

@pytest.mark.skipif(not LINUX_TELLS, reason="the system does not tell peak memory")
def test_peak_memory_grows_with_the_job():
    config = LM2Config(512, memory="none", **SIZE | {"n_embd": 64})
    small, = peak_memories(training_step, [config], "float32", CPU, (1, 512))
    large, = peak_memories(training_step, [config], "float32", CPU, (64, 512))
    assert large > 2 * small > 0


def end_the_process(model, context, idx):
    os._exit(9)


@pytest.mark.skipif(not LINUX_TELLS, reason="the system does not tell peak memory")
def test_a_job_that_the_system_ends_has_no_figure():
    config = LM2Config(VOCAB, **SIZE, mem_slots=4)
    assert peak_memories(end_the_process, [config], "float32", CPU, (1, 8)) == [None]


def test_without_proc_there_is_no_figure_and_no_crash(monkeypatch, capsys):
    """As on macOS."""
    def nothing(path, *args, **kwargs):
        raise FileNotFoundError(path)

    monkeypatch.setattr(measure.Path, "read_text", nothing)
    monkeypatch.setattr(measure.Path, "write_text", nothing)
    configs = [LM2Config(VOCAB, **SIZE, mem_slots=4)] * 2
    assert resident() is None and peak_memory(lambda: None, CPU) is None
    assert peak_memories(training_step, configs, "float32", CPU, (1, 8)) == [None, None]
    soak(model(), 10)
    assert "| 10 | - |" in capsys.readouterr().out


# --- Drift

def test_soak_finds_no_drift_and_would_see_one(capsys, monkeypatch):
    lm2 = model()
    soak(lm2, 100)
    features = lm2.features

    def forgetful(idx, state=None):  # between the pieces of a long text
        return features(idx, state if idx.size(1) == 1 else None)

    monkeypatch.setattr(lm2, "features", forgetful)
    soak(lm2, 1000)
    drift = [float(d) for d in re.findall(r"(\d\S+) \|$", capsys.readouterr().out, re.M)]
    assert len(drift) == 2 + 3  # after 10 and 100 tokens; 10, 100 and 1,000
    assert max(drift[:2]) < 1e-4 < drift[-1]
