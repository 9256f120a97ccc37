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
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base, scope

if TYPE_CHECKING:
    import torch

GRADIENT = "_segment_rates_grad"


class Rule(scope.Segment):
    """A selection of weights and the factor of their learning rate."""

    importance: Literal["highest", "lowest"] | None = None
    """Of the tensors that fit, take those with the highest, or lowest, mean squared gradient on the memory."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """importance only: the share of these tensors that is taken."""
    factor: Annotated[float, Field(ge=0)] = 0.0
    """Factor of the learning rate."""


class Config(MethodConfig):
    """Factors of the learning rate, or freezing, by segment of the weights."""

    rules: Annotated[list[Rule], Field(min_length=1)] = [Rule(modules="attention", factor=0.1)]
    """Selections of weights; the factors of all that hold a tensor are multiplied."""

    @property
    def needs_memory(self) -> bool:
        return any(rule.importance for rule in self.rules)

    @property
    def scaled(self) -> list[Rule]:
        """The rules that act in each step; the others freeze."""
        return [rule for rule in self.rules if rule.importance or rule.factor > 0]

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
        squares = self._mean_squares(run) if self.config.needs_memory else {}
        self._factors: dict[str, float] = {}
        for rule in self.config.scaled:
            chosen = sorted(rule.chosen(names, run.seed))
            if rule.importance is not None:
                chosen.sort(key=lambda name: squares[name], reverse=rule.importance == "highest")
                chosen = chosen[: max(1, round(rule.share * len(chosen)))]
            for name in chosen:
                self._factors[name] = self._factors.get(name, 1.0) * rule.factor
        run.log(f"segment_rates: {len(self._factors)} of {len(names)} tensors have a learning rate of their own")

    def transform_step(self, run: base.Run, shards: Sequence[base.Shard]) -> None:
        scope.scale_step(run, shards, lambda name: self._factors.get(name, 1.0))

    def _mean_squares(self, run: base.Run) -> dict[str, float]:
        """Return the mean squared gradient of each tensor on one draw from the memory; 0 where it is not finite."""
        names = run.tensor_names()
        if not run.memory_gradient(GRADIENT, base.ReplayTerm("segment_rates", ce_weight=1.0, share=1.0)):
            run.log("segment_rates: the memory's gradient is not finite; importance is by the order of names")
            return dict.fromkeys(names, 0.0)
        shards = run.shards()
        squares, sizes = run.dots_per_tensor(shards, [(_gradient, _gradient), (base.one_of, base.one_of)])
        for shard in shards:
            del shard.state[GRADIENT]
        return dict(zip(names, (squares / sizes).tolist(), strict=True))


def _gradient(shard: base.Shard) -> torch.Tensor:
    return shard.state[GRADIENT]
