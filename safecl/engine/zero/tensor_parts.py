"""Trained tensors inside the shards: their parts on this rank, sums over tensors and their rows, and noise that no
layout changes.

A shard cuts through tensors, so what concerns one tensor is done on its parts. Sums over a tensor are formed on each
rank in fp64 and added up in one all-reduce.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from safecl.engine.zero.shards import ShardMap
from safecl.methods import context
from safecl.methods.context import TensorPart

CHUNK = 1 << 24
"""Elements that are worked on at once."""


def parts_of(
    shard_map: ShardMap, all_shards: Sequence[context.Shard], shards: Sequence[context.Shard]
) -> Iterator[TensorPart]:
    """Yield the parts in `shards`, which are some of `all_shards` (in the order of the shard map's flats)."""
    numbers = {name: number for number, name in enumerate(shard_map.shapes)}
    chosen = {id(shard) for shard in shards}
    for fragment in shard_map.fragments:
        shard = all_shards[fragment.flat]
        if id(shard) in chosen:
            yield TensorPart(
                numbers[fragment.name],
                fragment.name,
                shard_map.shapes[fragment.name],
                shard,
                slice(fragment.start, fragment.start + fragment.length),
                fragment.offset,
            )


def dots(
    shard_map: ShardMap,
    shards: Sequence[context.Shard],
    pairs: Sequence[tuple[context.Quantity, context.Quantity]],
) -> torch.Tensor:
    """Dot products of pairs of quantities over all weights, fp64 [pairs]."""
    local = torch.zeros(len(pairs), dtype=torch.float64)
    for shard in shards:
        local += torch.stack([flat_dot(a(shard), b(shard)).cpu() for a, b in pairs])
    return shard_map.reduce_sum(local)


def dots_per_tensor(
    shard_map: ShardMap,
    parts: Sequence[TensorPart],
    pairs: Sequence[tuple[context.Quantity, context.Quantity]],
) -> torch.Tensor:
    """Dot products of pairs of quantities over each tensor, fp64 [pairs, tensors]."""
    local = torch.zeros(len(pairs), len(shard_map.shapes), dtype=torch.float64)
    for own in _by_shard(parts):
        for row, (a, b) in zip(local, pairs, strict=True):
            left, right = a(own[0].shard).detach().view(-1), b(own[0].shard).detach().view(-1)
            for part in own:
                row[part.number] += flat_dot(left[part.where], right[part.where]).cpu()
    return shard_map.reduce_sum(local)


def _by_shard(parts: Sequence[TensorPart]) -> list[list[TensorPart]]:
    found: dict[int, list[TensorPart]] = {}
    for part in parts:
        found.setdefault(id(part.shard), []).append(part)
    return list(found.values())


def dots_per_row(
    shard_map: ShardMap,
    parts: Sequence[TensorPart],
    pairs: Sequence[tuple[context.Quantity, context.Quantity]],
) -> list[torch.Tensor]:
    """Dot products of pairs of quantities over each row of each tensor: for each tensor fp64 [pairs, rows]. A row is
    all that has the same first index; a vector is one row."""
    num_rows = [shape[0] if len(shape) > 1 else 1 for shape in shard_map.shapes.values()]
    widths = [math.prod(shape) // max(rows, 1) for shape, rows in zip(shard_map.shapes.values(), num_rows, strict=True)]
    local = [torch.zeros(len(pairs), rows, dtype=torch.float64) for rows in num_rows]
    for own in _by_shard(parts):
        for place, (a, b) in enumerate(pairs):
            left, right = a(own[0].shard).detach().view(-1), b(own[0].shard).detach().view(-1)
            for part in own:
                first, width = part.offset // widths[part.number], widths[part.number]
                sums = _row_dots(left[part.where], right[part.where], part.offset % width, width).cpu()
                local[part.number][place, first : first + len(sums)] += sums
    return list(shard_map.reduce_sum(torch.cat(local, dim=1)).split(num_rows, dim=1))


def _row_dots(a: torch.Tensor, b: torch.Tensor, lead: int, width: int) -> torch.Tensor:
    """Dot products of consecutive rows of a part, fp64 [rows]. lead: elements of the first row that lie before it."""
    rows_at_once = max(1, CHUNK // width) * width
    sums, begin = [], 0
    while begin < len(a):
        end = min(begin + rows_at_once - lead, len(a))
        products = a[begin:end].double() * b[begin:end].double()
        sums.append(F.pad(products, (lead, -(lead + end - begin) % width)).view(-1, width).sum(1))
        begin, lead = end, 0
    return torch.cat(sums) if sums else a.new_zeros(0, dtype=torch.float64)


def flat_dot(a: torch.Tensor, b: torch.Tensor, chunk: int = CHUNK) -> torch.Tensor:
    """Dot product in fp64, 0-dim: fp32 sums over a whole model are too coarse for projections."""
    pairs = zip(a.reshape(-1).split(chunk), b.reshape(-1).split(chunk), strict=True)
    return sum((x.double() @ y.double() for x, y in pairs), torch.zeros((), dtype=torch.float64, device=a.device))


# --------------------------------------------------------------------------------------------------------------- noise


def normal_noise(part: TensorPart, *key: Any) -> torch.Tensor:
    """Standard normal values, fp32 [elements of the part], as a function of the key, the tensor's name and the place of
    each element in it.

    Two 32-bit halves of a hash are the uniform numbers of the Box-Muller transform. The hash is that of
    safecl.data.order.keyed_hash.
    """
    device, stop = part.shard.param.device, part.offset + part.where.stop - part.where.start
    found = []
    for begin in range(part.offset, stop, CHUNK):
        bits = _hash(torch.arange(begin, min(begin + CHUNK, stop), device=device), *key, part.name)
        first, second = _shifted(bits, 32), bits & 0xFFFFFFFF
        radius = (-2.0 * ((first.double() + 0.5) / 2**32).log()).sqrt()
        found.append((radius * (second.double() * (2 * math.pi / 2**32)).cos()).float())
    return torch.cat(found) if found else torch.zeros(0, device=device)


def _hash(numbers: torch.Tensor, *key: Any) -> torch.Tensor:
    salt = hashlib.blake2b(":".join(map(str, key)).encode(), digest_size=16).digest()
    low, high = (int.from_bytes(half, "little", signed=True) for half in (salt[:8], salt[8:]))
    return _mix(_mix(numbers ^ low) ^ high)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64; int64 products wrap around as unsigned ones do."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shifted(x, shift)) * (factor - 2**64)
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """Shift to the right as an unsigned number."""
    return (x >> by) & (2 ** (64 - by) - 1)
