"""Vaccine (Huang et al. 2024, arXiv 2402.01109, NeurIPS 2024): an alignment stage that bears drift of hidden states.

    e_l  = rho * g_l / ||g||                          g_l = dL/dh_l,  ||g||^2 = sum over layers and tokens of ||g_l||^2
    step = gradient of L with h_l + e_l in the place of h_l

h_l are the outputs of the attention module of layer l. Harmful fine-tuning moves them; the alignment stage is trained
where they have moved in the worst direction, so that the later move hurts less. It acts on the first task, with
`role: align`, and costs one more forward and backward on its rows. Between the two passes it keeps the gradients of the
hidden states of a step, on the device: layers x tokens of a rank x hidden size.

The norm is over the whole step, all micro-batches and ranks, so rho does not depend on how a step is cut. The paper
reports rho = 2, the authors' later scripts use 5; both are for their batch of ten rows.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base


class Config(MethodConfig):
    """Vaccine: an alignment stage with perturbed hidden states."""

    acts_on: ClassVar[Literal["align"]] = "align"
    task_gradient_passes: ClassVar[float] = 1
    moves_hidden: ClassVar[bool] = True

    rho: Annotated[float, Field(ge=0)] = 2.0
    """Length of the move of all attention outputs of a step together."""


class Method(base.Method[Config]):
    def hidden_move(self) -> base.HiddenMove | None:
        return base.HiddenMove(self.config.rho) if self.config.rho > 0 else None
