"""The cache, a folder of files that safecl keeps between runs: $SAFECL_CACHE, or ~/.cache/safecl where that is unset or
empty."""

from __future__ import annotations

import os
from pathlib import Path


def data_cache() -> Path:
    """The cache's folder of prepared data."""
    return _cache() / "data"


def artifact_cache() -> Path:
    """The cache's folder of artifacts."""
    return _cache() / "artifacts"


def _cache() -> Path:
    return Path(os.environ.get("SAFECL_CACHE") or Path.home() / ".cache" / "safecl")
