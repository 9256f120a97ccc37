"""OGPSA with its roles swapped (Sun et al. 2026, arXiv 2602.07892): the user's gradient leaves out the direction of a
safety gradient, in every tensor by itself.

    g_l <- g_l - (g_l . r_l / (r_l . r_l + 1e-8)) r_l        for every tensor l

The paper protects general ability while it trains safety; here r is the gradient of the cross-entropy of the memory,
which protects safety while the user's task is trained. r is computed again every `every` steps, on a larger draw than
that of a step, so it costs little more than plain fine-tuning, and one fp32 value per weight. Unlike A-GEM it projects
tensor by tensor, and always: it removes the direction also where both gradients agree (`when: always`), so that the
memory's loss stays rather than falls. The projection acts on the gradient of the whole step; the authors' hook acts on
each micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from safecl.config import MethodConfig
from safecl.config.base import Change
from safecl.methods import base

if TYPE_CHECKING:
    import torch

REFERENCE, STREAM = "ogpsa_reference", "ogpsa"


class Config(MethodConfig):
    """OGPSA: gradients are made orthogonal to a reference gradient of the memory, tensor by tensor."""

    needs_memory: ClassVar[bool] = True
    changes: ClassVar[Change] = Change("gradient", "tensors")
    state_kinds: ClassVar[tuple[str, ...]] = (REFERENCE,)

    every: Annotated[int, Field(ge=1)] = 30
    """Steps between two computations of the reference gradient."""
    share: Annotated[float, Field(gt=0)] = 1.0
    """Tokens of the rows of the reference gradient, as a share of the task's tokens in a step."""
    when: Literal["always", "conflict"] = "always"
    """Project every tensor's gradient, or only those that go against the reference's."""

    @property
    def gradient_passes(self) -> float:
        return 1 / self.every


class Method(base.Method[Config]):
    def start_task(self, run: base.Run) -> None:
        self._known = run.has_state(REFERENCE)

    def gradient_draws(self, step: int) -> list[base.ReplayTerm]:
        return [self._draw] if step % self.config.every == 0 else []

    @property
    def _draw(self) -> base.ReplayTerm:
        return base.ReplayTerm(STREAM, ce_weight=1.0, share=self.config.share)

    def before_step(self, run: base.Run) -> None:
        if run.step % self.config.every == 0 and not run.memory_gradient(REFERENCE, self._draw):
            kept = "the earlier one is kept" if self._known else "gradients are not projected"
            run.log(f"ogpsa: step {run.step}: the reference gradient is not finite, {kept}")
        self._known = run.has_state(REFERENCE)

    def transform_gradient(self, run: base.Run, shards: Sequence[base.Shard]) -> None:
        if not self._known:
            return
        gr, rr = run.dots_per_tensor(shards, [(_grad, _reference), (_reference, _reference)])
        factors = gr / (rr + 1e-8)
        if self.config.when == "conflict":
            factors.clamp_(max=0.0)
        for part in run.parts(shards):
            reference = _reference(part.shard).view(-1)[part.where]
            part.shard.grad.view(-1)[part.where].sub_(reference, alpha=float(factors[part.number]))


def _grad(shard: base.Shard) -> torch.Tensor:
    return shard.grad


def _reference(shard: base.Shard) -> torch.Tensor:
    return shard.state[REFERENCE]
