"""A model's tensors as the merge sees them: under the names of the first tuned model, and with as many rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from safecl.merging.models.checkpoint import CheckpointWeights
from safecl.merging.models.folder import FolderWeights
from safecl.merging.models.lora import AdapterWeights

Source = FolderWeights | AdapterWeights | CheckpointWeights


@dataclass(frozen=True)
class View:
    """The tensors of a model by the names of the merge. Implements safecl.merging.base.Weights.

    names: {name in the merge: name in the model's files}. shapes: those of the merge. Where a model has fewer rows than
    that, `donor` has the others; where it has more, they are cut off.
    """

    source: Source
    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    donor: View | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        return self.source.label

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        stored, shape = self.names[name], self.shapes[name]
        own = self.source.shapes[stored]
        if own == shape:
            return self.source.read(stored, start, stop)
        stop = shape[0] if stop is None else min(stop, shape[0])
        mine = self.source.read(stored, min(start, own[0]), min(stop, own[0]))
        if stop <= own[0]:
            return mine
        assert self.donor is not None, "the first tuned model has all rows"
        return torch.cat([mine, self.donor.read(name, max(start, own[0]), stop)])

    def raw(self, name: str) -> bytes:
        """Return the bytes of a small tensor of any dtype."""
        return self.source.raw(self.names[name])

    def read_ahead(self, name: str) -> None:
        """Ask the system to read a tensor into its own cache."""
        self.source.read_ahead(self.names[name])
