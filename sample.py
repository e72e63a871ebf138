"""
Text from a run, written as it is made:

    python sample.py --out_dir=out/shakespeare --start="ROMEO:" --max_new_tokens=500
    python sample.py --out_dir=out/shakespeare --start=FILE:prompt.txt --temperature=0

Prompt and text may have any length: one token costs the same, whatever came before, unless the run
has attention=full.
"""
import codecs
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch

from data.files import read_utf8
from data.tokenizer import prompt_ids
from lib import checkpoint
from lib.config import at_least, parse, user_errors
from lib.device import autocast, pick_compile, pick_device, pick_dtype

MANY = 20_000  # tokens, from which on compiling takes less time than it saves on a CPU


@dataclass
class SampleConfig:
    # text
    out_dir: str = "out/shakespeare"  # folder of the run
    start: str = ""                   # the prompt, or FILE:path
    special: bool = False             # <|im_start|> and the like are special tokens in the prompt
    num_samples: int = 1              # texts to write
    max_new_tokens: int = 500         # tokens in each
    temperature: float = 0.8          # 0: always the likeliest token; 1: as the model says
    top_k: int = 0                    # draw from the k likeliest tokens only, 0: from all
    top_p: float = 1.0                # draw from the likeliest that together reach this probability
    seed: int = 1337                  # of the draws
    # machine
    device: str = "auto"              # auto, cpu, cuda, cuda:N or mps
    dtype: str = "float32"            # float32, bfloat16, or auto: the faster
    compile: bool | None = None       # torch.compile; auto: on a GPU, or for many tokens

    def __post_init__(self):
        at_least(self, 0, "num_samples", "max_new_tokens", "temperature", "top_k", "seed")
        if 0 < self.temperature < 1e-3:  # logits divided by it would overflow
            raise ValueError(f"temperature={self.temperature} is too small: use 0, or at least "
                             "0.001")
        if not 1e-9 <= self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be from 1e-9 to 1")


@user_errors(OSError)
def main():
    config, _ = parse(SampleConfig, __doc__)
    with user_errors():
        device = pick_device(config.device)
        context = autocast(pick_dtype(config.dtype, device), device)
        model, tokenizer, _ = checkpoint.load(config.out_dir, device)
        compiled, n_tokens = config.compile, config.num_samples * config.max_new_tokens
        if model.config.attention != "full" and model.config.memory != "rmt":
            compiled = pick_compile(compiled, device, long=n_tokens >= MANY)
        elif compiled:
            raise ValueError(f"compile=True is not for attention=full or memory=rmt, which "
                             f"{config.out_dir} has: leave it out")
        start = config.start
        if start.startswith("FILE:"):
            start = read_utf8(start.removeprefix("FILE:"))
        start = start.removeprefix("\ufeff")  # a byte order mark
        if config.special and tokenizer.kind != "hf":
            raise ValueError(f"special=True needs a pretrained model's tokenizer, and "
                             f"{config.out_dir} has {tokenizer.kind}: leave it out")
        prompt = torch.tensor([prompt_ids(tokenizer, start, config.special)], device=device)
    torch.manual_seed(config.seed)
    for number in range(config.num_samples):
        if number:
            print("\n---------------")
        print(start, end="", flush=True)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end
        with context:                                                      # inside a character
            started, times = time.perf_counter(), []
            for token in model.stream(prompt, config.max_new_tokens, config.temperature,
                                      config.top_k, config.top_p, compiled):
                text = decoder.decode(tokenizer.decode_bytes(token.tolist()))
                print(text, end="", flush=True)
                times.append(time.perf_counter() - started)
        print(decoder.decode(b"", final=True))
        if len(times) > 1:
            gaps = [later - earlier for earlier, later in pairwise(times)]
            print(f"the first token after {times[0]:.1f} s, all {len(times):,} after "
                  f"{times[-1]:.1f} s; by the median {1 / median(gaps):,.0f} tokens a second",
                  file=sys.stderr)


if __name__ == "__main__":
    main()
