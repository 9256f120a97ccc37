"""Learning rates by segment: some weights move less than others, or not at all.

    theta_l <- theta_l + f_l Delta_l        f_l: product of the factors of all rules whose segment holds tensor l

Delta is the step that AdamW has taken, decay included, so f_l is a factor of the learning rate of tensor l. A rule
takes its tensors by module, by layers, by a seeded half, or by importance: those whose gradient on the memory is
largest (or smallest) per weight, under the model that the task begins with.

A factor of 0 for a rule without `importance` freezes its weights from the start: they have no gradient, no master copy
and no moments. All other rules keep the weights from before a step, 4 bytes per trained weight.

The form is that of studies that find safety in some layers or modules: "Safety Layers" (arXiv 2408.17003, here
`safety_layers`), SWAT (arXiv 2410.04524, `swat`), and tuning with layer-wise learning rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from safecl.config import MethodConfig
from safecl.config.base import Change
from safecl.methods import base, scope


class Config(MethodConfig):
    """Factors of the learning rate, or freezing, by segment of the weights."""

    rules: Annotated[list[scope.Rule], Field(min_length=1)] = [scope.Rule(modules="attention", factor=0.1)]
    """Selections of weights; the factors of all that hold a tensor are multiplied."""

    @property
    def needs_memory(self) -> bool:
        return any(rule.importance for rule in self.rules)

    @property
    def scaled(self) -> list[scope.Rule]:
        """The rules that act in each step; the others freeze."""
        return [rule for rule in self.rules if rule.importance or rule.factor > 0]

    @property
    def changes(self) -> Change | None:
        return Change("step", "factors") if self.scaled else None

    @property
    def state_kinds(self) -> tuple[str, ...]:
        return (base.BEFORE,) if self.scaled else ()

    def frozen(self, names: Sequence[str], seed: int) -> set[str]:
        return {name for rule in self.rules if rule not in self.scaled for name in rule.chosen(names, seed)}

    @property
    def freezes(self) -> bool:
        return len(self.scaled) < len(self.rules)

    def check_weight_names(self, method: str, names: list[str]) -> None:
        for number, rule in enumerate(self.rules):
            rule.check(f"methods.{method}.rules[{number}]", names)


class Method(base.Method[Config]):
    def start_task(self, run: base.Run) -> None:
        names = run.tensor_names()
        self._factors = scope.factors_by_name(run, self.name, self.config.scaled, names)
        run.log(f"segment_rates: {len(self._factors)} of {len(names)} tensors have a learning rate of their own")

    def transform_step(self, run: base.Run, shards: Sequence[base.Shard]) -> None:
        scope.scale_step(run, shards, lambda name: self._factors.get(name, 1.0))
