"""Penalties of the weights inside an update: 0.5 * strength * sum F (p - a)^2 at the old weights.

A penalty joins the update in one of two places:

    in the pass        the fused AdamW pass reads anchor and Fisher and adds the penalty's gradient; it has room for one
    before the pass    a pass of its own adds the penalty's gradient to the loss's gradient; there may be any number

Clipping (UpdatePlan.clip_scope) decides what happens first. `task`: the loss's gradient is clipped and the penalties
join it. `total`: all penalties join it and the sum is clipped; for the penalty in the pass, its strength is scaled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor

from safecl.engine.zero.pieces import Piece
from safecl.engine.zero.segments import matching, segment_tables
from safecl.engine.zero.shard import Shard
from safecl.engine.zero.shards import ShardMap
from safecl.kernels import Segments, fisher_penalty_, penalized_grad_norm
from safecl.methods.terms import AverageMask, Penalty


@dataclass(frozen=True)
class PenaltyPlaces:
    """The penalties of an update by the place where they join it."""

    in_pass: Penalty | None
    before_pass: Sequence[Penalty]


def place_penalties(penalties: Sequence[Penalty], mask: AverageMask | None) -> PenaltyPlaces:
    """Put the first penalty that fits into the fused pass, and all others before it.

    The pass reads one Fisher. Where a masked average reads it as well, only a penalty with the same Fisher fits.
    """
    fitting = [penalty for penalty in penalties if mask is None or penalty.fisher == mask.fisher]
    others = [penalty for penalty in penalties if penalty not in fitting]
    return PenaltyPlaces(fitting[0] if fitting else None, [*fitting[1:], *others])


class PenaltyArguments(TypedDict, total=False):
    """Arguments of adamw_step_ for the penalty in the pass."""

    anchor: Tensor
    fisher: Tensor | None
    strength: Tensor | float
    proximal: bool
    segments: Segments


Selection = tuple[tuple[str, ...], tuple[tuple[str, float], ...]]
"""A penalty's `modules` and `factors`."""


@dataclass
class Restrictions:
    """Segment tables of penalties whose strength is not the same everywhere: 1, or a weight's own factor, where a name
    matches, else 0."""

    shard_map: ShardMap
    weight_decay: float
    shards: Sequence[Shard]
    _tables: dict[Selection, list[Segments | None]] = field(default_factory=dict)

    def of(self, shard: Shard, penalty: Penalty) -> Segments:
        chosen = penalty.modules, penalty.factors
        if chosen not in self._tables:
            self._tables[chosen] = segment_tables(self.shard_map, self.weight_decay, *chosen)
        tables = zip(self.shards, self._tables[chosen], strict=True)
        found = next(table for known, table in tables if known is shard)
        assert found is not None, "there is a table for every shard where modules are given"
        return found


@dataclass(frozen=True)
class Penalties:
    """Evaluates penalties on the shards, in either place."""

    restrictions: Restrictions
    fisher_means: dict[str, float]
    """Mean of each kind of Fisher over all weights; it divides a penalty's strength."""

    def strength(self, penalty: Penalty) -> float:
        return penalty.strength / self.fisher_means.get(penalty.fisher, 1.0) if penalty.fisher else penalty.strength

    def pass_arguments(
        self, shard: Shard, piece: Piece, penalty: Penalty | None, scale: Tensor | None = None
    ) -> PenaltyArguments:
        """The penalty on one piece, for the kernel; `scale` clips its gradient together with the loss's."""
        if penalty is None:
            return {}
        own = self.strength(penalty)
        strength = own if scale is None else own * scale
        arguments = PenaltyArguments(
            anchor=piece.state[penalty.anchor],
            fisher=piece.state[penalty.fisher] if penalty.fisher else None,
            strength=strength,
            proximal=penalty.proximal,
        )
        if penalty.modules or penalty.factors:
            table = self.restrictions.of(shard, penalty).slice(piece.where.start, piece.where.stop)
            assert table.strength is not None
            factors = table.strength.to(strength.device) if isinstance(strength, Tensor) else table.strength
            arguments["segments"] = table._replace(strength=factors * strength)
        return arguments

    def add_gradients(self, shards: Sequence[Shard], penalties: Sequence[Penalty]) -> list[Tensor]:
        """Add the penalties' gradients to the shards' gradients; return the penalty losses, by shard and penalty."""
        return [self._add_gradient(shard, penalty) for shard in shards for penalty in penalties]

    def _add_gradient(self, shard: Shard, penalty: Penalty) -> Tensor:
        losses = []
        for piece, where, factor in self._restricted_pieces(shard, penalty):
            here = slice(where.start - piece.where.start, where.stop - piece.where.start)
            grad, param = (tensor.detach().view(-1)[where] for tensor in (shard.grad, shard.param))
            fisher = piece.state[penalty.fisher][here] if penalty.fisher else None
            losses.append(
                fisher_penalty_(grad, param, piece.state[penalty.anchor][here], fisher, factor * self.strength(penalty))
            )
        return sum(losses, torch.zeros((), device=shard.param.device))

    def _restricted_pieces(self, shard: Shard, penalty: Penalty) -> Iterator[tuple[Piece, slice, float]]:
        """(piece, slice of the shard, factor of the strength) of all elements that the penalty concerns."""
        wanted = [(slice(0, shard.param.numel()), 1.0)]
        if penalty.modules or penalty.factors:
            wanted = matching(self.restrictions.of(shard, penalty))
        for piece in shard.pieces(kinds_of(penalty)):
            for part, factor in wanted:
                low, high = max(part.start, piece.where.start), min(part.stop, piece.where.stop)
                if low < high:
                    yield piece, slice(low, high), factor

    def squared_norm(self, shards: Sequence[Shard], penalty: Penalty | None) -> tuple[Tensor, Tensor]:
        """(squared norm, penalty loss) of this rank's gradient with the penalty's gradient in it, 0-dim fp64.

        Nothing is written.
        """
        squares, loss = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for shard in shards:
            for piece in shard.pieces(kinds_of(penalty)):
                arguments: dict[str, Any] = {**self.pass_arguments(shard, piece, penalty)}
                arguments.pop("proximal", None)
                more_squares, more_loss = penalized_grad_norm(piece.of(shard.grad), piece.of(shard.param), **arguments)
                squares = squares.to(more_squares.device) + more_squares
                loss = loss.to(more_loss.device) + more_loss
        return squares, loss


def kinds_of(penalty: Penalty | None) -> list[str]:
    """The kinds of state that a penalty reads."""
    return [kind for kind in (penalty.anchor, penalty.fisher) if kind is not None] if penalty is not None else []
