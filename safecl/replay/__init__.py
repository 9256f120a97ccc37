"""The replay memory: a buffer sharded over ranks, the same for any number of them, and the cache of teacher outputs."""

from __future__ import annotations

import importlib
from typing import Any

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
