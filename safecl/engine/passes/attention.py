"""The attention kernel of an engine: taken into use when the weights are on the device, proved there, and compared with
exact attention from time to time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from safecl.config import ConfigError, ModelConfig
from safecl.engine.model.attention import (
    LARGEST_DIFFERENCE,
    ON_GPUS_ONLY,
    Sequences,
    attention_of,
    exact_attention,
    use_attention,
    watched_attention,
)
from safecl.engine.model.checks import refuse_mixed_documents
from safecl.engine.model.settings import choose_attention
from safecl.engine.passes.engine import ModelEngine
from safecl.storage.untrusted import library_error

_FIRST, _SECOND = torch.arange(2, 63), torch.arange(3, 70)  # the documents that are compared


def start_attention(engine: ModelEngine, config: ModelConfig, *, packing: str, note: Callable[[str], None]) -> None:
    """Take the chosen kernel into use and prove it on the device: packed documents do not see each other, and one layer
    is near exact attention. A collective call.

    Where flash attention does not serve, `attention: auto` falls back by name to the kernel that transformers chose,
    and to padded rows unless `packing` (of the config) asks for packed ones. Raises ConfigError where a kernel that the
    config names does not serve, or packed rows mix in another one.
    """
    wanted, _ = choose_attention(config.attention, config.dtype)
    if wanted in ON_GPUS_ONLY:
        try:
            use_attention(engine.module.model, wanted)
            _check_packing(engine)
            problem = _imprecision(engine)
        except (ValueError, ImportError) as error:  # ConfigError is a ValueError
            problem = library_error(error)
        if problem is None:
            return
        if config.attention != "auto":
            raise ConfigError(
                f"model.attention: {wanted} cannot be used: {problem}; use `auto` or {engine.module.runs_anywhere}"
            )
        _fall_back(engine, wanted, problem, note)
        if packing == "auto":
            engine.layout = dataclasses.replace(engine.layout, packed=False)
    if engine.device.type != "cpu":
        _check_packing(engine)


def guard_attention(engine: ModelEngine, note: Callable[[str], None]) -> None:
    """Compare one layer with exact attention at the weights as they are, and fall back by name where it is too far off.
    A collective call."""
    name = attention_of(engine.module.model)
    if name in ON_GPUS_ONLY and (problem := _imprecision(engine)) is not None:
        _fall_back(engine, name, problem, note)


def _fall_back(engine: ModelEngine, name: str, problem: str, note: Callable[[str], None]) -> None:
    use_attention(engine.module.model, engine.module.runs_anywhere)
    note(f"attention: {name} is not used: {problem}; {engine.module.runs_anywhere} takes its place")


def _check_packing(engine: ModelEngine) -> None:
    if engine.layout.packed:
        refuse_mixed_documents(_logits(engine, [_FIRST, _SECOND])[len(_FIRST) :], _logits(engine, [_SECOND]))


def _imprecision(engine: ModelEngine) -> str | None:
    """Why the kernel is not exact enough; None where it is, on all ranks alike."""
    differences: list[Tensor] = []

    def compare(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, options: dict[str, Any]) -> None:
        if differences or options.get("s_aux") is not None:  # attention sinks are not in the formula
            return
        bounds = torch.tensor([0, len(_FIRST), len(_FIRST) + len(_SECOND)], device=output.device)
        query, key, value = inputs
        exact = exact_attention(
            query,
            key,
            value,
            bounds,
            scaling=options.get("scaling") or query.shape[-1] ** -0.5,
            softcap=options.get("softcap"),
            window=options.get("sliding_window"),
        )
        differences.append((output.float() - exact).norm() / exact.norm().clamp_min(1e-20))

    with watched_attention(engine.module.model, compare):
        _logits(engine, [_FIRST, _SECOND])
    if differences and not float(differences[0]) <= LARGEST_DIFFERENCE:
        return f"a layer is {float(differences[0]):.1%} away from exact attention (limit {LARGEST_DIFFERENCE:.0%})"
    return None


def _logits(engine: ModelEngine, documents: list[Tensor]) -> Tensor:
    """Logits [tokens, vocab] of packed documents."""
    ids = torch.cat(documents) % engine.module.vocab_size
    places = torch.cat([torch.arange(len(document)) for document in documents])
    bounds = torch.tensor([0, *map(len, documents)]).cumsum(0).to(engine.device, torch.int32)
    sequences = Sequences(cu_seqlens=bounds, max_length=max(map(len, documents)), packed=True)
    with engine.evaluation_mode():
        return engine.logits(ids[None].to(engine.device), None, places[None].to(engine.device), sequences=sequences)[0]
