"""Screens an upload before training, by the aligned model's own refusals and for near-duplicates of evaluation prompts
and of the memory's refused prompts."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safecl.scan.duplicates import find_duplicates as find_duplicates
    from safecl.scan.refusals import Refusals as Refusals
    from safecl.scan.refusals import own_refusals as own_refusals
    from safecl.scan.scores import refusal_scores as refusal_scores
    from safecl.scan.screening import Screening as Screening
    from safecl.scan.screening import UploadRefused as UploadRefused
    from safecl.scan.screening import screen_tasks as screen_tasks
    from safecl.scan.threshold import Threshold as Threshold
    from safecl.scan.threshold import threshold_from_benign as threshold_from_benign
    from safecl.scan.threshold import threshold_from_upload as threshold_from_upload

_HOMES = {
    "Refusals": "refusals",
    "Screening": "screening",
    "Threshold": "threshold",
    "UploadRefused": "screening",
    "find_duplicates": "duplicates",
    "own_refusals": "refusals",
    "refusal_scores": "scores",
    "screen_tasks": "screening",
    "threshold_from_benign": "threshold",
    "threshold_from_upload": "threshold",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'safecl.scan' has no attribute {name!r}")
    return getattr(importlib.import_module(f"safecl.scan.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
