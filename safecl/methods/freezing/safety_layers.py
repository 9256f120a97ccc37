"""Safely partial-parameter fine-tuning (SPPFT, Li et al. 2025, "Safety Layers in Aligned Large Language Models",
arXiv 2408.17003): the layers that tell disallowed prompts from others stay as they are. Needs no data.

    theta_i stays   in the safety layers,      all other weights are trained

The safety layers are a few contiguous layers in the first half of the model. Where they lie depends on the model: the
paper finds them by the angles between last hidden states of disallowed and of harmless prompts, layer by layer, and
names layers 6 to 12 of 32 for Llama-2-7B-chat. The default is the same range of depth. Frozen weights have no gradient,
no master copy and no moments. With LoRA the adapters of these layers are frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base, layers


class Config(MethodConfig):
    """SPPFT: the safety layers stay as they are."""

    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """Numbers of the safety layers, counted from 0 as in the names of the weights. Default: those from 6/32 to 12/32 of
    the depth, layers 6 to 12 of 32."""

    def frozen(self, names: Sequence[str], seed: int) -> set[str]:
        numbers = {name: number for name in names if (number := layers.number_of(name)) is not None}
        chosen = self.layers if self.layers is not None else layers.safety_range(names)
        return {name for name, number in numbers.items() if number in chosen}

    def check_weight_names(self, method: str, names: list[str]) -> None:
        layers.check_numbers(f"methods.{method}.layers", self.layers or [], names)


class Method(base.Method[Config]):
    """All of it is in the choice of the weights."""
