"""An engine's live model as evaluation uses it, in any ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from safecl.distributed import collectives
from safecl.engine.model.adapters import base_model
from safecl.engine.passes.engine import ModelEngine
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.evaluation.answers.model import eos_ids_of

Item = TypeVar("Item")


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

    def any(self, flag: bool) -> bool:
        return collectives.any_rank(flag)

    def gather(self, items: list[Item]) -> list[Item]:
        return collectives.gather_objects(items)


@contextmanager
def evaluating(engine: TrainingEngine, average: bool) -> Iterator[LiveModel]:
    """The model in evaluation mode, with the EMA as its weights where `average` is true.

    Leaving restores weights and mode exactly.
    """
    with engine.evaluation_mode():
        if average:
            engine.shards.swap(engine.optimizer.tensors("ema"))
        try:
            yield LiveModel(engine)
        finally:
            if average:
                engine.shards.swap(engine.optimizer.tensors("ema"))
