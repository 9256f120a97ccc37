"""The replay memory: a buffer that is sharded over ranks and the same for any number of them, and the cache of teacher
outputs."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "BufferInUse": "files.lock",
    "CacheHeader": "cache",
    "CacheReader": "cache",
    "CacheWriter": "cache",
    "HiddenOutputs": "rows",
    "InsertReport": "insertion",
    "LogitsOutputs": "rows",
    "MemoryRow": "rows",
    "Prefetcher": "prefetch",
    "ReplayBuffer": "buffer",
    "ReplayError": "rows",
    "SharedOutputs": "cache",
    "TeacherOutputs": "rows",
    "pinned": "prefetch",
    "stack_outputs": "prefetch",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'safecl.replay' has no attribute {name!r}")
    return getattr(importlib.import_module(f"safecl.replay.{_HOMES[name]}"), name)
