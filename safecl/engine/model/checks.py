"""Checks at the start: the fused head gives the model's logits, and packed documents do not see each other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from safecl.config import ConfigError
from safecl.engine.model.language_model import LanguageModel


@torch.no_grad()
def check_head(wrapped: LanguageModel, tolerance: float = 1e-5) -> bool:
    """Compare head(trunk(x)) with model(x).logits on a few tokens; return whether they are equal, and set
    `wrapped.fused` so.

    The comparison is repeated with hidden states so large that logits reach 100 and more: a softcap of 30 changes
    logits of 3 by 0.3 %, which bf16 hides, and logits of 300 by 90 %.
    """
    model = wrapped.model
    training, dtype = model.training, next(model.parameters()).dtype
    model.eval()
    ids = torch.arange(2, 10, device=next(model.parameters()).device)[None]
    positions = torch.arange(8, device=ids.device)[None]
    inputs = dict(input_ids=ids, attention_mask=None, position_ids=positions, use_cache=False)
    hidden = wrapped.trunk(**inputs).last_hidden_state
    largest = torch.nn.functional.linear(hidden.float(), wrapped.head.weight.float()).abs().max()
    errors = []
    for factor in (1.0, 2.0 ** round(math.log2(_LOUD / largest)) if 0 < largest < _LOUD else 1.0):
        with _louder(wrapped.trunk, factor):
            expected = model(**inputs).logits.float()
        got = _head_logits(wrapped, hidden * factor)
        errors.append(float((got - expected).norm() / expected.norm().clamp_min(1e-20)))
    model.train(training)
    wrapped.fused = max(errors) <= (tolerance if dtype == torch.float32 else 2.0**-7) and _plain_linear(wrapped.head)
    return wrapped.fused


_LOUD = 300.0


@contextmanager
def _louder(trunk: nn.Module, factor: float) -> Iterator[None]:
    """Multiplies the trunk's hidden states by a factor; a power of two rounds nothing."""

    def multiply(module: nn.Module, arguments: tuple, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * factor
        return output

    handle = trunk.register_forward_hook(multiply)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def check_packing(wrapped: LanguageModel) -> None:
    """Raise ConfigError where packed documents see each other: the second of two must have the logits that it has
    alone."""
    model, device = wrapped.model, next(wrapped.parameters()).device
    training = model.training
    model.eval()
    first, second = torch.arange(2, 9, device=device), torch.arange(3, 8, device=device)
    restart = torch.cat([torch.arange(len(first)), torch.arange(len(second))])[None].to(device)
    both = torch.cat([first, second])[None]
    packed = model(input_ids=both, attention_mask=None, position_ids=restart, use_cache=False).logits[0, len(first) :]
    alone = model(
        input_ids=second[None], attention_mask=None, position_ids=restart[:, len(first) :], use_cache=False
    ).logits[0]
    model.train(training)
    refuse_mixed_documents(packed, alone)


def refuse_mixed_documents(packed: torch.Tensor, alone: torch.Tensor) -> None:
    """Raise ConfigError where a document's logits [tokens, vocab] depend on what it is packed with."""
    error = (packed.float() - alone.float()).norm() / alone.float().norm().clamp_min(1e-20)
    if error > (1e-4 if packed.dtype == torch.float32 else 5e-2):
        raise ConfigError(
            f"train.packing: packed documents see each other in this model (logits differ by {float(error):.1%}); "
            "use packing: padded"
        )


def _plain_linear(head: nn.Module) -> bool:
    return type(head) is nn.Linear


def _head_logits(wrapped: LanguageModel, hidden: torch.Tensor) -> torch.Tensor:
    """fp32 logits [..., vocab] of hidden states by the fused head's formula."""
    head = wrapped.head
    bias = None if head.bias is None else head.bias.float()
    return wrapped.scaling.apply(torch.nn.functional.linear(hidden.float(), head.weight.float(), bias))
