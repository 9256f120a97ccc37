"""Checks of a config's files that need no torch: which are missing, and whether the run folder can be made."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from safecl.config import ConfigError, RunConfig
from safecl.storage.limits import check_cache


def preflight(config: RunConfig, *, writes_fisher: bool = False) -> None:
    """Raise ConfigError with a line for each missing file, and for a run folder or a cache that cannot be made. Makes
    only the cache's folder.

    writes_fisher: the verb writes the Fisher file that a method names, so it need not exist yet.
    """
    mistakes: list[str] = []
    with _collecting(mistakes):
        refuse_missing_files(config, fisher=not writes_fisher)
    with _collecting(mistakes):
        refuse_unwritable(Path(config.output))
    with _collecting(mistakes):
        check_cache()
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    settle_hub([name for _, name in (*_model_folders(config), *_data_files(config))])


def refuse_missing_files(config: RunConfig, *, fisher: bool = True) -> None:
    """Raise ConfigError that names every local file and folder of the config that does not exist. Hub ids are checked
    when they are read."""
    from safecl.data.hub import refuse_missing_folder
    from safecl.data.reading.files import refuse_missing

    mistakes: list[str] = []
    for key, name in _model_folders(config):
        with _collecting(mistakes):
            refuse_missing_folder(key, name)
    for key, name in _data_files(config):
        with _collecting(mistakes, prefix=f"{key}: "):
            refuse_missing(name)
    for name, settings in config.methods.items():
        if fisher and (path := settings.fisher_file) is not None and not Path(path).is_file():
            mistakes.append(
                f"methods.{name}.fisher: {path}: no such file; "
                "`safecl fisher CFG` estimates the Fisher information and writes one"
            )
        if (path := settings.scores_file) is not None and not Path(path).expanduser().is_file():
            mistakes.append(f"methods.{name}.scores: {path}: no such file")
        if (path := settings.answers_file) is not None and not Path(path).is_file():
            mistakes.append(
                f"methods.{name}.answers: {path}: no such file; `safecl memory rewrite CFG`, with a config without the "
                "method, writes one"
            )
    if mistakes:
        raise ConfigError("\n".join(mistakes))


@contextlib.contextmanager
def _collecting(mistakes: list[str], prefix: str = "") -> Iterator[None]:
    """Append the message of a ConfigError instead of raising it, so that all mistakes are reported at once."""
    try:
        yield
    except ConfigError as error:
        mistakes.append(f"{prefix}{error}")


def _model_folders(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield (key, folder or hub id) of the models and tokenizers that a config names."""
    yield "model.path", config.model.path
    if config.model.tokenizer is not None:
        yield "model.tokenizer", config.model.tokenizer
    yield from (
        (key, source) for key, source in config.online_teachers.items() if source not in ("aligned", "previous", "ema")
    )


def _data_files(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield (key, file or hub id) of the rows and prompts that a config names."""
    from safecl.data.reading.benchmarks import benchmark_of

    for index, task in enumerate(config.tasks):
        yield f"tasks.{index}.train", task.train
        if task.eval is not None:
            yield f"tasks.{index}.eval.path", task.eval.path
    if config.memory is not None:
        for key in ("source", "prompts", "benign_prompts"):
            if (path := getattr(config.memory, key)) is not None:
                yield f"memory.{key}", benchmark_of(path)[1] if key != "source" else path
    if config.poison.ratio > 0 and config.poison.source is not None:
        yield "poison.source", config.poison.source
    if config.safety is not None:
        yield "safety.prompts", benchmark_of(config.safety.prompts)[1]
        if config.safety.benign_prompts is not None:
            yield "safety.benign_prompts", benchmark_of(config.safety.benign_prompts)[1]
    if config.scan is not None:
        for key in ("benign", "disallowed"):
            if (path := getattr(config.scan, key)) is not None:
                yield f"scan.{key}", path


_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def settle_hub(names: Iterable[str]) -> None:
    """Use only downloaded files where a name is a hub id and there is no network; the library would retry for a long
    time."""
    if all(Path(name).expanduser().exists() for name in names) or any(os.environ.get(name) for name in _PROXIES):
        return
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def make_folder(folder: Path) -> None:
    """Make a folder that a verb writes into. Raises ConfigError where it cannot be made."""
    refuse_unwritable(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error.strerror}") from None


def refuse_unwritable(folder: Path) -> None:
    """Raise ConfigError where the run folder could not be made. Makes nothing."""
    nearest = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise ConfigError(f"output: {folder} cannot be a folder: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"output: {folder} cannot be written: no permission in {nearest}")
