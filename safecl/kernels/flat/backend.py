"""The interface of a back end of the flat family: the functions that torch, C++ and Triton implement.

Their tensors have passed the checks in ``calls.py``. The formulas are in its docstring too.
"""

from __future__ import annotations

from typing import Protocol, cast

from torch import Tensor

from safecl.kernels import backends
from safecl.kernels.flat.arguments import AdamWArguments, Scalar, Segments


class FlatKernels(Protocol):
    """The functions of a back end."""

    def ema_update(self, ema: Tensor, param: Tensor, rate: Scalar, seed: Tensor | None) -> None:
        """Add rate * (param - ema) to ema; a bf16 ema is rounded stochastically with random bits from `seed`."""

    def fisher_accumulate(self, fisher: Tensor, grad: Tensor, weight: Scalar) -> None:
        """Add weight * grad * grad to fisher."""

    def fisher_penalty(
        self, grad: Tensor, param: Tensor, anchor: Tensor, fisher: Tensor | None, strength: Scalar
    ) -> Tensor:
        """Add strength * fisher * (param - anchor) to grad; return the penalty loss, 0-dim fp32."""

    def penalized_grad_norm(
        self,
        grad: Tensor,
        param: Tensor | None,
        anchor: Tensor | None,
        fisher: Tensor | None,
        strength: Scalar,
        grad_mult: Scalar,
        segments: Segments | None,
    ) -> tuple[Tensor, Tensor]:
        """Return (sum (grad_mult * grad + strength F (param - anchor))^2, penalty loss), both 0-dim fp64."""

    def adamw_step(self, call: AdamWArguments) -> Tensor | None:
        """Do the step of `adamw_step_`; return the penalty loss, 0-dim fp32, or None without an anchor."""


def flat_backend(kernel: str, tensor: Tensor) -> FlatKernels:
    """Return the back end that runs `kernel` for tensors on the device of `tensor`."""
    return cast(FlatKernels, backends.implementation("flat", kernel, tensor.device.type))
