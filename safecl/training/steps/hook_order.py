"""The order in which the methods of a run get a hook: that of the config, except where results would depend on it.

start_task     a Fisher that is read from a file comes before estimates of the same state
before_step    work without gradients; lasting changes of the weights; gradients at these weights; moves of the
               weights for the step's own gradient
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safecl.config import MethodConfig
from safecl.methods.base import Method


def in_order(methods: Sequence[Method[Any]], hook: str) -> list[Method[Any]]:
    """Return these methods, which are in the order of the config, in the order in which they get the hook."""
    places = {"start_task": _place_at_the_start, "before_step": _place_before_step}
    place = places.get(hook)
    return list(methods) if place is None else sorted(methods, key=lambda method: place(method.config))


def _place_at_the_start(config: MethodConfig) -> int:
    return 0 if config.fisher_file is not None else 1


def _place_before_step(config: MethodConfig) -> int:
    if config.moves_weights is not None:
        return {"for_good": 1, "until_update": 3}[config.moves_weights]
    return 2 if config.gradient_passes + config.task_gradient_passes > 0 else 0
