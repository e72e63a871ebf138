"""
Tiny Llama models with random weights, and what Hugging Face makes of them: the files in
tests/tiny_llama, so that the tests can check how we read such models without its packages.

    plain/         float16, a head of its own, as many key-value heads as heads
    grouped/       bfloat16, tied head, 2 key-value heads for 4 heads; a tokenizer like SmolLM2's
    scaled/        float32, tied head, 2 key-value heads, the rope scaling of Llama 3
    grouped.gguf   grouped/ as llama.cpp writes it: embedding Q8_0, matrices Q4_1, those whose rows
                   are no multiple of 32 long (ffn_down) F16, norms F32

Each folder is what save_pretrained writes, without generation_config.json, and

    expected.safetensors
        ids            int64 (1, length)
        logits         float32 (6, vocabulary): of the last 6 positions, computed in float32
        gguf_logits    grouped/ only: the same, by the weights of grouped.gguf
    texts.json         grouped/ only: a list of {text, ids, ordinary}, ordinary being the ids where
                       the names of special tokens are text like any other

To make them again, byte for byte, with Python 3.11:

    pip install torch==2.13.0 numpy==2.4.6 transformers==5.24.0 tokenizers==0.23.3
    pip install safetensors==0.8.0 gguf==0.19.0 accelerate==1.15.0
    python tests/make_tiny_llama.py
"""
import json
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType as Q
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parent / "tiny_llama"
SEED = 1
LAST = 6  # positions whose logits are kept

# Only grouped/ has a tokenizer and is quantized; smaller shapes keep the other files small.
SHAPE = dict(
    vocab_size=48, hidden_size=32, intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5,
    max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1, eos_token_id=0,
)
PLAIN = SHAPE | dict(
    num_key_value_heads=4, tie_word_embeddings=False, rms_norm_eps=1e-6, dtype="float16",
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)
GROUPED = SHAPE | dict(
    vocab_size=288, intermediate_size=40, dtype="bfloat16",
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
)
# The wavelengths of the four frequencies are 6, 13, 28 and 59 positions. Those below 32/4 stay,
# those above 32/1 become 8 times as long, and the two in between something in between.
SCALED = SHAPE | dict(
    dtype="float32",
    rope_parameters={
        "rope_type": "llama3", "rope_theta": 20.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    },
)

SPECIAL = ["<|endoftext|>", "<|im_start|>"]
TEXTS = [
    "",
    "The vorpal blade went snicker-snack, and the borogoves gyred.",
    "  two spaces before, two after  ",
    "In 1871, 12 toves  34\tand 5.6e7",
    "one line\n\n    another\r\n\n",
    "it's they'll we'VE 'twas don't",
    "naïve 東京 🙂 café e\u0301 \u00a0\u200b\u3000.",
    "x²  ½  ٣  Ⅷ  ①  三",
    "one<|endoftext|>two <|im_start|>user\n<|im_end|> <|endoftext|",
]

# Lewis Carroll, 1871
PAGE = """
'Twas brillig, and the slithy toves
    Did gyre and gimble in the wabe;
All mimsy were the borogoves,
    And the mome raths outgrabe.

"Beware the Jabberwock, my son!
    The jaws that bite, the claws that catch!
Beware the Jubjub bird, and shun
    The frumious Bandersnatch!"

He took his vorpal sword in hand:
    Long time the manxome foe he sought--
So rested he by the Tumtum tree,
    And stood awhile in thought.

And as in uffish thought he stood,
    The Jabberwock, with eyes of flame,
Came whiffling through the tulgey wood,
    And burbled as it came!

One, two! One, two! And through and through
    The vorpal blade went snicker-snack!
He left it dead, and with its head
    He went galumphing back.
"""


# --- Models

def make_model(folder, settings, length, embedding_std):
    """Write a folder: a model of random weights, and the logits of random ids."""
    random = torch.Generator().manual_seed(SEED)
    config = LlamaConfig(**settings)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "norm" in name:
                weights.uniform_(0.5, 1.5, generator=random)
            else:
                std = embedding_std if "embed" in name else 0.3
                weights.normal_(std=std, generator=random)
    model.to(config.dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    ids = torch.randint(config.vocab_size, (1, length), generator=random)
    expected = {"ids": ids, "logits": last_logits(ids, folder)}
    save_file(expected, folder / "expected.safetensors")


@torch.no_grad()
def last_logits(ids, folder, **file):
    """The last logits of a model as transformers reads it from a folder."""
    model = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **file)
    return model(ids).logits[0, -LAST:].contiguous()


# --- A tokenizer

def make_tokenizer(folder):
    """Write a byte-level BPE, split as that of SmolLM2, and what it makes of some texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=GROUPED["vocab_size"], special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator([PAGE], trainer)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    rows = ",\n".join(json.dumps(encoded(tokenizer, text)) for text in TEXTS)
    (folder / "texts.json").write_text(f"[\n{rows}\n]\n")


def encoded(tokenizer, text):
    row = {"text": text}
    for name, ordinary in ("ids", False), ("ordinary", True):
        tokenizer.encode_special_tokens = ordinary
        row[name] = tokenizer.encode(text).ids
        assert tokenizer.decode(row[name], skip_special_tokens=False) == text
    return row


# --- GGUF

def make_gguf(path, folder):
    """Write the model and the tokenizer of a folder as llama.cpp writes them."""
    writer = gguf.GGUFWriter(path, "llama")
    add_shape(writer, LlamaConfig.from_pretrained(folder))
    add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()))
    for name, weights in load_file(folder / "model.safetensors").items():
        add_weights(writer, name, weights.float())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_shape(writer, config):
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_tokenizer(writer, saved):
    """saved: tokenizer.json"""
    tokens = sorted(saved["model"]["vocab"], key=saved["model"]["vocab"].get)
    kinds = [gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL
             for token in tokens]
    writer.add_add_bos_token(False)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in saved["model"]["merges"]])


def add_weights(writer, name, weights):
    """Add one tensor under its name in GGUF."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, GROUPED["num_hidden_layers"])
    if "q_proj" in name or "k_proj" in name:
        weights = paired(weights)
    if "norm" in name:
        kind = Q.F32
    elif weights.shape[1] % 32:
        kind = Q.F16
    else:
        kind = Q.Q8_0 if "embed" in name else Q.Q4_1
    data = gguf.quants.quantize(weights.numpy(), kind)
    writer.add_tensor(names.get_name(name, [".weight"]), data, raw_dtype=kind)


def paired(weights):
    """
    The rows of a query or key matrix for a rope that turns neighbours, as that of GGUF: in
    transformers' order, row i of a head is turned with row i + 4 of its 8.
    """
    heads = weights.view(-1, 2, GROUPED["head_dim"] // 2, weights.shape[1])
    return heads.transpose(1, 2).reshape(weights.shape)


def main():
    make_model(FOLDER / "plain", PLAIN, length=40, embedding_std=0.03)
    make_model(FOLDER / "scaled", SCALED, length=96, embedding_std=0.3)
    folder = FOLDER / "grouped"
    make_model(folder, GROUPED, length=40, embedding_std=0.3)
    make_tokenizer(folder)
    make_gguf(FOLDER / "grouped.gguf", folder)
    expected = load_file(folder / "expected.safetensors")
    expected["gguf_logits"] = last_logits(expected["ids"], FOLDER, gguf_file="grouped.gguf")
    save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
