"""The memory that merges take, and the sizes of the blocks in which they work. Imports no torch."""

from __future__ import annotations

PIECE_ELEMENTS = 2**20
"""fp32 elements of each model in one piece of a merge by rows: 4 MiB."""
READ_BYTES = 2**20
"""Bytes that are read, hashed and converted at a time: they stay in a core's cache."""
WRITE_BYTES = 2 * 2**20
"""Bytes that are rounded, hashed and written at a time."""
NUM_WAITING = 4
"""Blocks that are computed before the disk takes them."""
FREED_BYTES = 32 * 2**20
"""Freed buffers that the allocator may keep."""


def memory_bound(num_models: int, largest: int, by_rows: bool) -> int:
    """Return the bytes that a merge takes at most, besides the libraries.

    largest: number of elements of the largest tensor. Two of the largest tensors per model in fp32, or of the pieces of
    a merge by rows: one that is worked on and one that is read meanwhile; the blocks of reading and writing; and what
    the allocator keeps.
    """
    elements = min(largest, PIECE_ELEMENTS) if by_rows else largest
    blocks = num_models * READ_BYTES + (NUM_WAITING + 2) * WRITE_BYTES
    return 2 * num_models * 4 * elements + blocks + FREED_BYTES
