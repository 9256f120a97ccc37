"""Weights that methods leave as they are. They have no gradient, and the optimizer does not know them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from safecl.config import ConfigError, RunConfig


def frozen_weights(config: RunConfig, names: Iterable[str]) -> set[str]:
    """Return the names of the weights that the config's methods freeze. names: those of all weights that are trained
    without these methods. Raises ConfigError where nothing is left to train."""
    known = list(names)
    chosen = [settings.frozen(known, config.train.seed) for settings in config.methods.values()]
    frozen = set[str]().union(*chosen)
    if known and len(frozen) == len(known):
        freezing = ", ".join(name for name, own in zip(config.methods, chosen, strict=True) if own)
        raise ConfigError(f"methods: {freezing} would freeze all weights, and nothing would be trained")
    return frozen


def freeze(model: nn.Module, config: RunConfig) -> None:
    """Freeze the weights that the config's methods leave as they are."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name in frozen_weights(config, trained):
        trained[name].requires_grad_(False)
