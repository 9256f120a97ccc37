"""safecl: continual fine-tuning of large language models that keeps their safety alignment."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public names are imported on first use, so that `import safecl` (and with it the command line) does not wait for torch.
_HOMES = {
    "load_config": "safecl.config",
    "RunConfig": "safecl.config",
    "ConfigError": "safecl.config",
    "Trainer": "safecl.engine.trainer",
    "RunResult": "safecl.engine.trainer",
    "ShardAdamW": "safecl.engine.optimizer",
    "ShardMap": "safecl.engine.shards",
    "UpdatePlan": "safecl.engine.optimizer",
    "ReplayBuffer": "safecl.replay",
    "ReferenceStore": "safecl.engine.reference",
    "Method": "safecl.methods.base",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'safecl' has no attribute {name!r}")
