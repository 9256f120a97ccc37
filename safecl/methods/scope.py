"""Selections of trained weights, by module, layer range, safety layers, importance or a seeded half; and what is scaled
in them: steps, or the strength of a penalty."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeVar

from pydantic import Field

from safecl.config import ConfigError, MethodConfig
from safecl.config.base import Section
from safecl.methods import base, layers

if TYPE_CHECKING:
    import torch

GRADIENT = "_scope_grad"
ATTENTION = ("*.self_attn.*", "*.attn.*", "*.attention.*", "*.self_attention.*")


class Segment(Section):
    """A selection of trained weights: those that fit all conditions that are given."""

    modules: Literal["all", "attention"] | list[str] = "all"
    """all, attention, or patterns of parameter names with shell wildcards, e.g. ["*.mlp.*", "lm_head.*"]."""
    layers: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] | Literal["safety"] | None = None
    """First and last layer, counted from 0 as in the names of the weights; safety: the layers from 6/32 to 12/32 of the
    depth, as in `safety_layers`; null: any, and weights of no layer."""
    half: int | None = None
    """Takes half of the modules that fit the other conditions, drawn by train.seed and this number; null: all."""

    def chosen(self, names: Sequence[str], seed: int) -> set[str]:
        """Return the names that fit. It depends on names and seed alone, whatever the order of the names."""
        numbers = self._numbers(names)
        found = {name for name in names if self._fits(name, numbers)}
        if self.half is None:
            return found
        modules = sorted({module_of(name) for name in found})
        kept = set(random.Random(f"{seed} {self.half}").sample(modules, (len(modules) + 1) // 2))
        return {name for name in found if module_of(name) in kept}

    def _numbers(self, names: Sequence[str]) -> range | None:
        """The layers that fit; None for any."""
        if self.layers == "safety":
            return layers.safety_range(names)
        return None if self.layers is None else range(self.layers[0], self.layers[1] + 1)

    def _fits(self, name: str, numbers: range | None) -> bool:
        patterns = patterns_of(self.modules)
        if patterns and not any(fnmatchcase(name, pattern) for pattern in patterns):
            return False
        return numbers is None or layers.number_of(name) in numbers

    def check(self, key: str, names: Sequence[str]) -> None:
        """Raise ConfigError where it selects none of these weights. key: the config key of the selection."""
        if isinstance(self.layers, tuple):
            layers.check_numbers(f"{key}.layers", self.layers, names)
        if not self.chosen(names, 0):
            examples = ", ".join(list(names)[len(names) // 2 :][:3])
            raise ConfigError(f"{key}: no trained weight fits; there are {examples}, ...")


class Rule(Segment):
    """A selection of weights and a factor for them."""

    importance: Literal["highest", "lowest"] | None = None
    """Of the tensors that fit, take those with the highest, or lowest, mean squared gradient on the memory."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """importance only: the share of these tensors that is taken."""
    factor: Annotated[float, Field(ge=0)] = 0.0
    """Factor of their learning rate, or of the strength with which they are pulled."""


class ScopedConfig(MethodConfig):
    """Config of a method whose penalty can be restricted to some modules."""

    has_penalty: ClassVar[bool] = True

    modules: Literal["all", "attention"] | list[str] = "all"
    """The weights that are pulled: all, attention, or patterns of parameter names with shell wildcards, e.g.
    ["*.self_attn.v_proj.*", "*.layers.0.*"]."""

    rules: list[Rule] = []
    """Selections of weights whose strength is multiplied by a factor; those of all that hold a tensor are
    multiplied."""

    @property
    def needs_memory(self) -> bool:
        return self.needs_gradient

    @property
    def needs_gradient(self) -> bool:
        """True where a rule takes weights by importance."""
        return any(rule.importance for rule in self.rules)

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns of parameter names that are pulled; empty for all weights."""
        return patterns_of(self.modules)

    def check_weight_names(self, method: str, names: list[str]) -> None:
        """Raise ConfigError where no trained weight fits the patterns."""
        if self.patterns and not any(fnmatchcase(name, pattern) for pattern in self.patterns for name in names):
            examples = ", ".join(names[len(names) // 2 :][:3])
            raise ConfigError(
                f"methods.{method}.modules: no trained weight is named like {', '.join(self.patterns)}; "
                f"there are {examples}, ..."
            )
        for number, rule in enumerate(self.rules):
            rule.check(f"methods.{method}.rules[{number}]", names)


C = TypeVar("C", bound=ScopedConfig)


class ScopedMethod(base.Method[C]):
    """A method with a penalty whose strength depends on the weight."""

    def __init__(self, name: str, config: C):
        super().__init__(name, config)
        self._factors: dict[str, float] = {}

    def choose_weights(self, run: base.Run) -> None:
        """Check the config's selections, and find the weights that its rules hold, before a task. A collective call."""
        names = run.weight_names()
        self.config.check_weight_names(self.name, names)
        self._factors = factors_by_name(run, self.name, self.config.rules, names)
        if self._factors:
            run.log(f"{self.name}: {len(self._factors)} of {len(names)} weights have a strength of their own")

    @property
    def factors(self) -> tuple[tuple[str, float], ...]:
        """Factors of the strength by weight, for `Penalty.factors`."""
        return tuple(self._factors.items())


def patterns_of(modules: Literal["all", "attention"] | list[str]) -> tuple[str, ...]:
    """Return the patterns of parameter names that a setting `modules` stands for; none for all weights."""
    if isinstance(modules, list):
        return tuple(modules)
    return ATTENTION if modules == "attention" else ()


def module_of(name: str) -> str:
    """Return the name of a weight's module: a bias belongs to its weight, both factors of an adapter together."""
    return name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]


def scale_step(run: base.Run, shards: Sequence[base.Shard], factor_of: Callable[[str], float]) -> None:
    """Multiply the step that was taken by a factor for each tensor, in `Method.transform_step`; 0 leaves the old
    weights, bit for bit."""
    for part in run.parts(shards):
        factor = factor_of(part.name)
        if factor != 1.0:
            new, old = (values.view(-1)[part.where] for values in (part.shard.param, part.shard.state[base.BEFORE]))
            new.copy_(old.to(new.device).lerp(new, factor))


def factors_by_name(run: base.Run, method: str, rules: Sequence[Rule], names: Sequence[str]) -> dict[str, float]:
    """Return the product of the factors of all rules that hold a weight, for those of these weights that any rule
    holds.

    Where a rule takes weights by importance, it takes a gradient of a draw from the memory. A collective call. method:
    its name, which is that of the draw, and is in messages.
    """
    squares = mean_squares(run, method, names) if any(rule.importance for rule in rules) else {}
    factors: dict[str, float] = {}
    for rule in rules:
        chosen = sorted(rule.chosen(names, run.seed))
        if rule.importance is not None:
            chosen.sort(key=lambda name: squares[name], reverse=rule.importance == "highest")
            chosen = chosen[: max(1, round(rule.share * len(chosen)))]
        for name in chosen:
            factors[name] = factors.get(name, 1.0) * rule.factor
    return factors


def mean_squares(run: base.Run, method: str, names: Sequence[str]) -> dict[str, float]:
    """Return the mean squared gradient of each of these weights on one draw from the memory; 0 where it is not finite.
    A collective call."""
    tensors = run.tensor_names()
    if not run.memory_gradient(GRADIENT, base.ReplayTerm(method, ce_weight=1.0, share=1.0)):
        run.log(f"{method}: the memory's gradient is not finite; importance is by the order of names")
        return dict.fromkeys(names, 0.0)
    shards = run.shards()
    squares, sizes = run.dots_per_tensor(shards, [(_gradient, _gradient), (base.one_of, base.one_of)])
    for shard in shards:
        del shard.state[GRADIENT]
    found = dict(zip(tensors, (squares / sizes).tolist(), strict=True))
    return {name: importance_of(found, name) for name in names}


def importance_of(squares: Mapping[str, float], name: str) -> float:
    """Return a weight's value; that of one with an adapter is the larger of its factors'. squares: by tensor."""
    if name in squares:
        return squares[name]
    return max(value for tensor, value in squares.items() if module_of(tensor).endswith(module_of(name)))


def _gradient(shard: base.Shard) -> torch.Tensor:
    return shard.state[GRADIENT]
