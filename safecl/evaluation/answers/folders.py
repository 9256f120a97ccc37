"""Model folders: recognise them, refuse others, name them."""

from __future__ import annotations

from pathlib import Path

from safecl.config import ConfigError
from safecl.storage.model_folder import is_gguf


def is_model(folder: str | Path) -> bool:
    """Whether a folder holds a model, or adapters of one, in Hugging Face layout."""
    return any((Path(folder) / name).is_file() for name in ("config.json", "adapter_config.json"))


def check_is_model(path: str | Path) -> None:
    """Refuse a folder that holds no model; a hub id is left to transformers. Raises ConfigError, which names a `model`
    folder inside where there is one."""
    folder = Path(path)
    if is_gguf(str(path)):
        return
    if not folder.is_dir():
        if folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
            raise ConfigError(f"{path}: no such model folder")
    elif not is_model(folder):
        hint = f"; did you mean {folder / 'model'}?" if is_model(folder / "model") else ""
        raise ConfigError(f"{path}: not a model folder, there is no config.json in it{hint}")


def name_of(path: str | Path) -> str:
    """Return a short name for a model: its folder's, or the run's where the folder is a run's `model`."""
    path = Path(path)
    return (path.parent.name if path.name == "model" else path.name) or "model"
