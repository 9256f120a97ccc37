"""Selection by gradient norm (Bach et al. 2026, "Continual Safety Alignment via Gradient-Based Sample Selection", arXiv
2604.17215): rows whose gradient is largest are left out. Needs no memory.

    row i is trained  if  q_low <= ||G_i||_F <= q_high,      G_i = 1/n_i sum_t (p_t - e_{y_t}) h_t^T

G_i is the gradient of the row's mean loss with regard to the output head under the aligned model theta_0: p_t are its
probabilities at the row's n_i supervised tokens y_t, h_t the hidden states before the head. The quantiles are those of
all rows of the task (`keep`). Rows with large gradients pull the model towards what it was before its alignment; the
paper trains on the moderate ones. It scores by the whole gradient; the head's is here the cheap part of it that one
forward pass gives, before training and once for each model and rows.

||G_i||^2 = 1/n^2 sum_st ((p_s - e_s) . (p_t - e_t)) (h_s . h_t), so no matrix of the head's size is formed. Scores take
4 bytes per token. `train.loss_mean` says how the rows that stay are averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from safecl.config import MethodConfig
from safecl.methods import base

if TYPE_CHECKING:
    import numpy as np

SQUARES = "gradient"

Share = Annotated[float, Field(ge=0, le=1)]


class Config(MethodConfig):
    """Selection of rows by the norm of their gradient under the aligned model."""

    keep: tuple[Share, Share] = (0.0, 0.75)
    """Quantiles of the gradient's norm over the task's rows, between which rows are trained: from the smallest (0) to
    the largest (1)."""

    @model_validator(mode="after")
    def _some_rows_are_kept(self) -> Config:
        if self.keep[0] >= self.keep[1]:
            raise ValueError("keep: the first quantile must be below the second, e.g. [0.0, 0.75]")
        return self


class Method(base.Method[Config]):
    def scores(self) -> list[base.Score]:
        return [base.Score(SQUARES, of="gradient")]

    def see_scores(self, scores: Mapping[str, Sequence[np.ndarray]]) -> None:
        import numpy as np

        norms = np.array([_norm(row) for row in scores[SQUARES]])
        self._limits = [float(np.quantile(norms, share)) for share in self.config.keep]

    def row_factors(self, scores: Mapping[str, Sequence[np.ndarray]]) -> np.ndarray:
        import numpy as np

        norms = np.array([_norm(row) for row in scores[SQUARES]])
        low, high = self._limits
        kept: np.ndarray = ((norms >= low) & (norms <= high)).astype(np.float64)
        return kept


def _norm(shares: np.ndarray) -> float:
    """Return ||G|| of a row, whose tokens' shares of ||n G||^2 these are."""
    return float(max(0.0, shares.sum(dtype="float64")) ** 0.5) / max(1, len(shares))
