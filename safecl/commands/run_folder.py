"""The run folder, before there is one."""

from __future__ import annotations

import os
from pathlib import Path

from safecl.config import ConfigError


def refuse_unwritable(folder: Path) -> None:
    """Raises ConfigError where the run folder could not be made. Makes nothing."""
    nearest = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise ConfigError(f"output: {folder} cannot be a folder: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"output: {folder} cannot be written: no permission in {nearest}")
