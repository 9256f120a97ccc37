"""Merges the weights of a finished task with the aligned model's, such as by WiSE-FT.

    theta <- merge(theta_aligned, theta_task),   e.g.  (1 - alpha) theta_aligned + alpha theta_task

The arithmetic is that of `safecl.merging`, of which `kind` names one that needs the two models element by element.
With `pick: gate` the run measures many settings and keeps the one with the highest utility of those that pass
`safety.gate`. The aligned weights come from the reference store and the task's from the shards, so no device holds a
second model. Source: Farn et al., arXiv 2412.19512, for merging an aligned model with its own fine-tune.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from safecl.config import MethodConfig
from safecl.config.base import MergeAtTheEnd, Text
from safecl.methods import base

ALIGNED = "aligned_anchor"


class Config(MethodConfig):
    """Merge with the aligned model at a task's end."""

    state_kinds: ClassVar[tuple[str, ...]] = (ALIGNED,)
    refuses_lora: ClassVar[str] = (
        "the trained weights are factors, whose average is not that of their product; "
        "use `safecl merge lora_scale --sweep factor=0:1:0.1` on the saved adapter"
    )

    kind: Text = "wise_ft"
    """The merge: wise_ft, task_arithmetic or lines."""
    settings: dict[str, Any] = {}
    """Settings of the merge, such as {alpha: 0.7}; `safecl merge KIND --settings` lists them."""
    pick: Literal["gate"] | None = None
    """gate: measure the settings of `sweep`, and take the one with the highest utility of those that pass safety.gate;
    where none passes the weights stay as they are. By default `settings` are applied as they are."""
    sweep: Text | list[Text] | None = None
    """Settings that `pick` measures, such as alpha=0:1:0.1; that of the kind by default."""

    @model_validator(mode="after")
    def _a_sweep_needs_a_pick(self) -> Config:
        if self.sweep is not None and self.pick is None:
            raise ValueError("sweep needs pick: gate, which chooses among its points")
        return self

    @property
    def merge_at_the_end(self) -> MergeAtTheEnd:
        sweeps = [self.sweep] if isinstance(self.sweep, str) else self.sweep or []
        return MergeAtTheEnd(self.kind, self.settings, tuple(sweeps), self.pick)


class Method(base.Method[Config]):
    def start_task(self, run: base.Run) -> None:
        if not run.has_state(ALIGNED):
            run.set_anchor(ALIGNED)  # theta_0 is the aligned model, in all tasks
