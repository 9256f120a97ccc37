"""A model's sizes, read without its weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from safecl.config import LoraConfig, RunConfig


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides how much memory it takes; numbers of weights, and bytes of activations."""

    weights: int
    trained: int
    largest: int
    """The largest trained parameter."""
    largest_layer: int
    hidden: int
    vocab: int
    activations: int = 0
    """Bytes at the peak of a micro-batch, the head's logits left out."""

    @classmethod
    def of(cls, model: nn.Module, config: RunConfig) -> ModelShape:
        """Of a model whose parameters may be on the meta device; with LoRA the adapters are what is trained."""
        from safecl.planning.activations import activation_bytes

        alone = cls.without_activations(model, config.model.lora)
        return replace(
            alone, activations=activation_bytes(model.config, config.model, _rows(config), masked=_is_masked(config))
        )

    @classmethod
    def without_activations(cls, model: nn.Module, lora: LoraConfig | None = None) -> ModelShape:
        weights = sum(p.numel() for p in model.parameters())
        layers = max(
            (m for m in model.modules() if isinstance(m, nn.ModuleList)),
            key=lambda m: sum(p.numel() for p in m.parameters()),
        )
        settings = model.config.get_text_config()
        adapters = [lora.r * count for sizes in _adapted(model, lora) for count in sizes] if lora is not None else []
        return cls(
            weights=weights,
            trained=weights if lora is None else sum(adapters),
            largest=max(adapters) if adapters else max(p.numel() for p in model.parameters()),
            largest_layer=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
            hidden=settings.hidden_size,
            vocab=settings.vocab_size,
        )  # fmt: skip


def _rows(config: RunConfig) -> tuple[int, int]:
    """[rows, tokens] of a full micro-batch of the longest rows."""
    tokens = config.train.tokens_per_microbatch
    length = tokens if config.train.packing == "packed" else min(config.train.max_length, tokens)
    return -(-tokens // length), length


def _is_masked(config: RunConfig) -> bool:
    """Packed documents are kept apart by a mask, but for flash attention, which knows where they begin."""
    from safecl.engine.model.settings import choose_attention

    return config.train.packing == "packed" and choose_attention(config.model.attention)[0] != "flash_attention_2"


def _adapted(model: nn.Module, lora: LoraConfig) -> Iterator[tuple[int, int]]:
    """(inputs, outputs) of the linear maps that get an adapter."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            if lora.target_modules == "all-linear" or any(_is_target(name, target) for target in lora.target_modules):
                yield module.in_features, module.out_features


def _is_target(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}") or fnmatchcase(name, target)
