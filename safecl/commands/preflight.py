"""What can be said of a config's files before torch is imported: which are missing, and whether the run folder can be
made."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from safecl.config import ConfigError, RunConfig


def preflight(config: RunConfig) -> None:
    """Raises ConfigError with one line for each missing file, and for a run folder that cannot be made. Makes
    nothing."""
    mistakes: list[str] = []
    _collect(mistakes, lambda: refuse_missing_files(config))
    _collect(mistakes, lambda: refuse_unwritable(Path(config.output)))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    settle_hub([name for _, name in (*_model_folders(config), *_data_files(config))])


def refuse_missing_files(config: RunConfig) -> None:
    """Raises ConfigError that names every local file and folder of the config that is not there. Hub ids are left to
    their readers."""
    from safecl.data.files import refuse_missing
    from safecl.data.hub import refuse_missing_folder

    mistakes: list[str] = []
    for key, name in _model_folders(config):
        _collect(mistakes, lambda key=key, name=name: refuse_missing_folder(key, name))
    for key, path in _data_files(config):
        _collect(mistakes, lambda path=path: refuse_missing(path), f"{key}: ")
    for name, settings in config.methods.items():
        if (path := getattr(settings, "fisher", None)) is not None and not Path(path).is_file():
            mistakes.append(
                f"methods.{name}.fisher: {path}: no such file; `safecl fisher CFG` estimates the Fisher information and writes one"
            )
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def _collect(mistakes: list[str], look: Callable[[], None], prefix: str = "") -> None:
    try:
        look()
    except ConfigError as error:
        mistakes.append(f"{prefix}{error}")


def _model_folders(config: RunConfig) -> Iterator[tuple[str, str]]:
    yield "model.path", config.model.path
    if config.model.tokenizer is not None:
        yield "model.tokenizer", config.model.tokenizer
    yield from (
        (key, source) for key, source in config.online_teachers.items() if source not in ("aligned", "previous", "ema")
    )


def _data_files(config: RunConfig) -> Iterator[tuple[str, str]]:
    for index, task in enumerate(config.tasks):
        yield f"tasks.{index}.train", task.train
        if task.eval is not None:
            yield f"tasks.{index}.eval.path", task.eval.path
    if config.memory is not None:
        yield "memory.source", config.memory.source
    if config.poison.ratio > 0:
        yield "poison.source", config.poison.source
    if config.safety is not None:
        yield "safety.prompts", config.safety.prompts
        if config.safety.benign_prompts is not None:
            yield "safety.benign_prompts", config.safety.benign_prompts
    if config.scan is not None:
        for key in ("benign", "disallowed"):
            if (path := getattr(config.scan, key)) is not None:
                yield f"scan.{key}", path


_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def settle_hub(names: Iterable[str]) -> None:
    """Where one of the names is of the hub and there is no network, only what was downloaded counts; the library would
    try on."""
    if all(Path(name).expanduser().exists() for name in names) or any(os.environ.get(name) for name in _PROXIES):
        return
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def make_folder(folder: Path) -> None:
    """Makes a folder that a verb writes into. Raises ConfigError where that cannot be."""
    refuse_unwritable(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error.strerror}") from None


def refuse_unwritable(folder: Path) -> None:
    """Raises ConfigError where the run folder could not be made. Makes nothing."""
    nearest = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise ConfigError(f"output: {folder} cannot be a folder: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"output: {folder} cannot be written: no permission in {nearest}")
