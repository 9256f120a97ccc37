"""SWAT (Du et al. 2024, "Toward Secure Tuning", arXiv 2410.04524): robust modules are trained first, then all weights.

    theta_i stays    outside of the robust modules, in the first `warmup` of the steps;  then all weights are trained

The robust modules learn what is easy to learn, so that the others, in which refusals are more fragile, move less
afterwards. The paper finds them for each model with a classifier of its hidden states, among the maps q, k, v, o of the
attention and the three of the feed-forward part. Its sets were not at hand: name those of your model; the default is
the queries' and keys' maps, which decide where a token looks and not what it says.

AdamW's moments of all weights follow the gradient from the first step on; in the warm-up the other weights' steps are
undone. That keeps the weights from before a step, 4 bytes per trained weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar

from pydantic import Field

from safecl.config import MethodConfig
from safecl.config.base import Change
from safecl.methods import base, scope


class Config(MethodConfig):
    """SWAT: a warm-up of the robust modules alone."""

    changes: ClassVar[Change] = Change("step", "factors")
    state_kinds: ClassVar[tuple[str, ...]] = (base.BEFORE,)

    modules: Annotated[list[str], Field(min_length=1)] = ["*.q_proj.*", "*.k_proj.*"]
    """The robust modules: patterns of parameter names with shell wildcards."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of the task's steps in which they alone are trained."""

    def check_weight_names(self, method: str, names: list[str]) -> None:
        scope.Segment(modules=self.modules).check(f"methods.{method}.modules", names)


class Method(base.Method[Config]):
    def transform_step(self, run: base.Run, shards: Sequence[base.Shard]) -> None:
        if run.step < self.config.warmup * run.num_steps:
            scope.scale_step(run, shards, self._factor)

    def _factor(self, name: str) -> float:
        return float(any(fnmatchcase(name, pattern) for pattern in self.config.modules))
