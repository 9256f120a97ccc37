"""Files of Fisher information that belong to a model: one value per weight, by the weights' names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from safecl.config import ConfigError
from safecl.merging.base import Weights
from safecl.merging.models.tensor_files import TensorFiles, open_file


def open_fisher(path: str, model: Weights, names: Iterable[str]) -> TensorFiles:
    """Open a file of Fisher information. Raises ConfigError where it has no values for one of the model's tensors."""
    fisher = open_file(Path(path).expanduser(), f"fisher ({path})")
    for name in names:
        shape = model.shapes[name]
        if fisher.shapes.get(name) != shape:
            found = "no values" if name not in fisher.shapes else f"values of shape {list(fisher.shapes[name])}"
            raise ConfigError(f"{path}: {found} for {name}, which has shape {list(shape)}")
    return fisher


def read_fisher(fisher: TensorFiles, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Read rows [start, stop) of a tensor, fp32. Raises ConfigError where a value is negative."""
    values = fisher.read(name, start, stop)
    if values.numel() and float(values.min()) < 0:
        raise ConfigError(f"{fisher.label}: negative values for {name}, which is no Fisher information")
    return values
