"""The interface of a back end of the head: the row work on one tile of logits, which torch and Triton implement."""

from __future__ import annotations

from typing import NamedTuple, Protocol, cast

from torch import Tensor

from safecl.kernels import backends


class RowOptions(NamedTuple):
    """The settings of the row work; ``kd_scale`` is the factor that temperature_scale stands for (1 or T^2)."""

    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    kd_scale: float = 1.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float | None = None
    teacher_softcap: float | None = None
    teacher_logit_scale: float | None = None
    topk_mode: str = "tail"
    padded: bool = False
    """Student and dense teacher lie in tiles of `new_tile`, whose columns up to the next multiple of 16 hold -inf, and
    dlogits in another such tile."""


class RowLosses(NamedTuple):
    ce: Tensor  # [rows], unweighted
    kd: Tensor  # [rows], unweighted, times kd_scale
    logsumexp: Tensor  # [rows], 0 where there is no label


class HeadKernels(Protocol):
    """The functions of a back end."""

    def dense_rows(
        self,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        ce_weights: Tensor | None,
        kd_weights: Tensor | None,
        options: RowOptions,
        dlogits: Tensor | None = None,
    ) -> RowLosses:
        """Return the losses per row of one tile of raw logits, and write their weighted gradient to ``dlogits``.

        student: [rows, vocab]; may be overwritten. teacher: [rows, teacher_vocab] or None. labels: [rows] int64,
        negative for none, or None. ce_weights (unused without labels), kd_weights (unused without a teacher): [rows].
        dlogits: [rows, vocab] of any floating dtype (it may be ``student`` itself), or None for losses only.
        """

    def topk_rows(
        self,
        student: Tensor,
        log_q: Tensor,
        indices: Tensor,
        log_tail: Tensor,
        labels: Tensor | None,
        ce_weights: Tensor | None,
        kd_weights: Tensor,
        options: RowOptions,
        dlogits: Tensor | None = None,
    ) -> RowLosses:
        """Do the same against a top-k teacher; log_q, indices: [rows, k], log_tail: [rows]."""


def head_backend(kernel: str, tensor: Tensor) -> HeadKernels:
    """Return the back end that runs ``kernel`` for tensors on the device of ``tensor``."""
    return cast(HeadKernels, backends.implementation("head", kernel, tensor.device.type))
