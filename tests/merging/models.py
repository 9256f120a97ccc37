"""Tiny models of four families, a base and two tuned ones each, and an fp64 view of what lies in a folder."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from tests.evaluation.models import byte_tokenizer

SIZES = {
    "vocab_size": 288,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "gemma": ("GemmaConfig", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen": ("Qwen2Config", {"tie_word_embeddings": False}),
    "neox": ("GPTNeoXConfig", {"tie_word_embeddings": False}),
}
TUNED = ("tuned", "tuned2")


@functools.cache
def tiny(family: str) -> transformers.PreTrainedModel:
    """A random model; biases and norms are random as well."""
    name, options = FAMILIES[family]
    sizes = {key: value for key, value in SIZES.items() if not (family == "neox" and key == "num_key_value_heads")}
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes, **options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def moved(model: transformers.PreTrainedModel, seed: int, size: float = 0.02) -> dict[str, torch.Tensor]:
    """The model's weights after noise, as `tuned` weights; tied weights move once."""
    generator = torch.Generator().manual_seed(seed)
    return {name: p.detach() + size * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def save(
    model: transformers.PreTrainedModel, values: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype
) -> None:
    """Save a model with these weights in three files, with tokenizer and chat template."""
    made = type(model)(model.config)
    made.load_state_dict(values, strict=False)
    made.tie_weights()
    made = made.to(dtype)
    total = sum(p.numel() * p.element_size() for p in made.parameters())
    made.save_pretrained(folder, max_shard_size=int(total * 0.45))
    byte_tokenizer().save_pretrained(folder)


def make_parents(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, Path]:
    """Folders of a base and of two tuned models, `base`, `tuned` and `tuned2`."""
    model = tiny(family)
    values = {"base": moved(model, 0, 0.0)} | {name: moved(model, seed) for seed, name in enumerate(TUNED, start=1)}
    for name, state in values.items():
        save(model, state, folder / name, dtype)
    return {name: folder / name for name in values}


def state(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder as they are stored, read by the library of the format."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def exact(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder in fp64."""
    return {name: value.double() for name, value in state(folder).items()}


def assert_rounded(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The stored values are the expected ones (fp64), with an error of at most one unit in the last place. Where terms
    cancel, the error of fp32 arithmetic on the tensor's largest values is allowed as well."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        ulp = torch.finfo(value.dtype).eps * torch.frexp(expected[name])[1].double().sub(1).exp2()
        error = (value.double() - expected[name]).abs()
        cancelled = 2.0**-22 * float(expected[name].abs().max())
        assert bool((error <= ulp + cancelled).all()), (name, float((error / ulp).max()))


def settings(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))
