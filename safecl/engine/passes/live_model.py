"""The live model as the evaluation sees it, in any ZeRO stage, and the average in its place for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from safecl.distributed import collectives
from safecl.engine.model.language_model import base_model
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.evaluation.answers.model import eos_ids_of


class LiveModel:
    """safecl.evaluation's EvalModel over a training engine. Generation goes through the live shards, so no second model
    exists."""

    def __init__(self, engine: TrainingEngine):
        self._engine = engine
        self.device = engine.device
        self.rank = collectives.rank()
        self.world_size = collectives.world_size()
        model = base_model(engine.module.model)
        settings = model.config.get_text_config()
        self.vocab_size = settings.vocab_size
        self.max_positions = getattr(settings, "max_position_embeddings", None)
        self.eos_ids = eos_ids_of(model)

    def logits(
        self, input_ids, attention_mask, position_ids, past=None, use_cache=False, last_only=False
    ) -> tuple[torch.Tensor, object]:
        """Logits [batch, length or 1, vocab] and the cache, which is `past` itself: it grows in place."""
        if use_cache and past is None:
            from transformers import DynamicCache

            past = DynamicCache(config=self._engine.module.model.config)
        logits = self._engine.logits(input_ids, attention_mask, position_ids, past, use_cache, last_only)
        return logits, past

    def any(self, flag: bool) -> bool:
        return collectives.any_rank(flag)

    def gather(self, items: list) -> list:
        return collectives.gather_objects(items)


@contextmanager
def evaluating(engine: TrainingEngine, average: bool) -> Iterator[LiveModel]:
    """The model in evaluation mode, with the EMA as its weights where `average` says so; everything is as before
    afterwards."""
    engine.deepspeed.eval()
    if average:
        engine.shards.swap(engine.optimizer.tensors("ema"))
    try:
        yield LiveModel(engine)
    finally:
        if average:
            engine.shards.swap(engine.optimizer.tensors("ema"))
        engine.deepspeed.train()
