"""Panacea: adds the perturbation under which harmful rows become least likely.

    theta = theta_tuned + eps,    eps = rho g / |g|,    g = gradient of h at theta_tuned

h is the mean over harmful rows of the negative log-likelihood of their answers, |g| the norm over all weights: to first
order eps = argmax h(theta_tuned + eps) with |eps| <= rho. Source: Wang et al., Panacea, arXiv 2501.18100. The authors
train with eps in the loop, so that the task is learned beside it, and add it at the end. Ours: the addition alone,
which needs no training; `steps` splits rho into steps that take the gradient anew; rows without answers get affirmative
openings, see safecl.merging.rows.affirmative.

Memory: the tuned model and its gradient in fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from safecl.merging import base
from safecl.merging.rows.settings import RowsConfig

if TYPE_CHECKING:
    import torch


class Config(RowsConfig):
    """Tuned model plus the perturbation that makes harmful rows unlikely."""

    needs: ClassVar[base.Needs] = base.Needs(
        base="no",
        most=1,
        data="harmful prompts, with harmful answers or without answers; without a file safecl's own requests",
        data_optional=True,
    )

    rho: Annotated[float, Field(ge=0)] = 1.0
    """Length of the perturbation over all weights (L2 norm)."""
    steps: Annotated[int, Field(ge=1)] = 1
    """Steps that rho is split into."""


class Merge(base.Merge[Config]):
    by_rows = True

    def prepare(self) -> None:
        import torch

        from safecl.merging.rows.gradients import mean_gradient
        from safecl.merging.rows.loaded import load
        from safecl.merging.rows.reading import harmful_rows

        config, models = self.config, self.models
        self.rows = harmful_rows(config, models)
        loaded = load(models, models.tuned[0], torch.float32, config.trust_remote_code)
        self.losses, self.values = [], loaded.parameters
        with torch.enable_grad():
            for _ in range(config.steps):
                gradient = mean_gradient(loaded, self.rows.rows)
                self.losses.append(gradient.loss)
                gradient.move_(config.rho / config.steps)

    def combine(self, tensors: base.Tensors) -> torch.Tensor:
        tuned = tensors.tuned[0]
        if tensors.name not in self.values:  # a buffer
            return tuned
        moved = self.values[tensors.name].detach()
        return tuned.copy_(moved[tensors.start : tensors.start + len(tuned)] if tuned.dim() else moved)

    def notes(self) -> list[str]:
        path = ", ".join(f"{loss:.3f}" for loss in self.losses)
        return [self.rows.note, f"loss of the harmful answers before each step: {path}"]
