"""Bayesian data scheduler (BDS, Hu et al. 2025, arXiv 2510.27172, NeurIPS 2025): weights of the user's rows that are
learned beside the model, from how hard each row is to fit while the memory is kept.

    L   = weight * CE(rows drawn from the memory) + sum_i f_i CE_i / sum_i f_i      f_i = exp(w_i);  i: the task's rows
    w_i <- w_i - rate * (CE_i - sum_j f_j CE_j / sum_j f_j)                         after each step that trains row i

A row that conflicts with the memory keeps a high loss and loses weight; that leaves it a high loss. It is a bilevel
problem by a first-order approximation: the upper level's gradient of a row's weight is the row's own loss at the
current model. f is the softmax of w over the task up to a factor that the mean divides out, and the step of w is the
gradient of sum_i softmax(w)_i CE_i divided by softmax(w)_i. The paper samples w by Langevin dynamics; its code takes
the step without noise, with Adam, so its learning rate is no `rate`. `most` bounds |w|, so that no row is lost for
ever.

CE_i is the mean loss of row i in the step's own pass, so a step costs nothing more than replay; the weights are one
number a row. A step uses the losses of the steps up to the last but one, since its rows are read one step ahead: they
are the same on any number of ranks, and after a resume. With `train.loss_mean: rows`, as in the paper, CE_i is what is
averaged; with `tokens` every token of row i counts f_i."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base

if TYPE_CHECKING:
    import numpy as np

KNOWN_AFTER = 2
"""Steps after which a step's losses may change weights."""


class Config(MethodConfig):
    """BDS: weights of rows that follow their losses, with replay."""

    needs_memory: ClassVar[bool] = True
    follows_row_losses: ClassVar[bool] = True

    weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the memory's rows."""
    rate: Annotated[float, Field(gt=0)] = 0.1
    """Step of the weights per nat of loss."""
    most: Annotated[float, Field(gt=0)] = 6.0
    """Largest |w|: a row counts between exp(-most) and exp(most)."""


class Method(base.Method[Config]):
    def __init__(self, name: str, config: Config):
        super().__init__(name, config)
        self._forget()

    def start_task(self, run: base.Run) -> None:
        self._forget()

    def _forget(self) -> None:
        self._weights: dict[str, float] = {}
        self._steps: list[int] = []
        self._rows: list[list[int]] = []
        self._losses: list[list[float]] = []

    def replay_terms(self) -> list[base.ReplayTerm]:
        return [base.ReplayTerm("replay", ce_weight=self.config.weight)] if self.config.weight > 0 else []

    def learned_factors(self, step: int, rows: Sequence[int]) -> np.ndarray:
        import numpy as np

        while self._steps and self._steps[0] <= step - KNOWN_AFTER:
            self._steps.pop(0)
            self._learn(self._rows.pop(0), self._losses.pop(0))
        factors: np.ndarray = np.exp([self._weights.get(str(row), 0.0) for row in rows])
        return factors

    def see_row_losses(self, step: int, losses: Mapping[int, float]) -> None:
        if not losses:  # a step that trains the memory in the place of the task's rows
            return
        rows = sorted(losses)
        self._rows.append(rows)
        self._losses.append([losses[row] for row in rows])
        self._steps.append(step)  # last: another thread looks at it first

    def _learn(self, rows: Sequence[int], losses: Sequence[float]) -> None:
        """Take the step of w for the losses of one step's rows."""
        config = self.config
        weights = [self._weights.get(str(row), 0.0) for row in rows]
        factors = [math.exp(weight) for weight in weights]
        mean = math.fsum(f * loss for f, loss in zip(factors, losses, strict=True)) / math.fsum(factors)
        for row, weight, loss in zip(rows, weights, losses, strict=True):
            self._weights[str(row)] = min(config.most, max(-config.most, weight - config.rate * (loss - mean)))
