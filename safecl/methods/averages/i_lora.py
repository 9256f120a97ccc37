"""I-LoRA, dual-memory interpolation (Ren et al. 2024, "Analyzing and Reducing Catastrophic Forgetting in Parameter
Efficient Tuning", arXiv 2402.18865): fast adapters learn, slow ones follow them, and replay keeps both close together.

    L      = CE + beta * CE(replayed) + weight * mean over replayed tokens and layers of mean_j (h_j - max(h_j, s_j))^2
    slow_t = a_t slow_{t-1} + (1 - a_t) fast_t,      a_t = min(decay, 1 - 1 / (t + 1)),  t = 0, 1, ...

h are the hidden states of the fast adapters, s those of the slow ones at the same tokens, without a gradient. The
target is the larger of both, element by element, as in the authors' code, so only elements below the slow ones' are
moved. The slow adapters are evaluated and saved, and the next task begins with them.

The authors halve both cross-entropies and give the distance the weight 1; the default 2 is the same up to the scale of
the whole loss. A decay of 0.25, their default, lets the slow adapters follow closely. Without LoRA it is the same with
all weights (a form of CLS-ER, arXiv 2201.12604). A step costs a forward pass of the replayed rows more."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base
from safecl.methods.terms import EVERY_LAYER

AVERAGE = "ema"


class Config(MethodConfig):
    """I-LoRA: slow weights that follow the fast ones, and a distance to them on replayed rows."""

    needs_memory: ClassVar[bool] = True
    keeps_average: ClassVar[bool] = True
    state_kinds: ClassVar[tuple[str, ...]] = (AVERAGE,)
    compared_layers: ClassVar[int] = EVERY_LAYER

    decay: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of the slow weights that is kept in a step."""
    weight: Annotated[float, Field(ge=0)] = 2.0
    """Factor of the distance to the slow weights' hidden states."""
    beta: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the cross-entropy on replayed rows."""

    @property
    def online_teacher(self) -> str | None:
        return AVERAGE if self.weight > 0 else None

    def decay_at(self, step: int) -> float:
        """a_t of a step, counted from 0."""
        return min(self.decay, 1.0 - 1.0 / (step + 1))

    def decay_for(self, num_steps: int) -> float:
        return self.decay_at(max(0, num_steps - 1))


class Method(base.Method[Config]):
    def ema_decay(self, run: base.Run) -> float | None:
        return self.config.decay_at(run.step)

    def replay_terms(self) -> list[base.ReplayTerm]:
        distance = base.TaskTerm(
            self.name,
            self.config.weight,
            divergence="hidden",
            layers=EVERY_LAYER,
            tokens="all",
            teacher=AVERAGE,
            online=True,
            larger=True,
        )
        return [base.ReplayTerm("replay", ce_weight=self.config.beta, distances=(distance,))]
