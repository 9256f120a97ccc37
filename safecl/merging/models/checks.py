"""Checks that models can be merged at all: one architecture, one tokenizer, one ancestor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from safecl.merging.base import Unmergeable
from safecl.merging.models.tokens import Tokens, difference
from safecl.merging.models.view import Source, View

_STRUCTURE = (
    "model_type",
    "architectures",
    "hidden_size",
    "n_embd",
    "intermediate_size",
    "num_hidden_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "rms_norm_eps",
    "layer_norm_eps",
    "rope_theta",
    "rotary_emb_base",
    "rotary_pct",
    "partial_rotary_factor",
    "use_parallel_residual",
    "final_logit_softcapping",
    "attn_logit_softcapping",
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
)
"""Settings that decide what the weights mean. Two models that name one of them differently are not merged."""

_NUM_SAMPLED, _SAMPLED_ELEMENTS = 6, 65536
LEAST_COSINE = 0.2
"""Models tuned from one base have cosines near 1, independently trained ones near 0."""


def check_settings(home: Source, other: Source) -> None:
    """Raise Unmergeable with the first setting in which two models differ."""
    mine, theirs = _flat(home.settings), _flat(other.settings)
    for key in _STRUCTURE:
        if key in mine and key in theirs and mine[key] != theirs[key]:
            raise Unmergeable(
                f"{other.label}: {key} is {_short(theirs[key])} in its config.json and {_short(mine[key])} in that of "
                f"{home.label}; only models of one architecture can be merged"
            )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the text model, with those of its rotary embedding, in the words of transformers 4."""
    flat = dict(settings)
    for part in ("text_config", "rope_parameters", "rope_scaling"):
        if isinstance(inner := flat.get(part), Mapping):
            flat |= {key: value for key, value in inner.items() if key not in ("architectures", "model_type")}
    return {key: value for key, value in flat.items() if value is not None}


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def check_tokens(home: Source, mine: Tokens | None, other: Source, theirs: Tokens | None) -> None:
    """Raise Unmergeable where an id is another token in the other model."""
    if mine is None or theirs is None:
        return
    if found := difference(mine, theirs):
        raise Unmergeable(
            f"{other.label}: its tokenizer is another than that of {home.label}: {found}; same_tokens=false merges "
            "them nevertheless"
        )


def check_more_tokens(home: Source, mine: Tokens | None, other: Source, theirs: Tokens | None) -> None:
    """Raise Unmergeable where the other tuned model knows tokens that the first does not: the result would lose
    them."""
    if mine is None or theirs is None or not mine.tokens:
        return
    if lost := sorted(theirs.tokens.keys() - mine.tokens.keys()):
        raise Unmergeable(
            f"{other.label}: has {len(lost)} token{'s' * (len(lost) > 1)} that {home.label} does not have, first "
            f"{theirs.tokens[lost[0]]!r}; name it as the first --tuned, whose tokenizer the result has"
        )


def check_related(home: View, others: Sequence[View]) -> None:
    """Raise Unmergeable where a model's weights have nothing in common with those of the first tuned one.

    Compares the first rows of a few large matrices.
    """
    matrices = sorted(
        (name for name, shape in home.shapes.items() if len(shape) == 2), key=lambda name: -_size(home, name)
    )
    step = max(1, len(matrices) // _NUM_SAMPLED)
    for other in others:
        cosines = [c for name in matrices[::step][:_NUM_SAMPLED] if (c := _cosine(home, other, name)) is not None]
        if cosines and sum(cosines) / len(cosines) < LEAST_COSINE:
            raise Unmergeable(
                f"{other.label}: its weights have nothing in common with those of {home.label} (cosine "
                f"{sum(cosines) / len(cosines):.2f}), so they were not tuned from one base; related=false merges them "
                "nevertheless"
            )


def _size(model: View, name: str) -> int:
    return math.prod(model.shapes[name])


def _cosine(a: View, b: View, name: str) -> float | None:
    rows = max(1, _SAMPLED_ELEMENTS // a.shapes[name][1])
    x, y = (model.read(name, 0, rows).flatten().double() for model in (a, b))
    length = float(x.norm() * y.norm())
    return float(torch.dot(x, y)) / length if length > 0 else None
