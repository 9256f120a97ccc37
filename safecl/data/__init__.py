"""Training rows: file formats, chat templates, loss masks, packing, and the order of examples.

Names are imported on first use. Reading and checking rows then needs neither torch nor transformers, so that a wrong
file is reported at once.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "BadRows": "rows",
    "ChatRow": "formats",
    "DataError": "formats",
    "Message": "formats",
    "MicroBatch": "batches",
    "Prompt": "rows",
    "Row": "tokens",
    "TaskOrder": "order",
    "TokenDataset": "tokens",
    "assign": "microbatches",
    "collate": "batches",
    "concat": "tokens",
    "decode_marked": "display",
    "describe": "display",
    "load_tokenizer": "chat",
    "mix_poison": "prepare",
    "prepare_dataset": "prepare",
    "prompt_ids": "chat",
    "read_prompts": "rows",
    "read_rows": "rows",
    "resolve_tokens_per_batch": "order",
    "stop_ids": "chat",
    "template_source": "chat",
    "tokenize_row": "masks",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'safecl.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"safecl.data.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
