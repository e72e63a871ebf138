"""lib/run.py: processes, stops, and what a run may begin or go on with."""
import json
import os
import signal
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from data.curriculum import Stories
from data.tokenizer import make_tokenizer
from lib import checkpoint, run
from lib.optim import make_optimizers
from lm2 import LM2, LM2Config
from train import TrainConfig

CPU = torch.device("cpu")
SIZES = dict(n_layer=2, n_embd=16, n_head=2, block_size=8, mem_slots=4, vocab_size=7)


@pytest.fixture
def environment(monkeypatch):
    """Set the variables of torchrun, and no others."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def set_to(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)
    return set_to


def saved_run(folder, processes=1, **values):
    """The folder of a run of a TrainConfig -> that TrainConfig"""
    config = TrainConfig(**SIZES | values, out_dir=str(folder))
    model = checkpoint.make_model(config.model_config())
    tokenizer = make_tokenizer("char", "abcdefg", 0)
    checkpoint.save(folder / "best.pt", model)
    about = {"train": vars(config), "data": {}, "processes": processes,
             "parameters": sum(p.numel() for p in model.parameters())}
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer.to_json()))
    return config


# --- Processes

def test_one_process_needs_no_environment(environment):
    assert run.processes() == (0, 1)
    environment(RANK="0", WORLD_SIZE="1")
    assert run.processes() == (0, 1)


def test_torchrun_says_which_process_this_is(environment):
    environment(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", MASTER_ADDR="a", MASTER_PORT="1")
    assert run.processes() == (3, 4)


@pytest.mark.parametrize("values, named", [
    ({"RANK": "1"}, "WORLD_SIZE=(unset)"), ({"WORLD_SIZE": "2"}, "RANK=(unset)"),
    ({"RANK": "0"}, "WORLD_SIZE=(unset)"), ({"RANK": "x"}, "RANK=x"), ({"RANK": ""}, "RANK="),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1"), ({"RANK": "1.0"}, "RANK=1.0"),
    ({"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0"}, "RANK=0 is not below WORLD_SIZE=0"),
    ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK=1 is not below WORLD_SIZE=1"),
    ({"RANK": "5", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=5 is not below WORLD_SIZE=2"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK=(unset)"),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR=(unset)"),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a"}, "MASTER_PORT="),
], ids=str)
def test_half_set_environment_is_refused(environment, values, named):
    environment(**values)
    with pytest.raises(ValueError, match="torchrun, or unset RANK and WORLD_SIZE") as e:
        run.processes()
    assert named in str(e.value)


def test_processes_that_share_one_gpu_of_apples_are_refused():
    with pytest.raises(ValueError, match="device=mps is not for several processes"):
        run.join_processes(torch.device("mps"), "float32")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_does_not_wait(number):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop = run.Stop(CPU, 1)
        assert not stop.asked()
        os.kill(os.getpid(), number)
        assert stop.asked() and stop.asked()
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        for n, handler in handlers.items():
            signal.signal(n, handler)


# --- A run goes on

@pytest.mark.parametrize("before, now, batches", [(1, 1, 6), (2, 1, 12), (1, 2, 3), (4, 2, 12),
                                                  (2, 3, 4), (6, 6, 6)])
def test_a_step_keeps_its_batch_when_the_number_of_processes_changes(tmp_path, before, now,
                                                                     batches):
    config = saved_run(tmp_path, before, gradient_accumulation_steps=6)
    assert run.resumed(config, set(), now).gradient_accumulation_steps == batches


@pytest.mark.parametrize("before, now", [(3, 2), (1, 2), (2, 3)])
def test_a_number_of_processes_that_changes_the_batch_is_refused(tmp_path, before, now):
    config = saved_run(tmp_path, before)
    with pytest.raises(ValueError, match=f"has {before} processes and cannot go on with {now}"):
        run.resumed(config, set(), now)


def test_what_may_change_changes_and_the_rest_stays(tmp_path):
    saved_run(tmp_path, seed=5, compile=True, dtype="bfloat16", max_iters=7)
    config = TrainConfig(out_dir=str(tmp_path), resume=True, max_iters=9)
    found = run.resumed(config, {"out_dir", "resume", "max_iters"}, 1)
    assert (found.seed, found.compile, found.dtype, found.n_layer) == (5, True, "bfloat16", 2)
    assert (found.max_iters, found.resume, found.out_dir) == (9, True, str(tmp_path))


def test_a_flag_that_the_run_has_may_be_said_again(tmp_path):
    saved_run(tmp_path, freeze="decoder", init_from="out/other")
    config = TrainConfig(out_dir=str(tmp_path), resume=True, freeze="decoder")
    assert run.resumed(config, {"out_dir", "resume", "freeze"}, 1).init_from == "out/other"


def test_a_folder_that_was_renamed_is_the_one_that_goes_on(tmp_path):
    saved_run(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    config = TrainConfig(out_dir=str(tmp_path / "new"))
    assert run.resumed(config, set(), 1).out_dir == str(tmp_path / "new")


def test_a_text_is_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved_run(tmp_path / "run", dataset="texts/play.txt", corpus="texts")
    monkeypatch.chdir("/")
    found = run.resumed(TrainConfig(out_dir=str(tmp_path / "run")), set(), 1)
    assert found.dataset == str(tmp_path / "texts/play.txt")
    assert found.corpus == str(tmp_path / "texts")


@pytest.mark.parametrize("progress", [None, 3, [9, 0], [0]])
def test_a_checkpoint_of_another_curriculum_is_refused(tmp_path, progress):
    config = saved_run(tmp_path, lengths="0k,1k")
    tokenizer = make_tokenizer("char", "abcdefg", 0)
    stories = Stories(["qa1"], [0, 1000], None, None, tokenizer, {"sha256": "of the text"})
    model = checkpoint.make_model(config.model_config())
    optimizers = make_optimizers(model, 0.1, 0.1, 0.1)
    checkpoint.save(tmp_path / "ckpt.pt", model, step=3, best_val_loss=1.0, progress=progress,
                    sha256="of the text",
                    optimizers=[optimizer.state_dict() for optimizer in optimizers])
    with pytest.raises(ValueError, match="ckpt.pt does not fit this run"):
        run.restore(config, stories, model, optimizers)


# --- A run begins with another one

def test_weights_come_from_a_run_of_the_same_model(tmp_path):
    config = saved_run(tmp_path)
    config = replace(config, init_from=str(tmp_path), dropout=0.1)
    weights = run.initial_weights(config)
    saved = checkpoint.load_file(tmp_path / "best.pt")["model"]
    assert all(torch.equal(p, weights[name]) for name, p in saved.items())
    with pytest.raises(ValueError, match="give --n_layer=2"):
        run.initial_weights(replace(config, n_layer=1))


def test_shape_and_tokenizer_come_from_that_run_but_for_what_is_given(tmp_path):
    saved = saved_run(tmp_path)
    other = TrainConfig(init_from=str(tmp_path), n_layer=9, n_embd=24, n_head=1, dropout=0.1)
    config, tokenizer = run.begun_from(other, {"init_from", "n_layer", "dropout"})
    own = ("n_layer", "dropout", "window_dropout")
    taken = {name: value for name, value in vars(saved.model_config()).items() if name not in own}
    assert config == replace(other, **taken) and config.n_embd == 16
    assert tokenizer.chars == "abcdefg"


@pytest.mark.parametrize("change, named", [
    (dict(n_embd="wide"), "n_embd=wide"), (dict(n_layer=True), "n_layer=True"),
    (dict(norm_eps=[1]), "norm_eps"), (dict(n_head=3), "n_head=3"), (dict(memory="x"), "memory=x"),
    (dict(memory="none"), "freeze=decoder leaves nothing to train"),
    (dict(mem_layers=0), "freeze=decoder leaves nothing to train"),
], ids=str)
def test_a_run_to_begin_with_that_does_not_fit_is_named(tmp_path, change, named):
    saved_run(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    about["train"] |= change
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=named):
        run.begun_from(TrainConfig(init_from=str(tmp_path), freeze="decoder"), set())


def test_a_frozen_decoder_trains_its_banks_alone():
    torch.manual_seed(0)
    model = LM2(LM2Config(vocab_size=11, n_layer=2, n_embd=16, n_head=2, block_size=4))
    before = {name: p.clone() for name, p in model.named_parameters()}
    run.freeze(model, "decoder")
    optimizers = make_optimizers(model, 0.1, 0.1, 0.1)
    idx = torch.randint(11, (2, 12))
    model.head.weight.normal_()
    before["head.weight"] = model.head.weight.clone()
    for _ in range(3):
        model(idx, idx)[1].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".memory." in name}


@pytest.mark.parametrize("memory", ["rmt", "none"])
def test_an_mlp_is_widened_to_the_size_of_a_run(tmp_path, memory):
    config = replace(saved_run(tmp_path, n_embd=64), memory=memory, match_params=str(tmp_path))
    matched = replace(config, mlp_ratio=run.matched_mlp_ratio(config, CPU))
    found = sum(p.numel() for p in checkpoint.make_model(matched.model_config()).parameters())
    wanted = checkpoint.load_config(tmp_path)["parameters"]
    assert abs(found - wanted) <= 0.02 * wanted
    by_number = replace(config, match_params=str(wanted))
    assert run.matched_mlp_ratio(by_number, CPU) == matched.mlp_ratio


def test_a_run_to_begin_with_has_the_size_it_has(tmp_path):
    config = saved_run(tmp_path, init_from=str(tmp_path), match_params=str(tmp_path))
    assert run.matched_mlp_ratio(config, CPU) == config.mlp_ratio
    other = replace(config, match_params="90000")
    with pytest.raises(ValueError, match="asks for 90,000 parameters, init_from=.* leave one of"):
        run.matched_mlp_ratio(other, CPU)


@pytest.mark.parametrize("parameters", [0, 1, 10 ** 15])
def test_a_size_that_no_mlp_gives_is_refused(tmp_path, parameters):
    config = replace(saved_run(tmp_path), match_params=str(tmp_path), n_layer=1)
    about = json.loads((tmp_path / "config.json").read_text()) | {"parameters": parameters}
    (tmp_path / "config.json").write_text(json.dumps(about))
    with patch("lib.run.memory_of", return_value=1e9), pytest.raises(ValueError):
        ratio = run.matched_mlp_ratio(config, CPU)
        run.check_memory(replace(config, mlp_ratio=ratio), CPU)


def test_match_params_is_held_to_the_memory_there_is():
    config = TrainConfig(**SIZES, match_params=str(10 ** 15))
    with pytest.raises(ValueError, match="^match_params=1.* is too much: the model and"):
        run.matched_mlp_ratio(config, CPU)


# --- Memory

@pytest.mark.parametrize("values", [
    {"n_embd": 2 ** 20}, {"n_layer": 2 ** 30}, {"mlp_ratio": 1e300}, {"batch_size": 2 ** 30},
    {"n_segments": 2 ** 30}, {"block_size": 2 ** 30}, {"eval_iters": 2 ** 30},
    {"n_embd": 2 ** 31 - 8}, {"vocab_size": 2 ** 31 - 1}, {"memory": "rmt", "n_embd": 2 ** 20},
    {"memory": "rmt", "mem_slots": 2 ** 31 - 1}, {"memory": "none", "n_layer": 2 ** 30},
], ids=str)
def test_what_does_not_fit_into_memory_is_refused_without_trying(values):
    with patch("lib.run.memory_of", return_value=64e9):
        run.check_memory(TrainConfig(), CPU)
        with pytest.raises(ValueError, match="need at least .* GB of memory, cpu has 64: use a"):
            run.check_memory(TrainConfig(**values), CPU)


def test_a_model_that_fits_is_not_refused():
    """The estimate stays below what training takes: weights, gradients and Adam's two means."""
    config = TrainConfig(**SIZES, batch_size=1, n_segments=1)
    model = checkpoint.make_model(config.model_config())
    takes = 16 * sum(p.numel() for p in model.parameters())
    with patch("lib.run.memory_of", return_value=takes + 8 * 4 * 60 * 2 * 16):
        run.check_memory(config, CPU)


# --- Less memory

def small(**kwargs):
    """A small model in training, with no parameter at zero."""
    torch.manual_seed(0)
    model = LM2(LM2Config(**SIZES | dict(n_layer=4) | kwargs))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.train()


@pytest.mark.parametrize("kwargs", [{}, dict(memory="none"), dict(attention="full")], ids=str)
def test_checkpointed_activations_give_the_same_gradients(kwargs):
    found, idx = [], torch.arange(48).view(2, 24) % 7
    for checkpointed in (False, True):
        model = small(dropout=0.1, **kwargs)
        if checkpointed:
            run.checkpoint_activations(model)
        torch.manual_seed(1)
        loss = model(idx, idx)[1]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_checkpointed_activations_are_not_kept_inside_of_blocks():
    kept = []
    for checkpointed in (False, True):
        model, sizes = small(), []
        if checkpointed:
            run.checkpoint_activations(model)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x,
                                                      lambda x: x):
            model(torch.arange(48).view(2, 24) % 7)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


def test_checkpointed_activations_are_refused_where_they_would_do_nothing():
    with pytest.raises(ValueError, match="^checkpoint_activations=True is not for memory=rmt"):
        TrainConfig(memory="rmt", checkpoint_activations=True)
