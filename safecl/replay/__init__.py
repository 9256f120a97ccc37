"""The replay memory: a buffer sharded over ranks, the same for any number of them, and the cache of teacher outputs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safecl.replay.buffer import ReplayBuffer as ReplayBuffer
    from safecl.replay.cache import CacheHeader as CacheHeader
    from safecl.replay.cache import CacheReader as CacheReader
    from safecl.replay.cache import CacheWriter as CacheWriter
    from safecl.replay.cache import SharedOutputs as SharedOutputs
    from safecl.replay.files.lock import BufferInUse as BufferInUse
    from safecl.replay.insertion import InsertReport as InsertReport
    from safecl.replay.prefetch import Prefetcher as Prefetcher
    from safecl.replay.prefetch import pinned as pinned
    from safecl.replay.rows import MemoryRow as MemoryRow
    from safecl.replay.rows import ReplayError as ReplayError
    from safecl.replay.rows import TeacherOutputs as TeacherOutputs

_HOMES = {
    "BufferInUse": "files.lock",
    "CacheHeader": "cache",
    "CacheReader": "cache",
    "CacheWriter": "cache",
    "InsertReport": "insertion",
    "MemoryRow": "rows",
    "Prefetcher": "prefetch",
    "ReplayBuffer": "buffer",
    "ReplayError": "rows",
    "SharedOutputs": "cache",
    "TeacherOutputs": "rows",
    "pinned": "prefetch",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'safecl.replay' has no attribute {name!r}")
    return getattr(importlib.import_module(f"safecl.replay.{_HOMES[name]}"), name)
