"""ShardAdamW: the optimizer that DeepSpeed calls with this rank's flat fp32 shards, and the one place where weights
change.

Order inside a step: gradient transforms -> norm -> clip coefficient -> penalty at the old weights -> moments ->
decoupled decay -> update -> EMA of the new weights -> work on the new weights. State (`exp_avg`, `exp_avg_sq`, `ema`,
`fisher`, `anchor`, ...) has the layout of the shard that it belongs to and moves nowhere, so it costs no communication
in any ZeRO stage.

DeepSpeed calls `step()` also for passes that do not update, and once inside `initialize`: `action` says what the next
call does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from safecl.engine.zero.pieces import Piece, Served
from safecl.engine.zero.placement import Placement, allocate
from safecl.engine.zero.segments import matching, segment_tables
from safecl.engine.zero.shard import Shard
from safecl.kernels import Segments, adamw_step_, fisher_penalty_, penalized_grad_norm
from safecl.methods.terms import AverageMask, Penalty

if TYPE_CHECKING:
    from safecl.engine.reference.store import ReferenceStore


@dataclass
class UpdatePlan:
    """What one update does, decided by the trainer before the step."""

    lr: float
    clip_norm: float = 0.0
    clip_scope: str = "task"
    penalties: Sequence[Penalty] = ()
    ema_decay: float | None = None
    ema_mask: AverageMask | None = None
    transforms: Sequence[Callable[[list[Shard]], None]] = ()
    after_update: Sequence[Callable[[list[Shard]], None]] = ()


@dataclass
class UpdateResult:
    """What one update saw; `applied` is False where it was skipped.

    grad_norm: global norm before clipping, 0-dim fp32. penalty: this shard's part of the penalty loss, 0-dim fp32, None
    without one; the parts are added up with the step's other losses, so that a penalty costs no collective of its own.
    """

    applied: bool = False
    grad_norm: torch.Tensor | None = None
    penalty: torch.Tensor | None = None


class ShardAdamW(torch.optim.Optimizer):
    """AdamW with EMA, Fisher penalty and clipping in one pass over the shard, for
    `deepspeed.initialize(optimizer=...)`.

    Args: `params`, one group; `betas`, `eps`, `weight_decay` as in torch.optim.AdamW.
    After initialize, call `bind(shard_map)` once; then set `action` (see `update`) before each `engine.step()`.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        assert len(self.param_groups) == 1, "one parameter group; differences inside it are segments of the flat shard"
        self.action: Callable[[list[Shard]], None] | None = None
        self.result = UpdateResult()
        self.num_updates = 0
        self.fisher_means: dict[str, float] = {}
        """Mean over all weights of each kind of Fisher; a penalty's strength is divided by it."""
        self.equal_base: set[str] = set()
        """Kinds of state that are the weights with which the run began: a checkpoint names that model instead of
        storing them."""
        self.placement = Placement()
        """Where state lives; set it before `bind`."""
        self.store: ReferenceStore | None = None
        """The weights with which the run begins; an anchor that equals them is read from here where
        `placement.reference` is cpu."""
        self._shard_map = None

    def bind(self, shard_map) -> None:
        """Connects the optimizer with the layout of its shards."""
        self._shard_map = shard_map
        tables = self._tables()
        self._shards = [
            Shard(flat, self.state[flat], table, self.placement)
            for flat, table in zip(shard_map.flats, tables, strict=True)
        ]
        self._fragments = [
            [fragment for fragment in shard_map.fragments if fragment.flat == i] for i in range(len(shard_map.flats))
        ]
        self._restricted: dict[tuple[str, ...], list[Segments | None]] = {}

    def _tables(self, modules: tuple[str, ...] = ()) -> list[Segments | None]:
        return segment_tables(self._shard_map, self.param_groups[0]["weight_decay"], modules)

    def _restriction(self, shard: Shard, modules: tuple[str, ...]) -> Segments:
        """Segments of the shard with strength 1 where a parameter's name matches and 0 elsewhere."""
        if modules not in self._restricted:
            self._restricted[modules] = self._tables(modules)
        return next(
            table for known, table in zip(self._shards, self._restricted[modules], strict=True) if known is shard
        )

    def shards(self) -> list[Shard]:
        """All flat shards of this rank with their state; usable outside of steps as well."""
        for shard in self._shards:
            shard.stream.settle()
        return self._shards

    def tensors(self, kind: str) -> list[torch.Tensor]:
        """State of one kind over all shards, in the order of the shard map's flats; copies of what the reference store
        serves."""
        return [
            self._copy_of_served(shard, kind) if kind in shard.served else shard.state[kind] for shard in self.shards()
        ]

    @staticmethod
    def _copy_of_served(shard: Shard, kind: str) -> torch.Tensor:
        served = shard.served[kind]
        copy = torch.empty(shard.param.shape, dtype=served.store.dtype, device=shard.param.device)
        served.copy_to(copy.view(-1), 0)
        return copy

    def has(self, kind: str) -> bool:
        return bool(self._shards) and (kind in self._shards[0].state or kind in self._shards[0].served)

    @property
    def reads_store(self) -> bool:
        """True where state of some kind is served by the reference store."""
        return any(shard.served for shard in self._shards)

    def dtype_of(self, kind: str) -> torch.dtype:
        shard = self._shards[0]
        return shard.served[kind].store.dtype if kind in shard.served else shard.state[kind].dtype

    def drop(self, kind: str) -> None:
        """Forgets the state `kind`."""
        self.equal_base.discard(kind)
        for shard in self._shards:
            shard.state.pop(kind, None)
            shard.served.pop(kind, None)

    def new_state(self, kind: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        """Makes the state `kind` zeros of the shards' layout, and returns its tensors."""
        self.drop(kind)
        for shard in self._shards:
            shard.state[kind] = allocate(shard.param, dtype, self.placement.of(kind))
        return self.tensors(kind)

    @torch.no_grad()
    def copy_weights_to(self, kind: str, dtype: torch.dtype = torch.float32) -> None:
        """Makes the state `kind` a copy of the current master weights."""
        if not self.has(kind) or any(
            kind in shard.served or shard.state[kind].dtype != dtype for shard in self._shards
        ):
            self.new_state(kind, dtype)
        self.equal_base.discard(kind)
        for state, shard in zip(self.tensors(kind), self._shards, strict=True):
            state.copy_(shard.param)

    def take_base(self, kind: str, dtype: torch.dtype = torch.float32) -> None:
        """Makes the state `kind` the weights with which the run began, which must still be the current ones.

        They are not copied where the reference store holds them and anchors live on the CPU; then they have the store's
        dtype.
        """
        if self._is_served():
            self.drop(kind)
            for index, shard in enumerate(self._shards):
                shard.served[kind] = Served(self.store, self._fragments[index])
        else:
            self.copy_weights_to(kind, dtype)
        self.equal_base.add(kind)

    def _is_served(self) -> bool:
        """With LoRA the store holds other weights than those that are trained."""
        if self.store is None or self.placement.reference != "cpu":
            return False
        return self._shard_map.shapes.keys() <= set(self.store.names())

    def reset_moments(self) -> None:
        """A new task starts AdamW afresh."""
        self.num_updates = 0
        for shard in self._shards:
            for kind in ("exp_avg", "exp_avg_sq"):
                shard.state.pop(kind, None)

    @torch.no_grad()
    def step(self, closure=None):
        """Called by DeepSpeed with reduced, unscaled gradients. Does what `action` says, once; nothing where no action
        is set."""
        action, self.action = self.action, None
        if action is not None:  # DeepSpeed's stage 0 in bf16 steps once inside initialize, with zero gradients
            action([shard for shard in self._shards if shard.grad is not None])

    # ----------------------------------------------------------------------------------------------------------- update

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
        """Global gradient norm, 0-dim fp32; DeepSpeed's where it has one, else taken here (always with `fresh`)."""
        known = None if fresh else self._shard_map.grad_norm()
        return known if known is not None else self._norm_and_penalty(shards, None)[0]

    def _norm_and_penalty(self, shards: list[Shard], penalty: Penalty | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Global norm of the gradient with the penalty's gradient in it (one small all-reduce), and this shard's part
        of the penalty."""
        squares, loss = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for shard, piece in _pieces(shards, _kinds_of(penalty)):
            arguments = {
                key: value for key, value in self._penalty_arguments(shard, piece, penalty).items() if key != "proximal"
            }
            more = penalized_grad_norm(_flat(shard.grad, piece), _flat(shard.param, piece), **arguments)
            squares, loss = squares.to(more[0].device) + more[0], loss.to(more[1].device) + more[1]
        return self._shard_map.reduce_sum(squares).sqrt().float(), loss.float()

    def _update(self, shards: list[Shard], plan: UpdatePlan, norm: torch.Tensor) -> None:
        """Clip coefficient, then one pass over each shard. One penalty fits into the pass; further ones join the
        gradient before it."""
        self.num_updates += 1
        first, *others = _in_the_pass(plan)
        if plan.clip_scope == "total" and plan.penalties:
            losses = self._add_penalties(shards, others)
            norm, loss = self._norm_and_penalty(shards, first)
            clip = _clip_coefficient(plan, norm)
            for shard in shards:
                self._step_shard(shard, plan, clip, first, factor=clip)
            self.result.penalty = sum(losses, loss)
            return
        clip = _clip_coefficient(plan, norm)
        if others and clip is not None:  # these penalties join a gradient that is clipped already
            for shard in shards:
                shard.grad.mul_(clip)
            clip = None
        losses = self._add_penalties(shards, others)
        losses += [loss for shard in shards for loss in self._step_shard(shard, plan, clip, first)]
        self.result.penalty = (
            sum((loss for loss in losses if loss is not None), torch.zeros(())) if plan.penalties else None
        )

    def _add_penalties(self, shards: list[Shard], penalties: Sequence[Penalty]) -> list[torch.Tensor]:
        return [self._add_penalty(shard, penalty) for shard in shards for penalty in penalties]

    def _step_shard(
        self,
        shard: Shard,
        plan: UpdatePlan,
        clip: torch.Tensor | None,
        penalty: Penalty | None,
        factor: torch.Tensor | None = None,
    ) -> list[torch.Tensor | None]:
        """AdamW over the shard, piece by piece; the pieces' penalty losses."""
        for kind in ("exp_avg", "exp_avg_sq"):
            if kind not in shard.state:
                shard.state[kind] = torch.zeros_like(shard.param)
        shard.settle_pages()
        average = ["ema"] if plan.ema_decay is not None else []
        group = self.param_groups[0]
        hyper = {key: group[key] for key in ("betas", "eps", "weight_decay")} | {
            "step": self.num_updates,
            "lr": plan.lr,
        }
        hyper |= {"clip_coef": None if clip is None else clip.to(shard.param.device), "ema_decay": plan.ema_decay}
        mask = plan.ema_mask
        if mask is not None:
            hyper |= {"ema_threshold": mask.threshold, "ema_decay_above": mask.decay}
        losses, kinds = [], dict.fromkeys([*_kinds_of(penalty), *average, *([mask.fisher] if mask is not None else [])])
        for piece in shard.pieces(list(kinds), written=average):
            tensors = [
                _flat(tensor, piece)
                for tensor in (shard.param, shard.grad, shard.state["exp_avg"], shard.state["exp_avg_sq"])
            ]
            state = {"segments": _cut(shard.segments, piece), "ema": piece.state["ema"] if average else None}
            state |= {"fisher": piece.state[mask.fisher]} if mask is not None else {}
            losses.append(
                adamw_step_(*tensors, **hyper, **(state | self._penalty_arguments(shard, piece, penalty, factor)))
            )
        return losses

    def _penalty_arguments(
        self, shard: Shard, piece: Piece, penalty: Penalty | None, factor: torch.Tensor | None = None
    ) -> dict:
        """Arguments of the kernels; `factor` scales the penalty's gradient where it is clipped together with the
        loss's."""
        if penalty is None:
            return {}
        fisher = piece.state[penalty.fisher] if penalty.fisher else None
        strength = self._strength(penalty) if factor is None else self._strength(penalty) * factor
        arguments = dict(
            anchor=piece.state[penalty.anchor], fisher=fisher, strength=strength, proximal=penalty.proximal
        )
        if penalty.modules:
            table = _cut(self._restriction(shard, penalty.modules), piece)
            device = strength.device if isinstance(strength, torch.Tensor) else table.strength.device
            arguments["segments"] = table._replace(strength=table.strength.to(device) * strength)
        return arguments

    def _add_penalty(self, shard: Shard, penalty: Penalty) -> torch.Tensor:
        stretches = (
            matching(self._restriction(shard, penalty.modules)) if penalty.modules else [slice(0, shard.param.numel())]
        )
        losses = []
        for piece in shard.pieces(_kinds_of(penalty)):
            for stretch in stretches:
                low, high = max(stretch.start, piece.where.start), min(stretch.stop, piece.where.stop)
                if low < high:
                    here = slice(low - piece.where.start, high - piece.where.start)
                    fisher = piece.state[penalty.fisher][here] if penalty.fisher else None
                    tensors = [tensor.detach().view(-1)[low:high] for tensor in (shard.grad, shard.param)]
                    losses.append(
                        fisher_penalty_(*tensors, piece.state[penalty.anchor][here], fisher, self._strength(penalty))
                    )
        return sum(losses, torch.zeros((), device=shard.param.device))

    def _strength(self, penalty: Penalty) -> float:
        return penalty.strength / self.fisher_means.get(penalty.fisher, 1.0) if penalty.fisher else penalty.strength


def _in_the_pass(plan: UpdatePlan) -> list[Penalty | None]:
    """The penalties, that of the fused pass first. The pass holds one Fisher: beside a masked average, a penalty with
    another comes before it."""
    if plan.ema_mask is None:
        return list(plan.penalties) or [None]
    fitting = [penalty for penalty in plan.penalties if penalty.fisher == plan.ema_mask.fisher]
    return [*(fitting or [None]), *(penalty for penalty in plan.penalties if penalty not in fitting)]


def _kinds_of(penalty: Penalty | None) -> list[str]:
    return [kind for kind in (penalty.anchor, penalty.fisher) if kind is not None] if penalty is not None else []


def _pieces(shards: list[Shard], kinds: Sequence[str]) -> Iterator[tuple[Shard, Piece]]:
    return ((shard, piece) for shard in shards for piece in shard.pieces(kinds))


def _flat(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    return tensor.detach().view(-1)[piece.where]


def _cut(table: Segments | None, piece: Piece) -> Segments | None:
    return None if table is None else table.slice(piece.where.start, piece.where.stop)


def _clip_coefficient(plan: UpdatePlan, norm: torch.Tensor) -> torch.Tensor | None:
    return torch.clamp(plan.clip_norm / (norm + 1e-6), max=1.0) if plan.clip_norm > 0 else None
