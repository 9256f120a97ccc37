"""Segments of the flat shards with strengths or decay of their own."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch

from safecl.kernels import Segments


def segment_tables(shard_map, weight_decay: float, modules: tuple[str, ...] = ()) -> list[Segments | None]:
    """Segments of each flat, None where all elements are alike.

    Norms and biases (fewer than two dimensions) are not decayed; with `modules` the strength is 1 where a parameter's
    name matches one of the patterns (shell wildcards, case-sensitive) and 0 elsewhere.
    """
    if weight_decay == 0.0 and not modules:
        return [None] * len(shard_map.flats)
    stretches: list[list[tuple[int, tuple[float, float]]]] = [[] for _ in shard_map.flats]
    for fragment in shard_map.fragments:
        decay = weight_decay if len(shard_map.shapes[fragment.name]) >= 2 else 0.0
        strength = float(any(fnmatchcase(fragment.name, pattern) for pattern in modules))
        known = stretches[fragment.flat]
        if not known or known[-1][1] != (strength, decay):
            known.append((fragment.start if known else 0, (strength, decay)))
    return [
        _table(known, flat.numel(), bool(modules), weight_decay > 0)
        for known, flat in zip(stretches, shard_map.flats, strict=True)
    ]


def _table(
    stretches: list[tuple[int, tuple[float, float]]], numel: int, restricted: bool, decayed: bool
) -> Segments | None:
    stretches = stretches or [(0, (0.0, 0.0))]  # a rank may hold nothing but padding
    offsets = [*(start for start, _ in stretches), numel]
    strength, decay = torch.tensor([values for _, values in stretches]).unbind(1)
    return Segments(
        torch.tensor(offsets), strength.contiguous() if restricted else None, decay.contiguous() if decayed else None
    )


def matching(table: Segments) -> list[slice]:
    bounds = zip(table.offsets.tolist(), table.offsets.tolist()[1:], table.strength.tolist(), strict=False)
    return [slice(start, stop) for start, stop, strength in bounds if strength > 0]
