"""Training rows: file formats, chat templates, loss masks, packing, and the order of examples.

Names are imported on first use. Reading and checking rows then needs neither torch nor transformers, so that a wrong
file is reported at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safecl.data.assignment import assign as assign
    from safecl.data.batches import MicroBatch as MicroBatch
    from safecl.data.batches import collate as collate
    from safecl.data.display import decode_marked as decode_marked
    from safecl.data.display import describe as describe
    from safecl.data.messages import ChatRow as ChatRow
    from safecl.data.messages import DataError as DataError
    from safecl.data.messages import Message as Message
    from safecl.data.order import TaskOrder as TaskOrder
    from safecl.data.order import resolve_tokens_per_batch as resolve_tokens_per_batch
    from safecl.data.prepare import mix_poison as mix_poison
    from safecl.data.prepare import prepare_dataset as prepare_dataset
    from safecl.data.reading.rows import BadRows as BadRows
    from safecl.data.reading.rows import Prompt as Prompt
    from safecl.data.reading.rows import read_prompts as read_prompts
    from safecl.data.reading.rows import read_rows as read_rows
    from safecl.data.templates.chat import load_tokenizer as load_tokenizer
    from safecl.data.templates.chat import prompt_ids as prompt_ids
    from safecl.data.templates.chat import stop_ids as stop_ids
    from safecl.data.templates.chat import template_source as template_source
    from safecl.data.templates.masks import tokenize_row as tokenize_row
    from safecl.data.tokens import Row as Row
    from safecl.data.tokens import TokenDataset as TokenDataset
    from safecl.data.tokens import concat as concat

_HOMES = {
    "BadRows": "reading.rows",
    "ChatRow": "messages",
    "DataError": "messages",
    "Message": "messages",
    "MicroBatch": "batches",
    "Prompt": "reading.rows",
    "Row": "tokens",
    "TaskOrder": "order",
    "TokenDataset": "tokens",
    "assign": "assignment",
    "collate": "batches",
    "concat": "tokens",
    "decode_marked": "display",
    "describe": "display",
    "load_tokenizer": "templates.chat",
    "mix_poison": "prepare",
    "prepare_dataset": "prepare",
    "prompt_ids": "templates.chat",
    "read_prompts": "reading.rows",
    "read_rows": "reading.rows",
    "resolve_tokens_per_batch": "order",
    "stop_ids": "templates.chat",
    "template_source": "templates.chat",
    "tokenize_row": "templates.masks",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'safecl.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"safecl.data.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
