"""Limits of this process that a run would meet later, with an error of a library: open files, address space, places for
temporary files. Imports no torch."""

from __future__ import annotations

import os
import resource
import tempfile
from pathlib import Path

from safecl.config import ConfigError
from safecl.storage.cache_folder import cache_folder
from safecl.storage.sizes import format_bytes

FEWEST_FILES = 128
"""A rank opens about 60 files and sockets, and some more for each further rank of a small job."""
ENOUGH_FILES = 65_536
LEAST_ADDRESS_SPACE = 3 * 2**30
"""Address space that torch, transformers and DeepSpeed take without a model, on a machine without a GPU."""


def check_limits() -> None:
    """Raise the soft limit of open files, and raise ConfigError for a limit that is too low for any run."""
    _check_files()
    _check_address_space()
    _check_temporary_folder()


def _check_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard if hard != resource.RLIM_INFINITY else ENOUGH_FILES
    if soft != resource.RLIM_INFINITY and soft < (wanted := min(most, ENOUGH_FILES)):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if 0 <= soft < FEWEST_FILES:
        raise ConfigError(
            f"this process may open only {soft} files (ulimit -Hn); a run needs {FEWEST_FILES} at least, "
            "and 1024 are enough for most"
        )


def _check_address_space() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if 0 <= soft < LEAST_ADDRESS_SPACE:
        raise ConfigError(
            f"this process may use only {format_bytes(soft)} of address space (ulimit -v); its libraries alone need "
            f"{format_bytes(LEAST_ADDRESS_SPACE)} without a model; set `ulimit -v unlimited`, and limit memory with a "
            "control group (systemd-run -p MemoryMax=..., docker --memory)"
        )


def _check_temporary_folder() -> None:
    try:
        tempfile.gettempdir()
    except OSError:
        named = os.environ.get("TMPDIR")
        told = f"TMPDIR ({named}) and /tmp are" if named else "/tmp is"
        raise ConfigError(f"no folder for temporary files can be written: {told} full, read-only or absent") from None


def check_cache() -> None:
    """Raise ConfigError where the cache's folder cannot be made or written."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
        reason = "no permission"
    except OSError as error:
        writable, reason = False, error.strerror or str(error)
    if not writable:
        raise ConfigError(
            f"the cache {folder} cannot be written: {reason}; set SAFECL_CACHE to a folder that can be, such as "
            f"{Path(tempfile.gettempdir()) / 'safecl-cache'}"
        )
