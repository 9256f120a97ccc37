"""Model folders: recognise them, refuse others, name them."""

from __future__ import annotations

from pathlib import Path

from safecl.config import ConfigError
from safecl.storage.model_folder import FAILED_MODEL, RUN_MODEL, failed_instead, is_gguf, tuned_model


def is_model(folder: str | Path) -> bool:
    """Whether a folder holds a model, or adapters of one, in Hugging Face layout."""
    return any((Path(folder) / name).is_file() for name in ("config.json", "adapter_config.json"))


def check_is_model(path: str | Path) -> None:
    """Refuse a folder that holds no model; a hub id is left to transformers. Raises ConfigError, which names a `model`
    folder inside where there is one, and a model that did not pass its gate."""
    folder = Path(path)
    if is_gguf(str(path)):
        return
    if not folder.is_dir():
        if folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
            failed = failed_instead(folder)
            why = f": that run's model did not pass its gate, and lies in {failed}" if failed is not None else ""
            raise ConfigError(f"{path}: no such model folder{why}")
    elif not is_model(folder):
        inner = tuned_model(folder)
        hint = f"; did you mean {inner}?" if inner is not None and is_model(inner) else ""
        raise ConfigError(f"{path}: not a model folder, there is no config.json in it{hint}")


def name_of(path: str | Path) -> str:
    """Return a short name for a model: its folder's, or the run's for a run's `model` or `model-failed`."""
    path = Path(path)
    return (path.parent.name if path.name in (RUN_MODEL, FAILED_MODEL) else path.name) or "model"
