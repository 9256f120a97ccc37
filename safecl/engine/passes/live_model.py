"""An engine's live model as evaluation uses it, in any ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch

from safecl.distributed import collectives
from safecl.distributed.node import this_node
from safecl.engine.model.adapters import base_model
from safecl.engine.model.features import layer_numbers
from safecl.engine.passes.engine import ModelEngine
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.evaluation.answers.model import eos_ids_of
from safecl.storage.sizes import available_memory

Item = TypeVar("Item")

SHARE_FOR_WEIGHTS = 0.6
"""Of the free memory of a device, the part that gathered weights may take; activations and caches take the rest."""


class LiveModel:
    """safecl.evaluation's EvalModel over an engine. It generates from the live shards, without a second model."""

    def __init__(self, engine: ModelEngine):
        self._engine = engine
        self.device = engine.device
        self.rank = collectives.rank()
        self.world_size = collectives.world_size()
        settings = engine.module.text_settings
        self.vocab_size = settings.vocab_size
        self.max_positions = getattr(settings, "max_position_embeddings", None)
        self.eos_ids = eos_ids_of(base_model(engine.module.model))

    def logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: Any = None,
        use_cache: bool = False,
        last_only: bool = False,
    ) -> tuple[torch.Tensor, Any]:
        """Return logits [batch, length or 1, vocab] and the cache, which is `past` itself: it grows in place."""
        if use_cache and past is None:
            from transformers import DynamicCache

            past = DynamicCache(config=base_model(self._engine.module.model).config)
        logits = self._engine.logits(input_ids, attention_mask, position_ids, past, use_cache, last_only)
        return logits, past

    def mean_states(self, prompts: Sequence[Sequence[int]], depth: float) -> torch.Tensor:
        """Return the mean over each prompt's tokens of the hidden states at this depth, fp32 [prompts, H]. depth: share
        of the layers, in (0, 1]. A collective call; every rank gives at least one prompt."""
        module, width = self._engine.module, max(map(len, prompts))
        layers = layer_numbers([max(1, round(depth * module.num_layers))], module.num_layers)
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        for place, prompt in enumerate(prompts):  # what stands behind a prompt does not reach it
            ids[place, : len(prompt)] = torch.as_tensor(prompt)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        inside = torch.arange(width) < lengths[:, None]
        output = self._engine.deepspeed(
            task="hidden",
            input_ids=ids.to(self.device),
            position_ids=torch.arange(width, device=self.device).expand(len(prompts), -1),
            positions=inside.flatten().nonzero().flatten().to(self.device),
            layers=layers,
        )
        parts = output["hidden"].float().split(lengths.tolist())
        return torch.stack([part.mean(0) for part in parts])

    def any(self, flag: bool) -> bool:
        return collectives.any_rank(flag)

    def gather(self, items: list[Item]) -> list[Item]:
        return collectives.gather_objects(items)


@contextmanager
def evaluating(engine: TrainingEngine, average: bool, *, many_passes: bool = False) -> Iterator[LiveModel]:
    """The model in evaluation mode, with the EMA as its weights where `average` is true.

    many_passes: under ZeRO-3 every pass gathers all weights, and generation makes one per token. Where they fit every
    device whole, they are gathered once for the whole block instead. Leaving restores weights and mode exactly.
    """
    with engine.evaluation_mode():
        if average:
            engine.shards.swap(engine.optimizer.tensors("ema"))
        try:
            with engine.shards.whole_model() if many_passes and fits_whole(engine) else nullcontext():
                yield LiveModel(engine)
        finally:
            if average:
                engine.shards.swap(engine.optimizer.tensors("ema"))


def fits_whole(engine: TrainingEngine) -> bool:
    """Return whether every rank has room for all weights at once, beside what it holds. A collective call."""
    if engine.shards.stage < 3:
        return True
    wanted = engine.shards.whole_model_bytes
    if engine.device.type == "cuda":
        unused = torch.cuda.memory_reserved(engine.device) - torch.cuda.memory_allocated(engine.device)
        room = torch.cuda.mem_get_info(engine.device)[0] + unused
    else:
        room = (available_memory() or 2 * wanted * collectives.world_size()) // len(this_node().ranks)
    return not collectives.any_rank(wanted > SHARE_FOR_WEIGHTS * room)
