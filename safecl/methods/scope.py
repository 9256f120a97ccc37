"""Selections of trained weights: by module, layer range or a seeded half; and steps that are shortened in some of
them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from safecl.config import ConfigError, MethodConfig
from safecl.config.base import Section
from safecl.methods import base, layers

ATTENTION = ("*.self_attn.*", "*.attn.*", "*.attention.*", "*.self_attention.*")


class ScopedConfig(MethodConfig):
    """Config of a method whose penalty can be restricted to some modules."""

    has_penalty: ClassVar[bool] = True

    modules: Literal["all", "attention"] | list[str] = "all"
    """The weights that are pulled: all, attention, or patterns of parameter names with shell wildcards, e.g.
    ["*.self_attn.v_proj.*", "*.layers.0.*"]."""

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


class Segment(Section):
    """A selection of trained weights: those that fit all conditions that are given."""

    modules: Literal["all", "attention"] | list[str] = "all"
    """all, attention, or patterns of parameter names with shell wildcards, e.g. ["*.mlp.*", "lm_head.*"]."""
    layers: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] | None = None
    """First and last layer, counted from 0 as in the names of the weights; null: any, and weights of no layer."""
    half: int | None = None
    """Takes half of the modules that fit the other conditions, drawn by train.seed and this number; null: all."""

    def chosen(self, names: Sequence[str], seed: int) -> set[str]:
        """Return the names that fit. It depends on names and seed alone, whatever the order of the names."""
        found = {name for name in names if self._fits(name)}
        if self.half is None:
            return found
        modules = sorted({module_of(name) for name in found})
        kept = set(random.Random(f"{seed} {self.half}").sample(modules, (len(modules) + 1) // 2))
        return {name for name in found if module_of(name) in kept}

    def _fits(self, name: str) -> bool:
        patterns = patterns_of(self.modules)
        if patterns and not any(fnmatchcase(name, pattern) for pattern in patterns):
            return False
        number = layers.number_of(name)
        return self.layers is None or (number is not None and self.layers[0] <= number <= self.layers[1])

    def check(self, key: str, names: Sequence[str]) -> None:
        """Raise ConfigError where it selects none of these weights. key: the config key of the selection."""
        if self.layers is not None:
            layers.check_numbers(f"{key}.layers", self.layers, names)
        if not self.chosen(names, 0):
            examples = ", ".join(list(names)[len(names) // 2 :][:3])
            raise ConfigError(f"{key}: no trained weight fits; there are {examples}, ...")


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
