"""The folder of what safecl keeps between runs, $SAFECL_CACHE."""

from __future__ import annotations

import os
from pathlib import Path


def data_cache() -> Path:
    """Folder of prepared data: $SAFECL_CACHE/data, by default ~/.cache/safecl/data."""
    return Path(os.environ.get("SAFECL_CACHE", Path.home() / ".cache" / "safecl")) / "data"


def default_folder() -> Path:
    """$SAFECL_CACHE/artifacts, by default ~/.cache/safecl/artifacts."""
    return Path(os.environ.get("SAFECL_CACHE") or Path.home() / ".cache" / "safecl") / "artifacts"
