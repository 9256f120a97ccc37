"""SafeInstruct (Bianchi et al. 2024, "Safety-Tuned LLaMAs", arXiv 2309.07875): a few safety rows mixed into the task's.

    L = mean of CE over the rows of the task and of the memory together,     share * task tokens from the memory

There is one mean over both, as if the rows stood in the task's file, so `share` is also their weight. `er` takes a mean
of the memory's rows alone, times a weight. The rows are drawn anew in every step. 3 % is the share with which
"Unforgotten Safety" (arXiv 2512.10150) compares.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base


class Config(MethodConfig):
    """SafeInstruct: safety rows mixed into the task's rows."""

    needs_memory: ClassVar[bool] = True

    share: Annotated[float, Field(gt=0, le=4)] = 0.03
    """Tokens of the memory per task token in a step, in the place of memory.replay_ratio."""


class Method(base.Method[Config]):
    def replay_terms(self) -> list[base.ReplayTerm]:
        return [base.ReplayTerm(self.name, ce_weight=1.0, share=self.config.share, mixed=True)]
