"""Merging: arithmetic on checkpoints, folders in and a folder out, one tensor at a time.

`merge` does it, `kinds` lists what there is. A kind of merge is one file in a family folder; docs/architecture.md says
how one is added. Importing this package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "merge": "safecl.merging.run",
    "sweep": "safecl.merging.sweeps",
    "greedy_soup": "safecl.merging.greedy",
    "SweepReport": "safecl.merging.sweeps",
    "MergeReport": "safecl.merging.report",
    "kinds": "safecl.merging.registry",
    "Merge": "safecl.merging.base",
    "MergeConfig": "safecl.merging.base",
    "Models": "safecl.merging.base",
    "Needs": "safecl.merging.base",
    "Tensors": "safecl.merging.base",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'safecl.merging' has no attribute {name!r}")
