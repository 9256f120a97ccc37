"""L2-SP (Li, Grandvalet & Davoine 2018, arXiv 1802.01483): a pull to the starting point, without data.

    L = L_task + 0.5 * strength * sum_i (theta_i - theta_0,i)^2        over the weights of the chosen modules

theta_0 is the aligned model, in all tasks of a sequence. The gradient is analytic, inside the optimizer's pass. The
anchor, one value per weight, is shared with the other methods that pull to theta_0.

With LoRA it is the same pull of the merged weights, whose difference to theta_0 is (alpha / r) B A:
    0.5 * strength * sum over adapters of ||(alpha / r) B A||_F^2,    ||B A||_F^2 = <B^T B, A A^T>
It costs r x r products and no state, and is clipped together with the loss.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from safecl.methods import base, scope


class Config(scope.ScopedConfig):
    """L2-SP: a pull of the weights to the aligned model."""

    state_kinds: ClassVar[tuple[str, ...]] = ("anchor",)

    strength: Annotated[float, Field(ge=0)] = 0.01
    """Factor of the penalty; unless `proximal`, the pull is part of the gradient that AdamW gets."""
    proximal: bool = False
    """Apply it as a proximal step after AdamW: stable for any strength times learning rate."""

    @property
    def is_proximal(self) -> bool:
        return self.proximal


class Method(scope.ScopedMethod[Config]):
    def start_task(self, run: base.Run) -> None:
        self.choose_weights(run)
        if not run.has_state("anchor"):
            run.set_anchor()

    def penalty(self) -> base.Penalty | None:
        if self.config.strength == 0:
            return None
        return base.Penalty(
            self.config.strength,
            proximal=self.config.proximal,
            modules=self.config.patterns,
            factors=self.factors,
            product=True,
        )
