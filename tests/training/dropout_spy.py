"""A run on the pool's ranks whose every use of dropout is watched."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator

import torch


def uses_of_dropout(tree: dict, cache: str) -> dict[str, list[str]]:
    """Run the config; return the safecl functions on the stack at each use of dropout, each stack once.

    "training": in a pass that trains the student. "estimates": anywhere else.
    """
    from safecl.config import RunConfig
    from safecl.training.trainer import Trainer

    os.environ["SAFECL_CACHE"] = cache
    found: dict[str, set[str]] = {"training": set(), "estimates": set()}
    with _watched(found):
        Trainer(RunConfig.model_validate(tree)).fit()
    return {kind: sorted(stacks) for kind, stacks in found.items()}


@contextlib.contextmanager
def _watched(found: dict[str, set[str]]) -> Iterator[None]:
    functional = torch.nn.functional
    dropout, attention = functional.dropout, functional.scaled_dot_product_attention

    def note() -> None:
        calls = [frame.name for frame in traceback.extract_stack() if "/safecl/" in frame.filename]
        trains = {"train_step", "_forward_backward"} <= set(calls) and not {"estimate_fisher", "_reference"} & set(
            calls
        )
        found["training" if trains else "estimates"].add(" > ".join(calls[-6:]))

    def watched_dropout(input, p=0.5, training=True, inplace=False):
        if p and training:
            note()
        return dropout(input, p, training, inplace)

    def watched_attention(*arguments, dropout_p=0.0, **options):
        if dropout_p:
            note()
        return attention(*arguments, dropout_p=dropout_p, **options)

    functional.dropout, functional.scaled_dot_product_attention = watched_dropout, watched_attention
    try:
        yield
    finally:
        functional.dropout, functional.scaled_dot_product_attention = dropout, attention
