"""TOSS (Li et al. 2026, "Token-level Data Selection for Safe LLM Fine-tuning", arXiv 2603.01185, ICLR 2026): tokens
that a safety-degraded model finds much likelier than a utility-oriented one are not trained. Needs no memory.

    token t is left out  if  log p_degraded(y_t) - log p_utility(y_t)  is among the largest `discard` of the task's

p_degraded is the aligned model after it was tuned on harmful rows, p_utility one that was tuned on rows that are known
to be harmless: both are models of your own, with the tokenizer of the run's model, for example made by `safecl train`
with a few hundred rows. The difference tells tokens that comply with harm from tokens that the task needs, wherever in
an answer they stand. The mean over the step is that of the tokens that stay.

Both log-probabilities are computed once before training, 4 bytes per token each; for that time each model is held whole
on every device. The paper refines the degraded model in rounds (TOSS-Pro): train it on the tokens that were left out,
and run again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from safecl.config import MethodConfig
from safecl.config.base import Text
from safecl.methods import base

if TYPE_CHECKING:
    import numpy as np

DEGRADED, UTILITY = "degraded", "utility"


class Config(MethodConfig):
    """TOSS: tokens that a safety-degraded model prefers are not trained."""

    degraded: Text | None = None
    """Folder or hub id of the safety-degraded model, which the method needs."""
    utility: Text | None = None
    """Folder or hub id of the utility-oriented model, which the method needs."""
    discard: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the task's supervised tokens that is left out."""

    @property
    def scoring_models(self) -> dict[str, str | None]:
        return {DEGRADED: self.degraded, UTILITY: self.utility}


class Method(base.Method[Config]):
    def scores(self) -> list[base.Score]:
        return [base.Score(name, model=model) for name, model in self.config.scoring_models.items()]

    def see_scores(self, scores: Mapping[str, Sequence[np.ndarray]]) -> None:
        import numpy as np

        risks = np.concatenate(_risks(scores))
        self._limit = float(np.quantile(risks, 1 - self.config.discard)) if len(risks) else 0.0

    def token_factors(self, scores: Mapping[str, Sequence[np.ndarray]]) -> list[np.ndarray]:
        return [(risks <= self._limit).astype("float32") for risks in _risks(scores)]


def _risks(scores: Mapping[str, Sequence[np.ndarray]]) -> list[np.ndarray]:
    return [bad - good for bad, good in zip(scores[DEGRADED], scores[UTILITY], strict=True)]
