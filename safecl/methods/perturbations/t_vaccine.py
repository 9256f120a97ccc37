"""T-Vaccine (Liu et al. 2025, "Targeted Vaccine", arXiv 2410.09760): Vaccine in a few layers, drawn by how much harmful
rows would change them.

    p_l  ~ ||dH/dh_l||              H: loss of harmful rows, every `renew` steps;  h_l: attention outputs of layer l
    S    = `layers` layers drawn without replacement with probability p, every `every` steps
    e_l  = rho * g_l / ||g_S||      l in S;  g_l = dL/dh_l, the norm is over the layers of S and all tokens
    step = gradient of L with h_l + e_l in the place of h_l, taken by the weights of the layers in S alone

The weights of all other decoder layers stay in that step; embeddings, the last norm and the head are trained. The paper
trains adapters of the attention and saves the memory of the layers that stay; here the state of all weights is kept,
and the weights from before a step, 4 bytes per trained weight. It acts on the first task, with `role: align`, needs
harmful rows, and costs what `vaccine` costs and one more pass over harmful rows every `renew` steps.

The authors' scripts draw 5 layers of Qwen2-7B, every 20 steps, with probabilities that are renewed every 200, and
rho = 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from safecl.config.base import Change
from safecl.methods import base, layers, scope
from safecl.methods.harmful import HarmfulConfig


class Config(HarmfulConfig):
    """T-Vaccine: an alignment stage with perturbed hidden states in a few drawn layers."""

    acts_on: ClassVar[Literal["align"]] = "align"
    task_gradient_passes: ClassVar[float] = 1
    moves_hidden: ClassVar[bool] = True
    changes: ClassVar[Change] = Change("step", "factors")
    state_kinds: ClassVar[tuple[str, ...]] = (base.BEFORE,)

    rho: Annotated[float, Field(ge=0)] = 3.0
    """Length of the move of the attention outputs of all drawn layers together."""
    layers: Annotated[int, Field(ge=1)] = 5
    """Layers that are drawn; all where the model has no more."""
    every: Annotated[int, Field(ge=1)] = 20
    """Steps between two draws of layers."""
    renew: Annotated[int, Field(ge=1)] = 200
    """Steps between two measurements of the layers' probabilities."""
    share: Annotated[float, Field(gt=0)] = 1.0
    """Tokens of harmful rows in a measurement, as a share of the task's tokens in a step."""

    @property
    def gradient_passes(self) -> float:
        return 1 / self.renew


class Method(base.Method[Config]):
    def __init__(self, name: str, config: Config):
        super().__init__(name, config)
        self._norms: list[float] = []
        self._drawn: list[int] = []

    @property
    def _draw(self) -> base.ReplayTerm:
        return base.ReplayTerm("t_vaccine", ce_weight=1.0, share=self.config.share, harmful=self.config.harmful)

    def gradient_draws(self, step: int) -> list[base.ReplayTerm]:
        return [self._draw] if step % self.config.renew == 0 else []

    def before_step(self, run: base.Run) -> None:
        if run.step % self.config.renew == 0:
            self._norms = run.hidden_gradient_norms(self._draw)
        if run.step % self.config.every == 0:
            self._drawn = self._draw_layers(run)

    def hidden_move(self) -> base.HiddenMove | None:
        return base.HiddenMove(self.config.rho, tuple(self._drawn)) if self.config.rho > 0 else None

    def transform_step(self, run: base.Run, shards: Sequence[base.Shard]) -> None:
        scope.scale_step(run, shards, self._factor)

    def _factor(self, name: str) -> float:
        number = layers.number_of(name)
        return 1.0 if number is None or number in self._drawn else 0.0

    def _draw_layers(self, run: base.Run) -> list[int]:
        """Draw the layers, by the seed and the step alone."""
        import numpy as np

        norms = np.nan_to_num(np.array(self._norms), posinf=0.0)
        norms = norms if norms.sum() > 0 else np.ones(len(norms))
        count = min(self.config.layers, int((norms > 0).sum()))
        generator = np.random.default_rng([run.seed & 0xFFFFFFFF, run.step])
        found: list[int] = generator.choice(len(norms), count, replace=False, p=norms / norms.sum()).tolist()
        return sorted(found)
