"""The sizes of a model that decide how much memory it takes, read without its weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from safecl.config import LoraConfig, RunConfig
from safecl.engine.model.adapters import is_target
from safecl.engine.model.frozen import frozen_weights
from safecl.engine.model.outline import Outline
from safecl.engine.model.settings import choose_attention
from safecl.planning.costs.activations import activation_bytes
from safecl.planning.costs.inference import inference_bytes
from safecl.planning.costs.items import FP32, weight_bytes
from safecl.planning.costs.planned_model import PlannedModel
from safecl.planning.passes import Inference, Passes


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
    def of(cls, model: PlannedModel, config: RunConfig, passes: Passes | None = None) -> ModelShape:
        """Return the shape of a model in a run of this config.

        passes: the largest passes of the run; None: full micro-batches of the longest rows, and no evaluation.
        """
        outline = model.outline
        alone = cls.without_activations(outline, config.model.lora, functools.partial(frozen_weights, config))
        batch = _micro_batch(config) if passes is None else passes.micro_batch
        evaluations = [] if passes is None else [one for one in (passes.generated, passes.scored) if one is not None]
        return replace(
            alone,
            activations=_activations(model, config, batch),
            tokens=None if passes is None else batch[0] * batch[1],
            evaluation=max((_evaluation(model, config, one) for one in evaluations), default=0),
            generates=passes is not None and passes.generated is not None,
            singular_vectors=_singular_vectors(outline, config),
            alignment_directions=_alignment_directions(outline, config),
            moved_hidden=_moved_hidden(alone, config, passes),
        )

    @classmethod
    def without_activations(
        cls,
        outline: Outline,
        lora: LoraConfig | None = None,
        frozen: Callable[[list[str]], set[str]] = lambda names: set(),
    ) -> ModelShape:
        """Return the numbers of weights alone.

        lora: the adapters that the model will get. frozen: returns those of the trained weights that stay as they are.
        """
        all_sizes = [math.prod(shape) for shape in outline.parameters.values()]
        sizes = outline.sizes if lora is None else dict(_adapters(outline, lora))
        stays = frozen(list(sizes))
        trained = [size for name, size in sizes.items() if name not in stays]
        return cls(
            weights=sum(all_sizes),
            trained=sum(trained),
            largest=max(trained) if trained else max(all_sizes),
            largest_layer=max(sum(map(math.prod, outline.in_layer(layer))) for layer in outline.layers),
            hidden=outline.hidden_size,
            vocab=outline.vocab_size,
            layers=len(outline.layers),
            tied=outline.tied,
        )


def _activations(model: PlannedModel, config: RunConfig, batch: tuple[int, int]) -> int:
    masked = _is_masked(config)
    return model.counts.of(
        config.model,
        ["activations", *batch, masked],
        lambda: activation_bytes(model.settings(), config.model, batch, masked=masked),
    )


def _evaluation(model: PlannedModel, config: RunConfig, batch: Inference) -> int:
    return model.counts.of(
        config.model,
        ["evaluation", batch.rows, batch.tokens, batch.answer],
        lambda: inference_bytes(model.settings(), config.model, batch),
    )


def _moved_hidden(shape: ModelShape, config: RunConfig, passes: Passes | None) -> int:
    """Return the bytes of the attention outputs' gradients of a step: one hidden state per token and layer."""
    if not any(settings.moves_hidden for settings in config.methods.values()):
        return 0
    tokens = config.train.tokens_per_microbatch if passes is None else passes.alignment_tokens
    return shape.layers * tokens * shape.hidden * weight_bytes(config)


def _singular_vectors(outline: Outline, config: RunConfig) -> int:
    """Return the bytes of singular vectors in fp32. A subspace and its complement say the same; the smaller is kept."""
    shares = [share for method in config.methods.values() if (share := method.kept_singular_share) is not None]
    found = (shape for layer in outline.layers for shape in outline.in_layer(layer))
    sizes = [shape for shape in found if len(shape) == 2] if shares else []
    ranks = [round(max(shares) * min(size)) for size in sizes]
    return sum(FP32 * side * min(rank, side - rank) for size, rank in zip(sizes, ranks, strict=True) for side in size)


def _alignment_directions(outline: Outline, config: RunConfig) -> int:
    """Return the bytes of the adapted weights in the run's dtype, where a method compares them with a base model's."""
    lora = config.model.lora
    if lora is None or not any(settings.needs_base_model for settings in config.methods.values()):
        return 0
    return weight_bytes(config) * sum(math.prod(size) for _, size in _targets(outline, lora))


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


def _adapters(outline: Outline, lora: LoraConfig) -> Iterator[tuple[str, int]]:
    """Yield the name and size of each weight of the adapters."""
    for name, (inputs, outputs) in _targets(outline, lora):
        for part, size in (("A", inputs), ("B", outputs)):
            yield f"base_model.model.{name}.lora_{part}.default.weight", lora.r * size


def _targets(outline: Outline, lora: LoraConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the name, inputs and outputs of the maps that get an adapter."""
    for name, size in outline.linear.items():
        if lora.target_modules == "all-linear" or any(is_target(name, target) for target in lora.target_modules):
            yield name, size
