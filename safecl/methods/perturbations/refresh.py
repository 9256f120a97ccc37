"""Refresh learning (Wang, Li, Shen & Huang 2024, arXiv 2403.20212, ICLR 2024): unlearn the current rows a little, then
learn them together with the memory.

    u_l    = ||theta_l|| / ||g_l|| g_l                 for every tensor l; g = gradient of the CE of the task's rows
    theta <- theta + delta (u + sigma N(0, 1)) / (1 + fisher_weight F / mean F)
    then the step of the other methods, at the new weights

The move goes uphill on the rows that the step is about to learn, so that they do not crowd out what is older. F is the
Fisher information of the memory under the aligned model, as in `ewc`: weights that matter for it move less. Refreshing
is a plug-in for rehearsal; the authors' code adds it to DER++, so combine it with `derpp` or `der`. In that code u is
the step of SGD, whose learning rate the normalisation cancels, and F is not divided by its mean. It costs one more
forward and backward on the task's rows, and one fp32 value and the Fisher per weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base
from safecl.methods.penalties import ewc

if TYPE_CHECKING:
    import torch

TASK_GRADIENT = "_task_grad"


class Config(MethodConfig):
    """Refresh learning: a small step of unlearning before every step."""

    task_gradient_passes: ClassVar[float] = 1
    moves_weights: ClassVar[Literal["for_good"]] = "for_good"

    delta: Annotated[float, Field(ge=0)] = 1e-5
    """Length of the move, relative to the norm of each tensor."""
    sigma: Annotated[float, Field(ge=0)] = 0.001
    """Standard deviation of the noise, per weight, before the factor delta."""
    fisher_weight: Annotated[float, Field(ge=0)] = 0.001
    """Damping by F / mean(F) of the memory; 0 needs neither a Fisher nor a memory."""
    sign_batches: Annotated[int, Field(ge=1)] = 64
    """Random-sign batches of the Fisher estimate; its relative error is about 0.9 / sqrt(sign_batches)."""
    rows_per_batch: Annotated[int, Field(ge=1)] = 16
    """Memory rows in one sign batch."""

    @property
    def needs_memory(self) -> bool:
        return self.fisher_weight > 0

    @property
    def state_kinds(self) -> tuple[str, ...]:
        return (TASK_GRADIENT, "fisher") if self.fisher_weight > 0 else (TASK_GRADIENT,)

    @property
    def refuses_lora(self) -> str | None:
        if self.fisher_weight == 0:
            return None
        return f"{ewc.LORA_REFUSED}; or set methods.refresh.fisher_weight: 0"


class Method(base.Method[Config]):
    def start_task(self, run: base.Run) -> None:
        config = self.config
        if config.fisher_weight > 0 and not run.has_state("fisher"):
            mean = run.estimate_fisher(sign_batches=config.sign_batches, rows_per_batch=config.rows_per_batch)
            run.log(f"refresh: Fisher of {config.sign_batches} sign batches, mean {mean:.3g}")

    def before_step(self, run: base.Run) -> None:
        if not run.task_gradient(TASK_GRADIENT):
            run.log(f"refresh: step {run.step}: the task's gradient is not finite, nothing is unlearned")
            return
        shards, damping = run.shards(), self._damping(run)
        weights, gradients = run.dots_per_tensor(shards, [(_weights, _weights), (_gradient, _gradient)]).sqrt()
        factors = weights / gradients.clamp_min(1e-30)
        for part in run.parts(shards):
            shard, where = part.shard, part.where
            move = _gradient(shard).view(-1)[where].to(shard.param.device) * float(factors[part.number])
            if self.config.sigma > 0:
                move.add_(run.noise(part, "refresh"), alpha=self.config.sigma)
            if damping:
                for piece in shard.pieces(["fisher"]):
                    low, high = max(where.start, piece.where.start), min(where.stop, piece.where.stop)
                    if low < high:
                        fisher = piece.state["fisher"][low - piece.where.start : high - piece.where.start]
                        move[low - where.start : high - where.start].div_(1 + damping * fisher.float())
            shard.param.view(-1)[where].add_(move, alpha=self.config.delta)
        run.publish()

    def _damping(self, run: base.Run) -> float:
        """fisher_weight / mean F."""
        return self.config.fisher_weight / run.fisher_mean("fisher") if self.config.fisher_weight > 0 else 0.0


def _weights(shard: base.Shard) -> torch.Tensor:
    return shard.param


def _gradient(shard: base.Shard) -> torch.Tensor:
    return shard.state[TASK_GRADIENT]
