"""One AdamW update of the shards: clip coefficient, penalties, and one fused pass over each shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from safecl.engine.zero.clipping import clip_coefficient, clip_gradients_
from safecl.engine.zero.penalties import Penalties, PenaltyPlaces, kinds_of, place_penalties
from safecl.engine.zero.shard import Action, Shard
from safecl.kernels import adamw_step_, ema_update_
from safecl.methods.terms import AverageMask, Penalty


@dataclass
class UpdatePlan:
    """The settings of one update, which the trainer decides before the step.

    lr: learning rate. clip_norm: largest norm of the gradient, 0 for no clipping. clip_scope: `task` clips the loss's
    gradient before penalties join it, `total` clips the sum. ema_decay: decay of the state `ema`, None for no average.
    ema_mask: another decay for some elements. transforms: change the gradients before the norm is taken.
    step_transforms: change the step that was taken; the state BEFORE holds the old weights. after_update: work on the
    new weights.
    """

    lr: float
    clip_norm: float = 0.0
    clip_scope: str = "task"
    penalties: Sequence[Penalty] = ()
    ema_decay: float | None = None
    ema_mask: AverageMask | None = None
    transforms: Sequence[Action] = ()
    step_transforms: Sequence[Action] = ()
    after_update: Sequence[Action] = ()


AveragePlace = Literal["pass", "after", "aside"]
"""The moment in which the average follows the weights:

pass    in AdamW's pass over the shard, which has the new weights at hand
after   after the transforms of the step
aside   after the step, while the next forward and backward pass compute: it comes over the link to host memory, and
        nobody needs it before the next step
"""


def place_of_average(plan: UpdatePlan, shards: Sequence[Shard]) -> AveragePlace | None:
    """Return the moment of this update's average, None where there is none.

    Work on the new weights may change them, and a masked average reads the Fisher of the penalty: neither leaves the
    average for later.
    """
    if plan.ema_decay is None:
        return None
    if plan.ema_mask is None and not plan.after_update and any(shard.is_streamed("ema") for shard in shards):
        return "aside"
    return "after" if plan.step_transforms else "pass"


@dataclass
class UpdateResult:
    """The outcome of one pass of the optimizer."""

    applied: bool = False
    """False where the update, or another action, was skipped."""
    grad_norm: Tensor | None = None
    """Global norm before clipping, 0-dim fp32."""
    penalty: Tensor | None = None
    """This shard's part of the penalty loss, 0-dim fp32; None without penalties. The step adds the parts up with its
    other losses, so that a penalty needs no collective call of its own."""
    nonfinite: Tensor | None = None
    """The number of elements of this rank's shards that the pass has made NaN or infinite, 0-dim int64 on their device.
    It is added up with the losses, too."""


class AdamWSettings(TypedDict):
    """The settings that all updates share."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class ShardUpdate:
    """One update of this rank's shards."""

    plan: UpdatePlan
    averages: bool
    """True where the average follows the weights in this pass."""
    settings: AdamWSettings
    step: int
    """Counted from 1 since the moments were reset."""
    penalties: Penalties
    reduce_sum: Callable[[Tensor], Tensor]
    """Sum over all shards of a number that each rank has for its own."""
    nonfinite: Tensor
    """The pass adds the number of elements to it that it has made NaN or infinite; 0-dim int64, on the shards'
    device."""

    def run(self, shards: Sequence[Shard], norm: Tensor) -> Tensor | None:
        """Update the shards; return this rank's part of the penalty loss. norm: that of the loss's gradient."""
        places = place_penalties(self.plan.penalties, self._pass_mask)
        if not self.plan.penalties:
            self._clip_the_loss(shards, norm, places)
            return None
        if self.plan.clip_scope == "total":
            return self._clip_the_total(shards, places)
        return self._clip_the_loss(shards, norm, places)

    @property
    def _pass_mask(self) -> AverageMask | None:
        return self.plan.ema_mask if self.averages else None

    def _clip_the_loss(self, shards: Sequence[Shard], norm: Tensor, places: PenaltyPlaces) -> Tensor:
        """`task`: clip the loss's gradient, then add the penalties'."""
        clip = clip_coefficient(norm, self.plan.clip_norm)
        if places.before_pass and clip is not None:
            clip_gradients_(shards, clip)
            clip = None
        losses = self.penalties.add_gradients(shards, places.before_pass)
        losses += [loss for shard in shards for loss in self._step(shard, clip, places.in_pass)]
        return sum(losses, torch.zeros(()))

    def _clip_the_total(self, shards: Sequence[Shard], places: PenaltyPlaces) -> Tensor:
        """`total`: add the penalties' gradients, then clip the sum. One more small all-reduce, for its norm."""
        losses = self.penalties.add_gradients(shards, places.before_pass)
        squares, loss = self.penalties.squared_norm(shards, places.in_pass)
        clip = clip_coefficient(self.reduce_sum(squares).sqrt().float(), self.plan.clip_norm)
        for shard in shards:
            self._step(shard, clip, places.in_pass, penalty_scale=clip)
        return sum(losses, loss.float())

    def _step(
        self, shard: Shard, clip: Tensor | None, penalty: Penalty | None, penalty_scale: Tensor | None = None
    ) -> list[Tensor]:
        """Run AdamW over the shard, piece by piece; return the losses of the penalty in the pass, by piece."""
        for kind in ("exp_avg", "exp_avg_sq"):
            if kind not in shard.state:
                shard.state[kind] = torch.zeros_like(shard.param)
        shard.settle_pages()
        average, mask = ["ema"] if self.averages else [], self._pass_mask
        kinds = dict.fromkeys([*kinds_of(penalty), *average, *([mask.fisher] if mask is not None else [])])
        options = self._options(shard, clip)
        losses = []
        for piece in shard.pieces(list(kinds), written=average):
            tensors: dict[str, Any] = {"segments": piece.of_table(shard.segments), "nonfinite": self.nonfinite}
            tensors["ema"] = piece.state["ema"] if average else None
            if mask is not None:
                tensors["fisher"] = piece.state[mask.fisher]
            tensors |= self.penalties.pass_arguments(shard, piece, penalty, penalty_scale)
            losses.append(
                adamw_step_(
                    piece.of(shard.param),
                    piece.of(shard.grad),
                    piece.of(shard.state["exp_avg"]),
                    piece.of(shard.state["exp_avg_sq"]),
                    **options,
                    **tensors,
                )
            )
        return [loss for loss in losses if loss is not None]

    def _options(self, shard: Shard, clip: Tensor | None) -> dict[str, Any]:
        """Scalar arguments of the pass."""
        options: dict[str, Any] = {
            **self.settings,
            "step": self.step,
            "lr": self.plan.lr,
            "clip_coef": None if clip is None else clip.to(shard.param.device),
            "ema_decay": self.plan.ema_decay if self.averages else None,
        }
        mask = self._pass_mask
        return options if mask is None else options | {"ema_threshold": mask.threshold, "ema_decay_above": mask.decay}


def average_(shards: Sequence[Shard], plan: UpdatePlan) -> None:
    """Let the average follow the weights, outside of AdamW's pass. The same arithmetic as in the pass."""
    mask = plan.ema_mask
    assert plan.ema_decay is not None
    for shard in shards:
        for piece in shard.pieces(["ema", *([mask.fisher] if mask is not None else [])], written=["ema"]):
            ema, param = piece.state["ema"], piece.of(shard.param)
            if mask is None:
                ema_update_(ema, param, plan.ema_decay)
                continue
            above = piece.state[mask.fisher].float() > mask.threshold
            ema.add_(torch.where(above, 1.0 - mask.decay, 1.0 - plan.ema_decay) * (param - ema))
