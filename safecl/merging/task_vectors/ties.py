"""TIES: trims task vectors, elects a sign for each weight, and averages the entries that agree.

    tau_i   = the largest `density` of tau_i by magnitude, the others 0                            trim
    s       = sign(sum_i w_i tau_i)                                                                elect
    theta   = theta_base + lambda sum_{i: sign(w_i tau_i) = s} w_i tau_i / sum_{the same i} w_i    merge

Source: Yadav et al., TIES-Merging, arXiv 2306.01708. Trimming is per tensor, as in mergekit, or over the whole model,
as in the paper's code (`scope`). As in mergekit, a sum of 0 counts as +, density * numel is cut to an integer, and
`normalize` switches the division off. Ours: at least one entry of a tensor stays, and of equal magnitudes at the
threshold the first ones in order stay, so that no more than asked for do: bf16 models have many equal ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from safecl.merging import base
from safecl.merging.task_vectors._settings import TrimConfig, check, weights_of

if TYPE_CHECKING:
    import torch

    from safecl.kernels import Trim


class Config(TrimConfig):
    """Trimmed task vectors whose signs agree."""

    scope: Literal["tensor", "model"] = "tensor"
    """Keep that share of each tensor, or of the whole task vector; `model` reads the models three times."""
    normalize: bool = True
    """Divide by the sum of the weights of the entries that agree."""


class Merge(base.Merge[Config]):
    reads_ahead = True

    @property
    def num_passes(self) -> int:
        return 2 if self.config.scope == "model" and self.config.density < 1 else 0

    def prepare(self) -> None:
        from safecl.merging.arithmetic import Magnitudes

        check("ties", self.config, self.models)
        self.magnitudes = [Magnitudes() for _ in self.models.tuned]
        self.trims: list[Trim] = []

    def observe(self, tensors: base.Tensors, number: int) -> None:
        for magnitudes, vector in zip(self.magnitudes, tensors.task_vectors(), strict=True):
            magnitudes.count(vector, number)

    def end_pass(self, number: int) -> None:
        from safecl.merging.arithmetic import num_kept

        for magnitudes in self.magnitudes:
            if number == 0:
                magnitudes.choose(num_kept(self.config.density, magnitudes.numel))
            else:
                self.trims.append(magnitudes.threshold())

    def combine(self, tensors: base.Tensors) -> torch.Tensor:
        from safecl.kernels import Trim, elected_sum_

        kept = elected_sum_(
            tensors.needed_base,
            tensors.tuned,
            weights_of(self.config, tensors),
            trims=self.trims or self._trims_of(tensors),
            scale=tensors.value(self.config.scale),
            normalize=self.config.normalize,
            subtract=True,
        )
        if self.trims:
            self.trims = [Trim(t.threshold, t.num_equal - num) for t, num in zip(self.trims, kept, strict=True)]
        return tensors.needed_base

    def _trims_of(self, tensors: base.Tensors) -> list[Trim] | None:
        """Return what the task vectors of one tensor lose; None for nothing."""
        from safecl.merging.arithmetic import kth_largest, num_kept

        numel = tensors.needed_base.numel()
        if self.config.density == 1 or numel == 0:
            return None
        k = num_kept(self.config.density, numel)
        return [kth_largest(tuned, k, minus=tensors.needed_base) for tuned in tensors.tuned]
