"""Information maximisation (IM), a regularizer for any rehearsal method ("Forget Less, Retain More", Alssum et al.
2025, arXiv 2512.01818), on the labels that an answer may begin with.

    reading: both       L = L_rehearsal + weight * (mean_i H(p_i) - H(mean_i p_i))
    reading: marginal   L = L_rehearsal + weight * (- H(mean_i p_i))

p_i are the probabilities of the labels at the first token of the replayed row i, with all other tokens left out, and
the means are over all rows of the step's draw, on all ranks. The first reading is the standard form of the term: each
prediction is sharp, and together they use all labels. The second is the marginal part alone, since the paper says that
it builds "exclusively on the expected label distribution". Over the whole vocabulary the marginal part would fight the
skew of natural language, so name the labels of the task, or the first words of refusals and of other answers.

The rows are those of `er`, `der` and `derpp` (their first draw). mean_i p_i must be known before the gradient is taken,
so a step costs a forward pass of the replayed rows more.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base


class Config(MethodConfig):
    """IM: information over labels on replayed rows."""

    needs_memory: ClassVar[bool] = True
    forward_passes: ClassVar[int] = 1

    weight: Annotated[float, Field(ge=0)] = 0.1
    """Factor of the term."""
    labels: Annotated[list[str], Field(min_length=2)] = ["I", "Sure"]
    """Texts that an answer begins with; the first token of each is a label."""
    reading: Literal["both", "marginal"] = "both"
    """both: sharp predictions that together use all labels; marginal: the second part alone."""


class Method(base.Method[Config]):
    def replay_terms(self) -> list[base.ReplayTerm]:
        return [base.ReplayTerm("replay")]

    def label_terms(self) -> list[base.LabelTerm]:
        config = self.config
        return [
            base.LabelTerm(self.name, "replay", config.weight, tuple(config.labels), sharpen=config.reading == "both")
        ]
