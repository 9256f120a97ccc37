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
        self.thresholds: list[tuple[float, int]] = []

    def observe(self, tensors: base.Tensors, number: int) -> None:
        for magnitudes, vector in zip(self.magnitudes, tensors.task_vectors(), strict=True):
            magnitudes.count(vector, number)

    def end_pass(self, number: int) -> None:
        from safecl.merging.arithmetic import num_kept

        for magnitudes in self.magnitudes:
            if number == 0:
                magnitudes.choose(num_kept(self.config.density, magnitudes.numel))
            else:
                self.thresholds.append(magnitudes.threshold())

    def combine(self, tensors: base.Tensors) -> torch.Tensor:
        from safecl.merging.arithmetic import elected_sum_

        vectors = tensors.task_vectors()
        for index, vector in enumerate(vectors):
            self._trim(index, vector)
        elected_sum_(
            tensors.needed_base,
            vectors,
            weights_of(self.config, tensors),
            scale=tensors.value(self.config.scale),
            normalize=self.config.normalize,
        )
        return tensors.needed_base

    def _trim(self, index: int, vector: torch.Tensor) -> None:
        from safecl.merging.arithmetic import keep_largest_, trim_

        if not self.thresholds:
            trim_(vector, self.config.density)
            return
        threshold, num_equal = self.thresholds[index]
        kept = keep_largest_(vector, threshold, num_equal)
        self.thresholds[index] = threshold, num_equal - kept
