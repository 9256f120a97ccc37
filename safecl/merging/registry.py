"""The registry of merges: finds a kind's file by its name, and reads its settings. Imports no torch.

A kind is one file in a family folder of `safecl/merging/`; kinds of your own are named by their module,
`my_package.my_merge`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from safecl.config import ConfigError, apply_overrides
from safecl.config.errors import explain
from safecl.merging.base import MergeConfig

FAMILIES = ("averages", "task_vectors", "safety")


def kinds() -> dict[str, str]:
    """Return each kind of merge by its name, with one line about it."""
    return {name: _first_line(path) for name, path in sorted(_files().items())}


@cache
def _files() -> dict[str, Path]:
    """The file of each kind. Imports none of them."""
    here = Path(__file__).parent
    files = [file for family in FAMILIES for file in sorted((here / family).glob("*.py"))]
    return {file.stem: file for file in files if not file.stem.startswith("_")}


def _first_line(path: Path) -> str:
    """Read the first line of a file's docstring, without parsing the file."""
    with path.open(encoding="utf-8") as file:
        return file.readline().strip().strip('"')


def help_text() -> str:
    """Return the list of kinds for the command line's help, a paragraph each."""
    return "\n\n".join(f"{name}: {text}" for name, text in kinds().items())


def kind_module(name: str) -> ModuleType:
    """Return the module of a kind, which defines `Config` and `Merge`.

    Raises ConfigError with the nearest known name.
    """
    if name in _files():
        path = _files()[name]
        return importlib.import_module(f"safecl.merging.{path.parent.name}.{name}")
    if "." not in name:
        near = difflib.get_close_matches(name, _files(), n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known kinds: {', '.join(sorted(_files()))}"
        raise ConfigError(f"no merge is called `{name}`; {hint}")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"merge `{name}`: its module cannot be imported: {error}") from None
    if missing := [part for part in ("Config", "Merge") if not hasattr(module, part)]:
        raise ConfigError(f"merge `{name}`: its module defines no `{missing[0]}` class")
    return module


def read_settings(kind: str, settings: Mapping[str, Any]) -> MergeConfig:
    """Check the settings of a kind. Raises ConfigError with one line per mistake."""
    config_class: type[MergeConfig] = kind_module(kind).Config
    try:
        return config_class.model_validate(dict(settings))
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, config_class, prefix=(kind,)))) from None


def parse_settings(overrides: list[str]) -> dict[str, Any]:
    """Read settings from a command line: `key=value`, with values as in YAML. Raises ConfigError."""
    return apply_overrides({}, overrides)
