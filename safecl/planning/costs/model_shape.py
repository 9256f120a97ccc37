"""The sizes of a model that decide how much memory it takes, read without its weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from torch import nn

from safecl.config import LoraConfig, RunConfig
from safecl.engine.model.adapters import is_target
from safecl.engine.model.frozen import frozen_weights
from safecl.engine.model.settings import choose_attention
from safecl.planning.costs.activations import activation_bytes
from safecl.planning.costs.inference import inference_bytes
from safecl.planning.costs.items import FP32, weight_bytes
from safecl.planning.passes import Passes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ModelShape:
    """Numbers of weights, and the bytes of activations."""

    weights: int
    trained: int
    """Trained weights; with LoRA, those of the adapters."""
    largest: int
    """Weights of the largest trained parameter."""
    largest_layer: int
    """Weights of the largest decoder layer."""
    hidden: int
    vocab: int
    layers: int = 0
    """Decoder layers."""
    tied: bool = False
    """True where the head's weights are those of the embedding."""
    activations: int = 0
    """Peak bytes of a micro-batch, without the head's logits."""
    tokens: int | None = None
    """Tokens of the largest micro-batch; None for a full one."""
    evaluation: int = 0
    """Peak bytes of an evaluation's passes, with the cache of keys and values and the logits."""
    generates: bool = False
    """True where an evaluation generates answers."""
    singular_vectors: int = 0
    """Bytes of the singular vectors that a method keeps of the layers' matrices, over all ranks."""
    alignment_directions: int = 0
    """Bytes of the changes by the alignment that a method keeps of the weights with adapters, on each rank."""
    moved_hidden: int = 0
    """Bytes of the gradients of hidden states that a method keeps between two passes."""

    @classmethod
    def of(cls, model: nn.Module, config: RunConfig, passes: Passes | None = None) -> ModelShape:
        """Return the shape of a model, whose parameters may be on the meta device, in a run of this config.

        passes: the largest passes of the run; None: full micro-batches of the longest rows, and no evaluation.
        """
        alone = cls.without_activations(model, config.model.lora, functools.partial(frozen_weights, config))
        settings, batch = _settings_of(model), _micro_batch(config) if passes is None else passes.micro_batch
        evaluations = [] if passes is None else [one for one in (passes.generated, passes.scored) if one is not None]
        return replace(
            alone,
            activations=activation_bytes(settings, config.model, batch, masked=_is_masked(config)),
            tokens=None if passes is None else batch[0] * batch[1],
            evaluation=max((inference_bytes(settings, config.model, one) for one in evaluations), default=0),
            generates=passes is not None and passes.generated is not None,
            singular_vectors=_singular_vectors(model, config),
            alignment_directions=_alignment_directions(model, config),
            moved_hidden=_moved_hidden(alone, config, passes),
        )

    @classmethod
    def without_activations(
        cls,
        model: nn.Module,
        lora: LoraConfig | None = None,
        frozen: Callable[[list[str]], set[str]] = lambda names: set(),
    ) -> ModelShape:
        """Return the numbers of weights alone.

        lora: the adapters that the model will get. frozen: returns those of the trained weights that stay as they are.
        """
        weights = sum(p.numel() for p in model.parameters())
        layers = max(
            (m for m in model.modules() if isinstance(m, nn.ModuleList)),
            key=lambda m: sum(p.numel() for p in m.parameters()),
        )
        settings = _settings_of(model).get_text_config()
        sizes = {n: p.numel() for n, p in model.named_parameters()} if lora is None else dict(_adapters(model, lora))
        stays = frozen(list(sizes))
        trained = [size for name, size in sizes.items() if name not in stays]
        return cls(
            weights=weights,
            trained=sum(trained),
            largest=max(trained) if trained else max(p.numel() for p in model.parameters()),
            largest_layer=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
            hidden=settings.hidden_size,
            vocab=settings.vocab_size,
            layers=len(layers),
            tied=bool(settings.tie_word_embeddings),
        )


def _settings_of(model: nn.Module) -> PretrainedConfig:
    return cast("PreTrainedModel", model).config


def _moved_hidden(shape: ModelShape, config: RunConfig, passes: Passes | None) -> int:
    """Return the bytes of the attention outputs' gradients of a step: one hidden state per token and layer."""
    if not any(settings.moves_hidden for settings in config.methods.values()):
        return 0
    tokens = config.train.tokens_per_microbatch if passes is None else passes.alignment_tokens
    return shape.layers * tokens * shape.hidden * weight_bytes(config)


def _singular_vectors(model: nn.Module, config: RunConfig) -> int:
    """Return the bytes of singular vectors in fp32. A subspace and its complement say the same; the smaller is kept."""
    shares = [share for method in config.methods.values() if (share := method.kept_singular_share) is not None]
    layers = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    sizes = [p.shape for p in max(layers, key=len).parameters() if p.dim() == 2] if shares else []
    ranks = [round(max(shares) * min(size)) for size in sizes]
    return sum(FP32 * side * min(rank, side - rank) for size, rank in zip(sizes, ranks, strict=True) for side in size)


def _alignment_directions(model: nn.Module, config: RunConfig) -> int:
    """Return the bytes of the adapted weights in the run's dtype, where a method compares them with a base model's."""
    lora = config.model.lora
    if lora is None or not any(settings.needs_base_model for settings in config.methods.values()):
        return 0
    return weight_bytes(config) * sum(module.weight.numel() for _, module in _targets(model, lora))


def _micro_batch(config: RunConfig) -> tuple[int, int]:
    """Return [rows, tokens] of a full micro-batch of the longest rows."""
    tokens = config.train.tokens_per_microbatch
    length = tokens if config.train.packing == "packed" else min(config.train.max_length, tokens)
    return -(-tokens // length), length


def _is_masked(config: RunConfig) -> bool:
    """True where a mask separates packed documents. Flash attention needs none: it is given where they begin."""
    return (
        config.train.packing == "packed"
        and choose_attention(config.model.attention, config.model.dtype)[0] != "flash_attention_2"
    )


def _adapters(model: nn.Module, lora: LoraConfig) -> Iterator[tuple[str, int]]:
    """Yield the name and size of each weight of the adapters."""
    for name, module in _targets(model, lora):
        for part, size in (("A", module.in_features), ("B", module.out_features)):
            yield f"base_model.model.{name}.lora_{part}.default.weight", lora.r * size


def _targets(model: nn.Module, lora: LoraConfig) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the maps that get an adapter, by name."""
    head = cast("PreTrainedModel", model).get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            if lora.target_modules == "all-linear" or any(is_target(name, target) for target in lora.target_modules):
                yield name, module
