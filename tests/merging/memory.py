"""Models in memory, merged without folders: few numbers, which a reader can check by hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from safecl.merging.base import Models
from safecl.merging.places import places_of
from safecl.merging.registry import kind_module, read_settings
from safecl.merging.stream import merged_tensor, run_passes


@dataclass
class InMemory:
    """Implements safecl.merging.base.Weights."""

    label: str
    values: dict[str, torch.Tensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self.values.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self.values[name][start:stop].clone()


def tensors(values) -> dict[str, torch.Tensor]:
    """{name: tensor} of lists; one list alone is the tensor `x`."""
    values = values if isinstance(values, dict) else {"x": values}
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}


def merged(kind: str, *tuned, base=None, aligned=None, **settings) -> dict[str, list[float]]:
    """The result of a merge of lists of numbers, rounded to six places."""

    def model(label, values):
        return None if values is None else InMemory(label, tensors(values))

    models = Models(
        [model(f"tuned {i + 1}", values) for i, values in enumerate(tuned)],
        model("base", base),
        model("aligned", aligned),
        places_of(tensors(tuned[0])),
        folders={f"tuned {i + 1}": f"step-{100 * (i + 1)}" for i in range(len(tuned))},
    )
    merge = kind_module(kind).Merge(read_settings(kind, settings), models)
    run_passes(merge, models)
    return {name: rounded(merged_tensor(merge, models, name)) for name in models.places}


def rounded(values: torch.Tensor) -> list[float]:
    return [round(float(value), 6) for value in values.flatten()]
