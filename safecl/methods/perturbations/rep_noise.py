"""RepNoise, representation noising (Rosati et al. 2024, arXiv 2405.14577, NeurIPS 2024): an alignment stage that turns
what the model knows of harmful answers into noise, behind every layer.

    L = A(theta) + beta * N(theta) - alpha * log(1 + H(theta))

    A = mean cross-entropy of the alignment rows
    N = mean over harmful rows and layers of MMD^2(z, e),    z: hidden states of the answer's tokens,  e ~ N(0, I)
    H = mean over the embedding and all layers of the harmful rows' cross-entropy, by final norm and head

MMD is the maximum mean discrepancy with five Gaussian kernels (safecl/engine/model/features.py). The logarithm slows
the ascent down as the harmful loss rises. It acts on the first task, with `role: align`, and needs harmful rows.

The form and the defaults are those of the authors' code, with two differences. There a sample of the MMD is a whole
answer, compared with those of its batch, so the term depends on how a step is cut; here the samples are the tokens of
one answer. And the code takes the outputs of feed-forward parts for z; here they are those of whole layers.

H must be known before its logarithm's gradient, and belongs to the whole step. So both terms have passes of their own,
over the same rows: two more forward and backward passes in each step, and 8 bytes per trained weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from safecl.methods import base
from safecl.methods.harmful import HarmfulConfig
from safecl.methods.terms import EVERY_LAYER

ASCENT, NOISE = "_rep_noise_ascent_grad", "_rep_noise_grad"


class Config(HarmfulConfig):
    """RepNoise: an alignment stage that makes noise of harmful representations."""

    acts_on: ClassVar[Literal["align"]] = "align"
    gradient_passes: ClassVar[float] = 2
    state_kinds: ClassVar[tuple[str, ...]] = (ASCENT, NOISE)
    compared_layers: ClassVar[int] = EVERY_LAYER

    beta: Annotated[float, Field(ge=0)] = 0.001
    """Factor of the distance between hidden states and noise."""
    alpha: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the logarithm of the harmful rows' loss, which is raised."""
    share: Annotated[float, Field(gt=0)] = 1.0
    """Tokens of harmful rows in each step, as a share of the task's tokens."""


class Method(base.Method[Config]):
    def __init__(self, name: str, config: Config):
        super().__init__(name, config)
        self._factors: dict[str, float] = {}

    @property
    def _ascent(self) -> base.ReplayTerm:
        share, harmful = self.config.share, self.config.harmful
        return base.ReplayTerm("rep_noise_ascent", ce_weight=1.0, share=share, harmful=harmful, every_layer=True)

    @property
    def _noise(self) -> base.ReplayTerm:
        share, harmful = self.config.share, self.config.harmful
        return base.ReplayTerm("rep_noise", share=share, harmful=harmful, noise_weight=1.0)

    def gradient_draws(self, step: int) -> list[base.ReplayTerm]:
        return [self._ascent, self._noise]

    def before_step(self, run: base.Run) -> None:
        self._factors = {}
        if run.memory_gradient(ASCENT, self._ascent):
            self._factors[ASCENT] = -self.config.alpha / (1.0 + run.gradient_loss(self._ascent))
        if run.memory_gradient(NOISE, self._noise):
            self._factors[NOISE] = self.config.beta
        if len(self._factors) < 2:
            run.log(f"rep_noise: step {run.step}: a gradient of the harmful rows is not finite, and is left out")

    def transform_gradient(self, run: base.Run, shards: Sequence[base.Shard]) -> None:
        for kind, factor in self._factors.items():
            for shard in shards:
                shard.grad.add_(shard.state[kind].to(shard.grad.device), alpha=factor)
