"""Reading, overriding, checking and writing run configs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import ValidationError

from safecl.config.errors import ConfigError, explain, line_of
from safecl.config.method_registry import preset_methods
from safecl.config.parsing import apply_overrides, key_lines, read_tree
from safecl.config.presets import with_sections
from safecl.config.run import RunConfig
from safecl.config.secrets import without_secrets
from safecl.config.texts import visible


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run config from the YAML file `path`, apply `overrides` like `"train.learning_rate=2e-5"`, and check it.

    Raises ConfigError with one line per mistake: file and line, section, key, what is wrong, and the nearest key that
    exists.
    """
    path, overrides = Path(path), list(overrides)
    tree = read_tree(path)
    for override in overrides:
        if override.startswith("methods."):
            _expand_preset(tree, str(path))
        apply_overrides(tree, [override])
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = key_lines(path.read_text(encoding="utf-8-sig")) | {
            override.partition("=")[0]: None for override in overrides
        }
        raise _config_error(error, str(path), lines) from None


def _expand_preset(tree: dict[str, Any], source: str) -> None:
    """Write out a preset of `methods`, so that an override can change one of its settings:
    `methods.der.alpha=2` with `methods: balanced`."""
    if isinstance(tree.get("methods"), str):
        try:
            methods = preset_methods(tree["methods"])
            tree |= with_sections(tree) | {"methods": methods}
        except ValueError as error:
            raise ConfigError(f"{source}: methods: {error}") from None


def validate_tree(tree: dict[str, Any], source: str) -> RunConfig:
    """Check a config given as a tree of dicts and lists. Raises ConfigError, each line of which begins with
    `source`."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise _config_error(error, source) from None


def _config_error(
    error: ValidationError, source: str, lines: Mapping[str, int | None] = MappingProxyType({})
) -> ConfigError:
    mistakes = visible("\n".join(explain(error, RunConfig))).splitlines()
    numbers = [line_of(mistake, lines) for mistake in mistakes]
    places = [f"{source}:{number}" if number else source for number in numbers]
    return ConfigError("\n".join(f"{place}: {mistake}" for place, mistake in zip(places, mistakes, strict=True)))


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML, defaults included, without secrets; `load_config` reads it back to the same tree."""
    return yaml.safe_dump(
        without_secrets(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True, width=120
    )
