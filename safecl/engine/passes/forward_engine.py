"""A model that is only asked: no gradients, no optimizer, in ZeRO-3 or as a whole copy on every rank.

Has what `outputs_of_rows` and `LiveModel` need of a TrainingEngine, at 2 bytes a weight (4 in fp32) instead of 16 and
more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from safecl.config import DeepSpeedConfig, ModelConfig
from safecl.distributed import collectives
from safecl.engine.model.language_model import LanguageModel, logits_of
from safecl.engine.passes.micro_batches import Layout
from safecl.engine.passes.opening import open_language_model
from safecl.engine.zero.shards import initialize


class ForwardEngine:
    """A model in evaluation mode on all ranks. Its forward passes are collective calls in ZeRO-3, where every rank must
    make as many."""

    def __init__(
        self, model: LanguageModel, layout: Layout, *, dtype: str, sharding: DeepSpeedConfig, store: Any = None
    ):
        """`store`: what the model's weights are views of, where they are. ZeRO stages 1 and 2 shard nothing that a
        forward pass needs."""
        self.layout, self.rank, self.device = layout, collectives.rank(), collectives.device()
        model.requires_grad_(False).eval()
        if sharding.stage == 3:
            alike = [p for p in model.parameters() if store is not None and store.holds(p)]
            self.deepspeed = initialize(model, None, _config(dtype, sharding), alike=alike)
            self.module = self.deepspeed.module
        else:
            self.deepspeed = self.module = model.to(self.device)
        self.deepspeed.train = lambda mode=True: self.deepspeed  # what runs after a forward pass of a training engine

    logits = logits_of


def open_forward_engine(
    settings: ModelConfig,
    tokenizer: Any,
    *,
    sharding: DeepSpeedConfig,
    tokens_per_microbatch: int,
    packing: str = "auto",
    note: Callable[[str], None] = lambda message: None,
) -> ForwardEngine:
    """The model as given, without adapters. A collective call. Raises ConfigError."""
    alone = settings.model_copy(update={"lora": None, "gradient_checkpointing": False})
    model, layout, store = open_language_model(
        alone, packing=packing, tokens_per_microbatch=tokens_per_microbatch, pad_id=tokenizer.pad_token_id, note=note
    )
    return ForwardEngine(model, layout, dtype=settings.dtype, sharding=sharding, store=store)


def _config(dtype: str, sharding: DeepSpeedConfig) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": 3}
    if sharding.offload.parameters == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**9, "zero_optimization": zero}
    return config | ({"bf16": {"enabled": True}} if dtype == "bf16" else {})
