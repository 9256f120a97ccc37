"""A tiny model with its tokenizer, and damages and settings that make it unusable."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WORDS = [f"what is {i} plus {i + 1} the answer is {2 * i + 1}" for i in range(40)]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@functools.cache
def tokenizer():
    from safecl.demo.model import train_tokenizer

    return train_tokenizer(WORDS, 120)


def save_model(folder: Path, family: str = "Llama", **settings) -> Path:
    """Save a tiny model with the tokenizer; its vocabulary is the tokenizer's."""
    import transformers

    torch.manual_seed(0)
    sizes = dict(vocab_size=len(tokenizer()), hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    sizes |= dict(intermediate_size=24, max_position_embeddings=256, pad_token_id=None, tie_word_embeddings=False)
    config = getattr(transformers, f"{family}Config")(**(sizes | settings))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors", {"format": "pt"})


def without_head(tensors):
    tensors.pop(HEAD)


def without_a_layer(tensors):
    for name in [name for name in tensors if ".layers.1." in name]:
        tensors.pop(name)


def prefixed(prefix):
    return lambda tensors: {prefix + name: value for name, value in tensors.items()}


def with_renamed_head(tensors):
    tensors["output.weight"] = tensors.pop(HEAD)


def in_fp8(tensors):
    tensors[HEAD] = tensors[HEAD].to(torch.float8_e4m3fn)


DAMAGES = [
    (without_head, r"tensor lm_head\.weight is missing"),
    (without_a_layer, r"tensor model\.layers\.1\.\S+ is missing, and 8 more"),
    (prefixed("_orig_mod."), r"is missing.*begin with `_orig_mod\.`.*torch\.compile"),
    (prefixed("module."), r"is missing.*begin with `module\.`.*data-parallel"),
    (with_renamed_head, r"tensor lm_head\.weight is missing"),
    (in_fp8, r"F8_E4M3"),
]

# LoRA targets
LORA = [
    (["q_proj", "k_porj"], "no module is named k_porj; did you mean k_proj"),
    (["c_attn"], "no module is named c_attn"),
    (["model.layers.7.self_attn.q_proj"], "did you mean q_proj"),
    (["norm"], "model.lora: Target module .* is not supported"),
]
