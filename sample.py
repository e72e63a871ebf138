"""
Text from a checkpoint, written as it is made:

    python sample.py --out_dir=out/shakespeare --start="ROMEO:" --max_new_tokens=500
    python sample.py --out_dir=out/shakespeare --start=FILE:prompt.txt --temperature=0

Prompt and text may have any length: one token costs the same, whatever came before.
"""
import codecs
from dataclasses import dataclass
from pathlib import Path

import torch

from data.tokenizer import prompt_ids
from lib import checkpoint
from lib.config import parse, user_errors
from lib.device import autocast, pick_device, pick_dtype


@dataclass
class SampleConfig:
    out_dir: str = "out/shakespeare"  # folder of the run
    start: str = ""                   # the prompt, or FILE:path
    num_samples: int = 1              # texts to write
    max_new_tokens: int = 500         # tokens in each
    temperature: float = 0.8          # 0: always the likeliest token; 1: as the model says
    top_k: int = 0                    # draw from the k likeliest tokens only, 0: from all
    top_p: float = 1.0                # draw from the likeliest tokens that together reach this probability
    seed: int = 1337                  # of the draws
    device: str = "auto"              # auto, cpu, cuda, cuda:N or mps
    dtype: str = "float32"            # float32, bfloat16, or auto: the faster

    def __post_init__(self):
        for name in ("num_samples", "max_new_tokens", "temperature", "top_k", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")


def read_prompt(start):
    """The prompt itself, or the text of FILE:path. Raises OSError or ValueError."""
    if not start.startswith("FILE:"):
        return start
    try:
        return Path(start[5:]).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{start[5:]} is not UTF-8: convert it, for example with iconv -t UTF-8") from None


def main():
    config, _ = parse(SampleConfig, __doc__)
    with user_errors():
        device = pick_device(config.device)
        context = autocast(pick_dtype(config.dtype, device), device)
        model, tokenizer, _ = checkpoint.load(config.out_dir, device)
        start = read_prompt(config.start)
        prompt = torch.tensor([prompt_ids(tokenizer, start)], device=device)
    torch.manual_seed(config.seed)
    for i in range(config.num_samples):
        if i:
            print("\n---------------")
        print(start, end="", flush=True)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end inside a character
        with context:
            for token in model.stream(prompt, config.max_new_tokens, config.temperature, config.top_k, config.top_p):
                print(decoder.decode(tokenizer.decode_bytes(token.tolist())), end="", flush=True)
        print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    main()
