"""STAR-DSS (Peng et al. 2025, "Shape it Up! Restoring LLM Safety during Finetuning", arXiv 2505.17196, NeurIPS 2025):
a guard's scores shape the loss token by token, from imitation to staying with the aligned model. Needs no memory.

    L = mean over tokens of  s_t CE_t + (1 - s_t) weight KL(p(. | t) || p0(. | t))

s_t in [0, 1] is the safety that a guard model sees in the answer up to the segment of token t (Safety Trajectory
Assessment of Response): 1 trains the token, 0 keeps the aligned model's distribution there. The guard is run elsewhere,
on growing beginnings of each answer, and gives a list of scores per row, for equal segments; a single number shapes the
whole row alike. p0 is the aligned model theta_0, with its k likeliest tokens and the mass of all others.

The loss follows the paper's description, an interpolation of cross-entropy and KL to a reference model by the score.
Its equations and code were not at hand: the direction of the KL is a setting, and both parts have the normaliser of
`train.loss_mean`, over all supervised tokens whatever their score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from safecl.config import MethodConfig
from safecl.config.base import Text
from safecl.methods import base

if TYPE_CHECKING:
    import numpy as np

GUARD = "guard"


class Config(MethodConfig):
    """STAR-DSS: a guard's scores shape the loss token by token."""

    scores: Text | None = None
    """JSONL file of the guard's scores, for a run of one task: line n is about line n of the task's file. By default
    each row has its score in a column of its own."""
    column: Text = "guard"
    """The row's column, or the key in the file: a number from 0 to 1, or, in the file, a list of them for equal
    segments of the answer."""
    means: Literal["safe", "harmful"] = "safe"
    """What 1 means; of a score of harmfulness, 1 - score is taken."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the KL divergence."""
    distance: Literal["reverse_kl", "forward_kl"] = "reverse_kl"
    """reverse_kl: KL(p || p0); forward_kl: KL(p0 || p)."""
    k: Annotated[int, Field(ge=1)] = 64
    """Entries of p0 per token, 6 bytes each where they are recorded."""
    outputs: Literal["recorded", "online"] = "recorded"
    """recorded: the aligned model runs over all rows before training; online: it runs in every step. With LoRA it is
    the student with its adapters off, either way."""

    @property
    def online_teacher(self) -> str | None:
        return "aligned" if self.outputs == "online" and self.weight > 0 else None

    @property
    def scores_file(self) -> str | None:
        return self.scores


class Method(base.Method[Config]):
    factors_count: ClassVar[bool] = False

    def scores(self) -> list[base.Score]:
        return [base.Score(GUARD, of="given", column=self.config.column, file=self.config.scores)]

    def task_terms(self) -> list[base.TaskTerm]:
        config = self.config
        return [
            base.TaskTerm(
                self.name,
                config.weight,
                divergence=config.distance,
                k=config.k,
                online=config.outputs == "online",
                shaped=True,
            )
        ]

    def token_factors(self, scores: Mapping[str, Sequence[np.ndarray]]) -> list[np.ndarray]:
        return [own if self.config.means == "safe" else 1 - own for own in scores[GUARD]]

    def distance_factors(self, scores: Mapping[str, Sequence[np.ndarray]]) -> list[np.ndarray]:
        return [1 - own for own in self.token_factors(scores)]
