"""safecl: continual fine-tuning of large language models that keeps their safety alignment."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public names are imported on first use, so that `import safecl` (and with it the command line) does not wait for
# torch.
_HOMES = {
    "load_config": "safecl.config",
    "RunConfig": "safecl.config",
    "ConfigError": "safecl.config",
    "Trainer": "safecl.training.trainer",
    "RunResult": "safecl.training.trainer",
    "ShardAdamW": "safecl.engine.zero.optimizer",
    "ShardMap": "safecl.engine.zero.shards",
    "UpdatePlan": "safecl.engine.zero.update",
    "ReplayBuffer": "safecl.replay",
    "ReferenceStore": "safecl.engine.reference.store",
    "Method": "safecl.methods.base",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'safecl' has no attribute {name!r}")
