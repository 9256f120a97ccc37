"""The base of all engines: a language model on all ranks, and its forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch

from safecl.distributed import progress
from safecl.engine.model.attention import Sequences
from safecl.engine.model.language_model import LanguageModel
from safecl.engine.passes.micro_batches import MicroBatchLayout

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class ModelEngine:
    """A language model on all ranks, in any ZeRO stage.

    Forward passes are collective calls under ZeRO-3: every rank must make the same number of them.
    """

    deepspeed: DeepSpeedEngine | LanguageModel
    """Call this for a forward pass. It is the module itself where DeepSpeed has nothing to do."""
    module: LanguageModel
    layout: MicroBatchLayout
    rank: int
    device: torch.device
    stage: int
    """ZeRO stage of the weights: 3 where they are cut up, 0 where nothing is."""
    evaluation: Literal["auto", "whole", "streamed"]
    """See deepspeed.evaluation."""

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        self.deepspeed.eval()
        yield

    @torch.no_grad()
    def logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        past: Any = None,
        use_cache: bool = False,
        last_only: bool = False,
        sequences: Sequences | None = None,
    ) -> torch.Tensor:
        """The model's own logits, [batch, length or 1, vocab]."""
        output = self.deepspeed(
            task="logits",
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past=past,
            use_cache=use_cache,
            last_only=last_only,
            sequences=sequences,
        )
        progress.beat()
        return output["logits"]
