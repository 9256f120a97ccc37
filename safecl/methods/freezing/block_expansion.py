"""Block expansion (Wu et al. 2024, "LLaMA Pro: Progressive LLaMA with Block Expansion", arXiv 2401.02415): new blocks
learn the task, and all that the model had stays as it is. Needs no data.

    h <- h + 0       a new block, a copy of the one below it whose last maps are 0, adds nothing at the start
    theta_i stays    outside of the new blocks

`safecl expand` makes the model with the new blocks, which computes what it did before; the run starts from it. The
paper adds one block on top of each group of four, and trains these alone. The result is an ordinary model with more
layers. Frozen weights have no gradient, no master copy and no moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from safecl.config import ConfigError, MethodConfig
from safecl.methods import base, layers


class Config(MethodConfig):
    """Block expansion: new blocks are trained, all other weights stay."""

    refuses_lora: ClassVar[str] = "the new blocks are trained whole; leave model.lora out"

    blocks: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """Numbers of the new blocks, as `safecl expand` prints them. Default: every fifth, which is new where there
    is one on each group of four."""

    def chosen(self, names: Sequence[str]) -> set[int]:
        """Return the numbers of the trained blocks of a model with these weights."""
        numbers = {number for name in names if (number := layers.number_of(name)) is not None}
        return set(self.blocks) if self.blocks is not None else {number for number in numbers if number % 5 == 4}

    def frozen(self, names: Sequence[str], seed: int) -> set[str]:
        trained = self.chosen(names)
        return {name for name in names if layers.number_of(name) not in trained}

    def check_weight_names(self, method: str, names: list[str]) -> None:
        layers.check_numbers(f"methods.{method}.blocks", self.blocks or [], names)
        if not self.chosen(names):
            raise ConfigError(f"methods.{method}: the model has no fifth block; name the new blocks with `blocks`")


class Method(base.Method[Config]):
    """All of it is in the choice of the weights."""
