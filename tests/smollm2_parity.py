"""
SmolLM2-135M in lm2.py beside Hugging Face's `transformers`, on 500 tokens of Shakespeare: ids,
logits, 50 greedy tokens; how long reading the file takes, and how much memory; then the loss where
attention does not see all. Not a test, as it needs `transformers` and `accelerate`, and a minute:

    python tests/smollm2_parity.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf > results/smollm2.txt
"""
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.text import read_text
from lib.llama import copy_weights, open_llama
from lm2 import LM2, LM2Config

N_TOKENS, N_PROMPT, N_NEW = 500, 40, 50
N_LOSS = 2048


def peak():
    """Peak memory of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def loss(llama, weights, ids, **attention):
    """Mean loss of ids in nats per token."""
    model = LM2(LM2Config(**llama.shape, memory="none", **attention)).eval()
    model.load_state_dict(weights)
    return model(ids[:, :-1], ids[:, 1:])[1].item()


@torch.no_grad()
def main(path):
    before, start = peak(), time.time()
    llama = open_llama(path)
    model = LM2(LM2Config(**llama.shape, memory="none", attention="full")).eval()
    copy_weights(llama, model)
    seconds, memory = time.time() - start, peak() - before
    weights = 4 * sum(p.numel() for p in model.parameters())
    ids = llama.tokenizer.encode(read_text("shakespeare").text[:4000])[:N_TOKENS]
    x = torch.tensor([ids])
    logits = model(x)[0][0]
    written = model.generate(x[:, :N_PROMPT], N_NEW, temperature=0)[0, N_PROMPT:]

    import transformers  # only now: its memory does not count
    folder, name = Path(path).parent, Path(path).name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name,
                                                               dtype=torch.float32).eval()
    their_ids = tokenizer(read_text("shakespeare").text[:4000], add_special_tokens=False).input_ids
    difference = (theirs(x).logits[0] - logits).abs().max().item()
    their_text = theirs.generate(x[:, :N_PROMPT], max_new_tokens=N_NEW, do_sample=False,
                                 eos_token_id=None)[0, N_PROMPT:]
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {name}\n"
          f"same ids of {N_TOKENS} tokens: {their_ids[:N_TOKENS] == ids}\n"
          f"largest difference of logits: {difference:.1e}, largest logit "
          f"{logits.abs().max().item():.1f}\n"
          f"same {N_NEW} greedy tokens: {torch.equal(written, their_text)}\n"
          f"read in {seconds:.1f} s, with {memory / 1e6:.0f} MB more than before, of which "
          f"{weights / 1e6:.0f} MB are weights in float32")
    ids = torch.tensor([llama.tokenizer.encode(read_text("shakespeare").text[:4 * N_LOSS])])
    found = []
    for attention, T in (("full", N_LOSS), ("segment", 256), ("window", 256), ("segment", 64),
                         ("window", 64)):
        nats = loss(llama, model.state_dict(), ids[:, :N_LOSS + 1], attention=attention,
                    block_size=T)
        found.append(f"{attention} of {T:,} {nats:.2f}")
    print(f"loss on {N_LOSS:,} tokens, by what attention sees: {', '.join(found)}")


if __name__ == "__main__":
    main(sys.argv[1])
