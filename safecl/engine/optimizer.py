"""ShardAdamW: the optimizer that DeepSpeed calls with this rank's flat fp32 shards, and the one place where weights change.

Order inside a step: gradient transforms -> norm -> clip coefficient -> penalty at the old weights -> moments -> decoupled decay -> update
-> EMA of the new weights -> work on the new weights. State (`exp_avg`, `exp_avg_sq`, `ema`, `fisher`, `anchor`, ...) has the layout of
the shard that it belongs to and moves nowhere, so it costs no communication in any ZeRO stage.

DeepSpeed calls `step()` also for passes that do not update, and once inside `initialize`: `action` says what the next call does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from safecl.kernels import adamw_step_, fisher_penalty_
from safecl.methods.base import Penalty


@dataclass
class Shard:
    """One flat tensor of trained weights with its gradient and its state, all of one layout."""

    param: torch.Tensor  # fp32, 1-D (stage 0: the parameter's own shape)
    state: dict[str, torch.Tensor]
    segments: tuple | None = None
    """(offsets, strength factors, weight decays) of stretches that differ from the group's settings."""

    @property
    def grad(self) -> torch.Tensor:
        return self.param.grad


@dataclass
class UpdatePlan:
    """What one update does, decided by the trainer before the step."""

    lr: float
    clip_norm: float = 0.0
    clip_scope: str = "task"
    penalties: Sequence[Penalty] = ()
    ema_decay: float | None = None
    transforms: Sequence[Callable[[list[Shard]], None]] = ()
    after_update: Sequence[Callable[[list[Shard]], None]] = ()


@dataclass
class UpdateResult:
    """What one update saw. `grad_norm` (before clipping) and `penalty` are 0-dim fp32 tensors; `applied` is False where it was skipped."""

    applied: bool = False
    grad_norm: torch.Tensor | None = None
    penalty: torch.Tensor | None = None


class ShardAdamW(torch.optim.Optimizer):
    """AdamW with EMA, Fisher penalty and clipping in one pass over the shard, for `deepspeed.initialize(optimizer=...)`.

    Args: `params`, one group; `betas`, `eps`, `weight_decay` as in torch.optim.AdamW.
    After initialize, call `bind(shard_map)` once; then set `action` (see `update`) before each `engine.step()`.
    """

    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        assert len(self.param_groups) == 1, "one parameter group; differences inside it are segments of the flat shard"
        self.action: Callable[[list[Shard]], None] | None = None
        self.result = UpdateResult()
        self.num_updates = 0
        self.fisher_means: dict[str, float] = {}
        """Mean over all weights of each kind of Fisher; a penalty's strength is divided by it."""
        self._shard_map = None

    def bind(self, shard_map) -> None:
        """Connects the optimizer with the layout of its shards."""
        self._shard_map = shard_map
        decay = self.param_groups[0]["weight_decay"]
        tables = _decay_segments(shard_map, decay)
        self._shards = [Shard(flat, self.state[flat], table) for flat, table in zip(shard_map.flats, tables, strict=True)]

    def shards(self) -> list[Shard]:
        """All flat shards of this rank with their state; usable outside of steps as well."""
        return self._shards

    def tensors(self, kind: str) -> list[torch.Tensor]:
        """State of one kind over all shards, in the order of the shard map's flats."""
        return [shard.state[kind] for shard in self._shards]

    def has(self, kind: str) -> bool:
        return bool(self._shards) and kind in self._shards[0].state

    @torch.no_grad()
    def copy_weights_to(self, kind: str, dtype: torch.dtype = torch.float32) -> None:
        """Makes the state `kind` a copy of the current master weights."""
        for shard in self._shards:
            if kind in shard.state and shard.state[kind].dtype == dtype:
                shard.state[kind].copy_(shard.param)
            else:
                shard.state[kind] = shard.param.detach().to(dtype, copy=True)

    def reset_moments(self) -> None:
        """A new task starts AdamW afresh."""
        self.num_updates = 0
        for shard in self._shards:
            for kind in ("exp_avg", "exp_avg_sq"):
                shard.state.pop(kind, None)

    @torch.no_grad()
    def step(self, closure=None):
        """Called by DeepSpeed with reduced, unscaled gradients. Does what `action` says, once; nothing where no action is set."""
        action, self.action = self.action, None
        if action is not None:  # DeepSpeed's stage 0 in bf16 steps once inside initialize, with zero gradients
            action([shard for shard in self._shards if shard.grad is not None])

    # ------------------------------------------------------------------------------------------------------------ update

    def update(self, plan: UpdatePlan) -> Callable[[list[Shard]], None]:
        """The action of an ordinary step."""

        def action(shards: list[Shard]) -> None:
            for transform in plan.transforms:
                transform(shards)
            norm = self.grad_norm(shards, fresh=bool(plan.transforms))
            self.result = UpdateResult(grad_norm=norm)
            if not bool(torch.isfinite(norm)):
                return
            self._update(shards, plan, norm)
            for work in plan.after_update:
                work(shards)
            self.result.applied = True

        return action

    def grad_norm(self, shards: list[Shard], fresh: bool = False) -> torch.Tensor:
        """Global gradient norm, 0-dim fp32; DeepSpeed's where it has one, else taken here."""
        known = None if fresh else self._shard_map.grad_norm()
        if known is not None:
            return known
        squares = sum((shard.grad.float().pow(2).sum(dtype=torch.float64) for shard in shards), torch.zeros((), dtype=torch.float64))
        return self._shard_map.reduce_sum(squares).sqrt().float()

    def _update(self, shards: list[Shard], plan: UpdatePlan, norm: torch.Tensor) -> None:
        self.num_updates += 1
        penalties, losses = list(plan.penalties), []
        if plan.clip_scope == "total" and penalties:
            losses += [self._add_penalty(shard, penalty) for shard in shards for penalty in penalties]
            penalties, norm = [], self.grad_norm(shards, fresh=True)
        clip = torch.clamp(plan.clip_norm / (norm + 1e-6), max=1.0) if plan.clip_norm > 0 else None
        for shard in shards:
            losses += self._step_shard(shard, plan, penalties, None if clip is None else clip.to(shard.param.device))
        if losses:
            self.result.penalty = self._shard_map.reduce_sum(torch.stack(losses).sum())

    def _step_shard(self, shard: Shard, plan: UpdatePlan, penalties: list[Penalty], clip: torch.Tensor | None) -> list[torch.Tensor]:
        losses = []
        if len(penalties) > 1:  # one penalty fits into the pass; further ones join a gradient that is clipped already
            if clip is not None:
                shard.grad.mul_(clip)
                clip = None
            losses = [self._add_penalty(shard, penalty) for penalty in penalties[1:]]
        for kind in ("exp_avg", "exp_avg_sq"):
            if kind not in shard.state:
                shard.state[kind] = torch.zeros_like(shard.param)
        group = self.param_groups[0]
        loss = adamw_step_(
            shard.param.detach(), shard.grad, shard.state["exp_avg"], shard.state["exp_avg_sq"],
            step=self.num_updates, lr=plan.lr, betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
            **self._penalty_arguments(shard, penalties[0] if penalties else None),
            ema=shard.state["ema"] if plan.ema_decay is not None else None, ema_decay=plan.ema_decay,
            clip_coef=clip, segments=shard.segments,
        )  # fmt: skip
        return losses if loss is None else [*losses, loss]

    def _penalty_arguments(self, shard: Shard, penalty: Penalty | None) -> dict:
        if penalty is None:
            return {}
        fisher = shard.state[penalty.fisher] if penalty.fisher else None
        return dict(anchor=shard.state[penalty.anchor], fisher=fisher, strength=self._strength(penalty), proximal=penalty.proximal)

    def _add_penalty(self, shard: Shard, penalty: Penalty) -> torch.Tensor:
        fisher = shard.state[penalty.fisher] if penalty.fisher else None
        return fisher_penalty_(shard.grad, shard.param.detach(), shard.state[penalty.anchor], fisher, self._strength(penalty))

    def _strength(self, penalty: Penalty) -> float:
        return penalty.strength / self.fisher_means[penalty.fisher] if penalty.fisher else penalty.strength


def _decay_segments(shard_map, weight_decay: float) -> list[tuple | None]:
    """Segments of each flat: norms and biases (fewer than two dimensions) are not decayed."""
    if weight_decay == 0.0:
        return [None] * len(shard_map.flats)
    stretches: list[list[tuple[int, float]]] = [[] for _ in shard_map.flats]
    for fragment in shard_map.fragments:
        decay = weight_decay if len(shard_map.shapes[fragment.name]) >= 2 else 0.0
        known = stretches[fragment.flat]
        if not known or known[-1][1] != decay:
            known.append((fragment.start if known else 0, decay))
    return [_segment_table(known, flat.numel()) for known, flat in zip(stretches, shard_map.flats, strict=True)]


def _segment_table(stretches: list[tuple[int, float]], numel: int) -> tuple | None:
    if not stretches:
        return None
    return [start for start, _ in stretches] + [numel], None, [decay for _, decay in stretches]
