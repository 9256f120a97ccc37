"""A model for forward passes only: no gradients and no optimizer, in ZeRO-3 or as a whole copy on every rank.

A weight takes 2 bytes (4 in fp32), where training takes 16 and more.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from safecl.config import DeepSpeedConfig, ModelConfig, RunConfig
from safecl.distributed import collectives, devices
from safecl.engine.model.language_model import LanguageModel
from safecl.engine.passes.attention import start_attention
from safecl.engine.passes.engine import ModelEngine
from safecl.engine.passes.micro_batches import MicroBatchLayout
from safecl.engine.passes.open_model import open_language_model
from safecl.engine.reference.store import ReferenceStore
from safecl.engine.zero.shards import initialize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ForwardEngine(ModelEngine):
    """A model in evaluation mode on all ranks."""

    def __init__(
        self,
        model: LanguageModel,
        layout: MicroBatchLayout,
        *,
        dtype: str,
        sharding: DeepSpeedConfig,
        store: ReferenceStore | None = None,
    ):
        """`store`: the store whose memory the model's weights are views of.

        Only ZeRO-3 shards the model: stages 1 and 2 shard nothing that a forward pass needs.
        """
        self.layout, self.rank, self.device = layout, collectives.rank(), collectives.device()
        self.stage, self.evaluation = 3 if sharding.stage == 3 else 0, sharding.evaluation
        self._store = store
        model.requires_grad_(False).eval()
        if sharding.stage == 3:
            viewed = [p for p in model.parameters() if store is not None and store.holds(p)]
            engine = initialize(model, None, _config(dtype, sharding), viewed=viewed)
            self.deepspeed, self.module = engine, engine.module
        else:
            self.deepspeed = self.module = model.to(self.device)

    def close(self) -> None:
        """Give the model's memory back. The engine cannot be used after it."""
        if not isinstance(self.deepspeed, LanguageModel):
            self.deepspeed.destroy()
        del self.deepspeed, self.module
        if self._store is not None:
            self._store.close()
        gc.collect()
        if devices.on_gpu():
            torch.cuda.empty_cache()


def open_forward_engine(
    settings: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sharding: DeepSpeedConfig,
    tokens_per_microbatch: int,
    packing: str = "auto",
    note: Callable[[str], None] = lambda message: None,
) -> ForwardEngine:
    """Open the model without adapters. A collective call. Raises ConfigError."""
    alone = settings.model_copy(update={"lora": None, "gradient_checkpointing": False})
    model, layout, store = open_language_model(
        alone, packing=packing, tokens_per_microbatch=tokens_per_microbatch, pad_id=tokenizer.pad_token_id, note=note
    )
    engine = ForwardEngine(model, layout, dtype=settings.dtype, sharding=sharding, store=store)
    start_attention(engine, alone, packing=packing, note=note)
    return engine


def forward_engine_of(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, note: Callable[[str], None]
) -> ForwardEngine:
    """Open the model of a run config without adapters, sharded as the run is. A collective call. Raises ConfigError."""
    return open_forward_engine(
        config.model,
        tokenizer,
        sharding=config.deepspeed,
        tokens_per_microbatch=config.train.tokens_per_microbatch,
        packing=config.train.packing,
        note=note,
    )


def _config(dtype: str, sharding: DeepSpeedConfig) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": 3}
    if sharding.offload.parameters == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**9, "zero_optimization": zero}
    return config | ({"bf16": {"enabled": True}} if dtype == "bf16" else {})
