"""Segments of the flat shards that have a weight decay or a penalty strength of their own."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch

from safecl.engine.zero.shards import ShardMap
from safecl.kernels import Segments

Values = tuple[float, float]
"""(strength, decay) of a segment."""


def segment_tables(
    shard_map: ShardMap,
    weight_decay: float,
    modules: tuple[str, ...] = (),
    factors: tuple[tuple[str, float], ...] = (),
) -> list[Segments | None]:
    """Segments of each flat; None where all elements have the same values.

    Norms and biases (fewer than two dimensions) are not decayed. With `modules` the strength is 1 where a parameter's
    name matches one of the patterns (shell wildcards, case-sensitive) and 0 elsewhere. `factors` multiply it, by name.
    """
    restricted, by_name = bool(modules or factors), dict(factors)
    if weight_decay == 0.0 and not restricted:
        return [None] * len(shard_map.flats)
    segments: list[list[tuple[int, Values]]] = [[] for _ in shard_map.flats]
    for fragment in shard_map.fragments:
        decay = weight_decay if len(shard_map.shapes[fragment.name]) >= 2 else 0.0
        is_pulled = not modules or any(fnmatchcase(fragment.name, pattern) for pattern in modules)
        strength = by_name.get(fragment.name, 1.0) if is_pulled and restricted else 0.0
        known = segments[fragment.flat]
        if not known or known[-1][1] != (strength, decay):
            known.append((fragment.start if known else 0, (strength, decay)))
    return [
        _table(known, flat.numel(), restricted, weight_decay > 0)
        for known, flat in zip(segments, shard_map.flats, strict=True)
    ]


def _table(segments: list[tuple[int, Values]], numel: int, restricted: bool, decayed: bool) -> Segments:
    segments = segments or [(0, (0.0, 0.0))]  # a rank may hold nothing but padding
    offsets = [*(start for start, _ in segments), numel]
    strength, decay = torch.tensor([values for _, values in segments]).unbind(1)
    return Segments(
        torch.tensor(offsets), strength.contiguous() if restricted else None, decay.contiguous() if decayed else None
    )


def matching(table: Segments) -> list[tuple[slice, float]]:
    """The segments with a strength, as slices of the flat, and the strength."""
    assert table.strength is not None, "a table of modules has strengths"
    bounds = zip(table.offsets.tolist(), table.offsets.tolist()[1:], table.strength.tolist(), strict=False)
    return [(slice(start, stop), strength) for start, stop, strength in bounds if strength > 0]
