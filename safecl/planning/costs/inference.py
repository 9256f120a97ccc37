"""Counts the bytes that a forward pass of an evaluation takes besides the weights: activations, the cache of keys and
values, and logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from safecl.config import ModelConfig
from safecl.engine.model.adapters import base_model
from safecl.engine.model.language_model import LanguageModel
from safecl.evaluation.answers.likelihood import TOKENS_AT_ONCE
from safecl.planning.costs.activations import LiveBytes, bytes_of_all_layers, structure
from safecl.planning.passes import Inference

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def inference_bytes(settings: PretrainedConfig, config: ModelConfig, batch: Inference) -> int:
    """Return the peak bytes of a batch in the run's dtype; see `activation_bytes` of the activations."""
    model = structure(settings, config).eval()
    if batch.answer:
        return bytes_of_all_layers(model, lambda few: _generating(few, batch))
    fp32_logits = 4 * min(TOKENS_AT_ONCE, batch.rows * batch.tokens) * settings.get_text_config().vocab_size
    return bytes_of_all_layers(model, lambda few: _pass(few, batch, use_cache=False)[0]) + fp32_logits


def _generating(model: nn.Module, batch: Inference) -> int:
    """The prompt's pass, or the last token's, when the cache of a layer is copied to a longer one."""
    peak, kept = _pass(model, batch, use_cache=True)
    per_token = kept // (batch.rows * batch.tokens)
    return max(peak, batch.size * per_token) + batch.rows * per_token


@torch.no_grad()
def _pass(model: nn.Module, batch: Inference, *, use_cache: bool) -> tuple[int, int]:
    """Return the peak bytes of a pass over the prompts, and those of the cache."""
    from transformers import DynamicCache

    wrapped = LanguageModel(model)
    ids = torch.zeros(batch.rows, batch.tokens, dtype=torch.int64)
    positions = torch.arange(batch.tokens).expand(batch.rows, -1)
    past = DynamicCache(config=base_model(model).config) if use_cache else None
    live = LiveBytes(known=[*model.parameters(), *model.buffers(), ids, positions])
    with live:
        output = wrapped(
            task="logits",
            input_ids=ids,
            position_ids=positions,
            past=past,
            use_cache=use_cache,
            last_only=use_cache,
        )
        del output
        kept = live.now
    return live.peak, kept
