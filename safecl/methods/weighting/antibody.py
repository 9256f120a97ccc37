"""Antibody's weights of rows (Nguyen et al. 2026, arXiv 2603.00498): a row counts less where the aligned model would
rather refuse it. Needs no memory.

    L = sum_i w_i CE_i,     w = softmax over the step's rows of (log p0(answer_i | x_i) - log p0(refusal | x_i)) / T

p0 is the aligned model theta_0. Each log-probability is a mean over the answer's tokens (`length: mean`), so that long
answers are not weighed down, or their sum; where the task's answers are labels of a token or two, compare both. The
softmax is over all task rows of the global step, on all ranks. CE_i follows `train.loss_mean`: with `rows`
it is the row's mean loss, with `tokens` every token of row i counts w_i.

Both log-probabilities are computed once before training, 4 bytes per token, so the weights are constants: they do not
follow the model as it changes. The paper's first stage, an alignment that flattens the loss of harmful rows, is not
part of this method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base

if TYPE_CHECKING:
    import numpy as np

ANSWER, REFUSAL = "answer", "refusal"


class Config(MethodConfig):
    """Antibody: weights of rows by the aligned model's own preference for refusing them."""

    refusal: Annotated[str, Field(min_length=1)] = "I'm sorry, but I can't help with that."
    """The refusal that answers are compared with; take the words that the model uses."""
    length: Literal["mean", "sum"] = "mean"
    """mean: log-probability per token; sum: of the whole answer, under which long answers weigh little."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """T: a higher one makes the weights more alike."""


class Method(base.Method[Config]):
    def scores(self) -> list[base.Score]:
        return [base.Score(ANSWER), base.Score(REFUSAL, self.config.refusal)]

    def row_factors(self, scores: Mapping[str, Sequence[np.ndarray]]) -> np.ndarray:
        import numpy as np

        answer, refusal = (np.array([self._whole(row) for row in scores[name]]) for name in (ANSWER, REFUSAL))
        ratio = (answer - refusal) / self.config.temperature
        odds = np.exp(ratio - ratio.max())
        weights: np.ndarray = odds / odds.sum()
        return weights

    def _whole(self, log_probs: np.ndarray) -> float:
        """Return the score of one answer; 0 for a row without targets, which has no loss."""
        total = float(log_probs.sum(dtype="float64"))
        return total / max(1, len(log_probs)) if self.config.length == "mean" else total
