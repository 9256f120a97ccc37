"""Gradients of a model in evaluation mode, with its layers still checkpointed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from torch import nn


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode, and back into the mode that it had.

    transformers checkpoints a layer only in training mode. So the layers alone are left in it where they are entered,
    and leave it for their own computation, since some call dropout with their own mode (OPT). A model that does not
    use transformers' checkpointed layers, such as one with code of its own, is not checkpointed here.
    """
    training = model.training
    model.eval()
    checkpoints = [(layer, layer._gradient_checkpointing_func) for layer in _checkpointed_layers(model)]
    for layer, checkpoint in checkpoints:
        layer.training = True
        layer._gradient_checkpointing_func = partial(_checkpoint_in_evaluation, checkpoint, layer)
    try:
        yield
    finally:
        for layer, checkpoint in checkpoints:
            layer._gradient_checkpointing_func = checkpoint
        model.train(training)


def _checkpointed_layers(model: nn.Module) -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    return [cast(Any, layer) for layer in layers if layer.gradient_checkpointing]


def _checkpoint_in_evaluation(
    checkpoint: Callable[..., Any], layer: nn.Module, forward: Callable[..., Any], *arguments: Any
) -> Any:
    return checkpoint(partial(_in_evaluation, layer, forward), *arguments)


def _in_evaluation(layer: nn.Module, forward: Callable[..., Any], *arguments: Any) -> Any:
    """Compute the layer in evaluation mode, in the forward pass and when the backward pass repeats it."""
    layer.training = False
    try:
        return forward(*arguments)
    finally:
        layer.training = True
