"""Checks of model names: a local folder, or owner/name on the hub.

A model that cannot be had is reported at once, where a library would try for a minute. Imports no torch.
"""

from __future__ import annotations

import functools
import os
import socket
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from safecl.config import ConfigError
from safecl.storage.model_folder import ADAPTER, failed_instead, is_gguf, settings_source
from safecl.storage.untrusted import check_folder

SECONDS_TO_CONNECT = 5.0
_ONE_OF_A_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "config.json")
_ONE_OF_A_MODEL = (*_ONE_OF_A_TOKENIZER, ADAPTER)


def refuse_missing_folder(key: str, name: str) -> None:
    """Raise ConfigError where `name` is no model folder and cannot be a model of the hub. Does not use the network."""
    local = Path(name).expanduser()
    if is_gguf(name):
        return
    if local.is_dir():
        if not any((local / file).is_file() for file in _ONE_OF_A_MODEL):
            raise ConfigError(f"{key}: {name} is not a model folder: there is no tokenizer and no config.json in it")
        return
    if local.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        failed = failed_instead(local)
        why = f": that run's model did not pass its gate, and lies in {failed}" if failed is not None else ""
        raise ConfigError(f"{key}: there is no folder {name}{why}")
    if "/" not in name and not _is_cached(name):
        raise ConfigError(
            f"{key}: there is no folder {name} here ({Path.cwd()}); a model of the hub is named owner/name"
        )


def refuse_unreachable(key: str, name: str) -> None:
    """Raise ConfigError for a missing folder, or for a hub model that is not cached while the hub is out of reach."""
    refuse_missing_folder(key, name)
    if is_gguf(name) or Path(name).expanduser().is_dir() or _is_cached(name):
        return
    problem = _no_connection()
    if problem is not None:
        raise ConfigError(f"{key}: {name} is neither a folder here nor in the hub's cache, and {problem}")


def _is_cached(name: str) -> bool:
    """Whether the hub's cache holds the model. The hub's library is not used: it reads its environment only once, when
    it is imported."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    snapshots = cache / f"models--{name.replace('/', '--')}" / "snapshots"
    return any(next(snapshots.glob(f"*/{file}"), None) is not None for file in _ONE_OF_A_TOKENIZER)


@functools.lru_cache(maxsize=1)
def _no_connection() -> str | None:
    """Return why the hub cannot be reached, or None where its host (or the proxy before it) takes connections."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "the hub cannot be asked (there is no network, or HF_HUB_OFFLINE is set)"
    asked = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    proxy = None if urllib.request.proxy_bypass(asked.hostname or "") else urllib.request.getproxies().get(asked.scheme)
    through = urlsplit(proxy if proxy is None or "//" in proxy else f"//{proxy}") if proxy else asked
    port = through.port or (80 if through.scheme == "http" else 443)
    try:
        socket.create_connection((through.hostname, port), SECONDS_TO_CONNECT).close()
    except OSError as error:
        return f"{through.hostname} cannot be reached ({error.strerror or error or type(error).__name__})"
    return None


def local_name(name: str) -> str:
    """Return the folder with ~ resolved, or the name on the hub unchanged."""
    local = Path(name).expanduser()
    return os.fspath(local) if local.is_dir() else name


def tokenizer_source(name: str) -> tuple[str, dict[str, str]]:
    """Return where transformers finds a tokenizer: a folder or hub id, and further arguments of `from_pretrained`. An
    adapter without a tokenizer has that of its base."""
    local = Path(name).expanduser()
    if is_gguf(name) or (local.is_dir() and not any((local / file).is_file() for file in _ONE_OF_A_TOKENIZER)):
        return settings_source(name)
    if local.is_dir():
        check_folder(local)
    return local_name(name), {}
