"""Features: hidden states of several layers side by side, one vector per token.

Layers are counted from 1. The last layer's hidden states are those behind the final norm, as transformers counts them;
all others are taken directly behind their layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safecl.config import ConfigError

Layers = tuple[int, ...]
"""Numbers of layers, ascending; empty for the last layer alone."""


def layer_numbers(wanted: int | Sequence[int], num_layers: int, key: str = "layers") -> Layers:
    """Return the layers of a feature vector.

    wanted: how many layers, at equal distances and with the last; or their numbers, negative ones from the end (-1 is
    the last). key: the setting that names them, for messages. Raises ConfigError for a layer that the model has not.
    """
    if isinstance(wanted, int):
        count = min(wanted, num_layers)
        found = [-(-num_layers * (i + 1) // count) for i in range(count)]
    else:
        found = sorted({number + num_layers + 1 if number < 0 else number for number in wanted})
        if outside := [number for number in wanted if not 1 <= abs(number) <= num_layers]:
            raise ConfigError(f"{key}: {outside[0]} is no layer; the model has layers 1 to {num_layers}")
    return () if found in ([], [num_layers]) else tuple(found)


def features_at(layers: Layers, last: Tensor, each: Sequence[Tensor], positions: Tensor) -> Tensor:
    """Return features [n, len(layers) * H] at flat positions [n].

    last: hidden states of the last layer [tokens, H]. each: those before and behind every layer, [tokens, H] each; only
    read where `layers` is not empty.
    """
    if not layers:
        return last[positions]
    return torch.cat([each[number][positions] for number in layers], dim=-1)
