"""ShardAdamW: the optimizer that DeepSpeed calls with this rank's flat fp32 shards, and the one place where weights
change.

Order inside a step: gradient transforms -> norm -> clip coefficient -> penalty at the old weights -> moments ->
decoupled decay -> update -> transforms of the step -> EMA of the new weights -> work on the new weights. An EMA in host
memory may follow after the step (safecl.engine.zero.update.AveragePlace). State
(`exp_avg`, `exp_avg_sq`, `ema`, `fisher`, `anchor`, ...) has the layout of its shard and stays on the shard's rank, so
it needs no communication in any ZeRO stage.

DeepSpeed also calls `step()` for passes that do not update, and once inside `initialize`: `action` says what the next
call does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from safecl.engine.reference.store import ReferenceStore
from safecl.engine.zero.penalties import Penalties, Restrictions
from safecl.engine.zero.pieces import Served, Stream
from safecl.engine.zero.placement import StatePlacement, allocate
from safecl.engine.zero.segments import segment_tables
from safecl.engine.zero.shard import Action, Shard
from safecl.engine.zero.shards import ShardMap
from safecl.engine.zero.update import (
    AdamWSettings,
    AveragePlace,
    ShardUpdate,
    UpdatePlan,
    UpdateResult,
    average_,
    place_of_average,
)
from safecl.methods.base import BEFORE


class ShardAdamW(torch.optim.Optimizer):
    """AdamW with EMA, penalties and clipping in one pass over the shard, for `deepspeed.initialize(optimizer=...)`.

    Args: `params`, one group; `betas`, `eps`, `weight_decay` as in torch.optim.AdamW.
    After initialize, call `bind(shard_map)` once; then set `action` (see `update`) before each `engine.step()`.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        assert len(self.param_groups) == 1, "one parameter group; differences inside it are segments of the flat shard"
        self.action: Action | None = None
        self.result = UpdateResult()
        self.num_updates = 0
        self.fisher_means: dict[str, float] = {}
        """Mean over all weights of each kind of Fisher; a penalty's strength is divided by it."""
        self.equal_base: set[str] = set()
        """Kinds of state that equal the weights with which the run began. A checkpoint names that model instead of
        storing them."""
        self.placement = StatePlacement()
        """The place of each role of state; set it before `bind`."""
        self.store: ReferenceStore | None = None
        """The weights with which the run begins. An anchor that equals them is read from here where
        `placement.reference` is cpu."""

    def bind(self, shard_map: ShardMap) -> None:
        """Connect the optimizer with the layout of its shards."""
        decay = self.param_groups[0]["weight_decay"]
        tables = segment_tables(shard_map, decay)
        self._shard_map = shard_map
        longest = max(flat.numel() for flat in shard_map.flats)
        self._stream = Stream(shard_map.flats[0].device, longest)
        self._shards = [
            Shard(flat, self.state[flat], self._stream, table, self.placement)
            for flat, table in zip(shard_map.flats, tables, strict=True)
        ]
        self._fragments = [
            [fragment for fragment in shard_map.fragments if fragment.flat == i] for i in range(len(shard_map.flats))
        ]
        self._restrictions = Restrictions(shard_map, decay, self._shards)

    # ------------------------------------------------------------------------------------------------------------ state

    def shards(self) -> list[Shard]:
        """All flat shards of this rank with their state; also usable outside of steps, to change both."""
        self.settle()
        return self._shards

    def settle(self) -> None:
        """Return when all state is where it is kept, an average that still follows the last step included."""
        self._stream.settle()

    def tensors(self, kind: str) -> list[Tensor]:
        """State of one kind over all shards, in the order of the shard map's flats; copies where the reference store
        serves it."""
        return [
            shard.served[kind].copy_for(shard.param) if kind in shard.served else shard.state[kind]
            for shard in self.shards()
        ]

    def has(self, kind: str) -> bool:
        """True where the shards have state of this kind."""
        return bool(self._shards) and (kind in self._shards[0].state or kind in self._shards[0].served)

    @property
    def reads_store(self) -> bool:
        """True where the reference store serves state of some kind."""
        return any(shard.served for shard in self._shards)

    def dtype_of(self, kind: str) -> torch.dtype:
        shard = self._shards[0]
        return shard.served[kind].store.dtype if kind in shard.served else shard.state[kind].dtype

    def drop(self, kind: str) -> None:
        """Forget the state `kind`."""
        self.settle()
        self.equal_base.discard(kind)
        for shard in self._shards:
            shard.state.pop(kind, None)
            shard.served.pop(kind, None)

    def new_state(self, kind: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Make the state `kind` zeros of the shards' layout, and return its tensors."""
        self.drop(kind)
        for shard in self._shards:
            shard.state[kind] = allocate(shard.param, dtype, self.placement.of(kind))
        return self.tensors(kind)

    @torch.no_grad()
    def copy_weights_to(self, kind: str, dtype: torch.dtype = torch.float32) -> None:
        """Make the state `kind` a copy of the current master weights."""
        if not self.has(kind) or any(
            kind in shard.served or shard.state[kind].dtype != dtype for shard in self._shards
        ):
            self.new_state(kind, dtype)
        self.equal_base.discard(kind)
        for state, shard in zip(self.tensors(kind), self._shards, strict=True):
            state.copy_(shard.param)

    def take_base(self, kind: str, dtype: torch.dtype = torch.float32) -> None:
        """Make the state `kind` the weights with which the run began, which must still be the current ones.

        They are not copied where the reference store holds them and anchors are kept on the CPU; then they have the
        store's dtype.
        """
        if self.store is not None and self._can_serve(self.store):
            self.drop(kind)
            for shard, fragments in zip(self._shards, self._fragments, strict=True):
                shard.served[kind] = Served(self.store, fragments)
        else:
            self.copy_weights_to(kind, dtype)
        self.equal_base.add(kind)

    def _can_serve(self, store: ReferenceStore) -> bool:
        """True where the store has the trained weights (not with LoRA) and anchors are kept on the CPU."""
        return self.placement.reference == "cpu" and self._shard_map.shapes.keys() <= set(store.names())

    def reset_moments(self) -> None:
        """Start AdamW afresh, as a new task does."""
        self.num_updates = 0
        for shard in self._shards:
            for kind in ("exp_avg", "exp_avg_sq"):
                shard.state.pop(kind, None)

    # ----------------------------------------------------------------------------------------------------------- update

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # takes no closure
        """Do `action` once; do nothing where none is set. DeepSpeed calls this with reduced, unscaled gradients."""
        action, self.action = self.action, None
        if action is not None:  # DeepSpeed's stage 0 in bf16 steps once inside initialize, with zero gradients
            self._stream.join()
            action([shard for shard in self._shards if shard.has_grad])

    def update(self, plan: UpdatePlan) -> Action:
        """Return the action of an ordinary step."""

        def action(shards: list[Shard]) -> None:
            for transform in plan.transforms:
                transform(shards)
            norm = self.grad_norm(shards, fresh=bool(plan.transforms))
            self.result = UpdateResult(grad_norm=norm)
            if not self._shard_map.all_agree(bool(torch.isfinite(norm))):
                return
            self.num_updates += 1
            if plan.step_transforms:
                self.copy_weights_to(BEFORE)
            place = place_of_average(plan, shards)
            update = self._update(plan, place)
            self.result.penalty, self.result.nonfinite = update.run(shards, norm), update.nonfinite
            for transform in plan.step_transforms:
                transform(shards)
            if place == "after":
                average_(shards, plan)
            for work in plan.after_update:
                work(shards)
            if place == "aside":
                with self._stream.aside():
                    average_(shards, plan)
            self.result.applied = True

        return action

    def _update(self, plan: UpdatePlan, place: AveragePlace | None) -> ShardUpdate:
        group = self.param_groups[0]
        settings = AdamWSettings(betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"])
        nonfinite = torch.zeros((), dtype=torch.int64, device=self._shard_map.flats[0].device)
        penalties, reduce_sum = self._penalties(), self._shard_map.reduce_sum
        return ShardUpdate(plan, place == "pass", settings, self.num_updates, penalties, reduce_sum, nonfinite)

    def _penalties(self) -> Penalties:
        return Penalties(self._restrictions, self.fisher_means)

    def grad_norm(self, shards: list[Shard], fresh: bool = False) -> Tensor:
        """Global gradient norm, 0-dim fp32: DeepSpeed's where it has one, else computed here (always with `fresh`)."""
        known = None if fresh else self._shard_map.grad_norm()
        if known is not None:
            return known
        squares, _ = self._penalties().squared_norm(shards, None)
        return self._shard_map.reduce_sum(squares).sqrt().float()
