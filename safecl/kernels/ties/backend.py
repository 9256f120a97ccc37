"""The interface of a back end of the ties family: the functions that torch and C++ implement.

Their tensors have passed the checks in ``calls.py``. The formulas are in its docstrings too.
"""

from __future__ import annotations

from typing import Protocol, cast

from torch import Tensor

from safecl.kernels import backends
from safecl.kernels.ties.arguments import BracketCounts, ElectionArguments


class TiesKernels(Protocol):
    """The functions of a back end."""

    def count_bracket(
        self, values: Tensor, minus: Tensor | None, low: float, high: float, between: Tensor
    ) -> BracketCounts:
        """Count magnitudes by a bracket; those strictly inside fill `between`, as far as there is room."""

    def elected_sum(self, call: ElectionArguments) -> list[int]:
        """Do what `elected_sum_` does; return how many magnitudes equal to its threshold each vector has kept."""


def ties_backend(kernel: str, tensor: Tensor) -> TiesKernels:
    """Return the back end that runs `kernel` for tensors on the device of `tensor`."""
    return cast(TiesKernels, backends.implementation("ties", kernel, tensor.device.type))
