"""The cache, a folder of files that safecl keeps between runs: $SAFECL_CACHE, or ~/.cache/safecl where that is unset or
empty."""

from __future__ import annotations

import os
from pathlib import Path

from safecl.config import ConfigError, RunConfig

PREPARED, ARTIFACTS = "prepared", "artifacts"
"""The folders of prepared rows and of artifacts in a run folder, where `privacy.keep_prepared` is false."""


def data_cache() -> Path:
    """The cache's folder of prepared data."""
    return cache_folder() / "data"


def artifact_cache() -> Path:
    """The cache's folder of artifacts."""
    return cache_folder() / "artifacts"


def cache_folder() -> Path:
    """The cache's own folder. Raises ConfigError where it is not set and there is no home folder."""
    if named := os.environ.get("SAFECL_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "safecl"
    except RuntimeError:
        raise ConfigError("there is no home folder for the cache: set SAFECL_CACHE to a folder, or HOME") from None


def prepared_folder(config: RunConfig) -> Path:
    """Return the folder of a run's prepared rows."""
    return data_cache() if config.privacy.keep_prepared else Path(config.output) / PREPARED


def artifact_folder(config: RunConfig) -> Path:
    """Return the folder of a run's artifacts: `artifacts.folder`, else in the run folder where `privacy.keep_prepared`
    is false, else the cache's."""
    if config.artifacts.folder:
        return Path(config.artifacts.folder).expanduser()
    return artifact_cache() if config.privacy.keep_prepared else Path(config.output) / ARTIFACTS
