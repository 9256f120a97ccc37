"""AsFT (Yang et al. 2025, "Anchoring Safety During LLM Fine-Tuning Within Narrow Safety Basin", arXiv 2506.08473):
updates are pulled out of the directions in which the alignment has not moved the weights.

    L = L_task + strength * sum_l ||(I - C_l) D_l||_F^2,    C_l = V_l V_l^T / ||V_l||_F,  V_l = W_aligned,l - W_base,l

D_l = (alpha / r) B A is the update of an adapter and V_l what the alignment has changed in the same weight: moves along
V are free, since they keep the model within the basin of its alignment, all others cost. C is the cheap stand-in for
the projection on V's columns that SafeLoRA uses (arXiv 2405.16833). `base` is the model before its alignment, with the
same architecture; its weights are read once.

    ||(I - C) B A||_F^2 = <P^T P, A A^T>,   P = B - V (V^T B) / ||V||_F

so neither D nor C is ever formed. Each rank keeps V, 2 bytes per adapted weight in a bf16 run and 4 in fp32. The
penalty is part of the loss and clipped with it. Only with LoRA, as in the paper."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from safecl.config import MethodConfig
from safecl.config.base import Text
from safecl.methods import base as methods


class Config(MethodConfig):
    """AsFT: a pull of adapters' updates out of the directions that the alignment has not taken."""

    has_penalty: ClassVar[bool] = True
    needs_base_model: ClassVar[bool] = True
    needs_lora: ClassVar[str] = "its pull is that of adapters' products; set model.lora, or use l2_sp"

    base: Text | None = None
    """Folder or hub id of the model before its alignment, which the method needs."""
    strength: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the penalty."""

    @property
    def base_model(self) -> str | None:
        return self.base


class Method(methods.Method[Config]):
    def penalty(self) -> methods.Penalty | None:
        if self.config.strength == 0:
            return None
        return methods.Penalty(self.config.strength, product=True, base=self.config.base)
