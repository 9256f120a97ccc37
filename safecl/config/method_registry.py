"""The registry of methods: finds a method's file by its name, and reads the section `methods` of a run config.

A method is one file. Those of safecl lie in the family folders of `safecl/methods/`; others are named by their module,
`my_package.my_method`. A method's module is imported when a config names it.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from safecl.config.base import MethodConfig
from safecl.config.errors import ConfigError, explain
from safecl.config.presets import PRESETS

PACKAGE = "safecl.methods"


def load_methods(value: Any) -> dict[str, MethodConfig]:
    """Read the section `methods`: a preset's name, or settings by method. Raises ValueError or ConfigError."""
    if value is None:
        return {}
    if isinstance(value, str):
        value = preset_methods(value)
    if not isinstance(value, Mapping):
        raise ValueError(
            f"must be a mapping from method names to their settings, e.g. `methods: {_example()}`, or a preset, "
            f"one of {_presets()}"
        )
    return {str(name): _load_method_config(str(name), settings) for name, settings in value.items()}


def _load_method_config(name: str, settings: Any) -> MethodConfig:
    config_class: type[MethodConfig] = method_module(name).Config
    if isinstance(settings, config_class):
        return settings
    try:
        return config_class.model_validate({} if settings is None else settings)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, config_class, prefix=("methods", name)))) from None


def preset_methods(name: str) -> dict[str, dict[str, Any]]:
    """The methods of a preset and their settings, as in a run config. Raises ValueError with what to write instead."""
    if name in PRESETS:
        return copy.deepcopy(PRESETS[name].methods)
    if name in builtin_methods():
        raise ValueError(
            f"{name!r} is a method, not a preset; write `methods: {{{name}: {{}}}}`, or one of the presets {_presets()}"
        )
    near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`?" if near else f"known presets: {_presets()}"
    raise ValueError(f"no preset is named {name!r}; {hint} (or a mapping from methods to their settings)")


def _presets() -> str:
    return ", ".join(PRESETS)


def _example() -> str:
    """The methods of the first preset as YAML on one line."""
    methods = next(iter(PRESETS.values())).methods
    return json.dumps(methods).replace('"', "")


def builtin_methods() -> list[str]:
    """Names of the methods that come with safecl, sorted."""
    return sorted(_modules())


def methods_that(declare: Callable[[MethodConfig], bool]) -> list[str]:
    """Names of the built-in methods whose default settings make `declare` true, sorted."""
    return [name for name in builtin_methods() if declare(method_module(name).Config())]


@cache
def _modules() -> dict[str, str]:
    """The module of each built-in method by the method's name: every file of every family folder. Imports none of
    them."""
    found: dict[str, str] = {}
    for family in _submodules(PACKAGE):
        if family.ispkg:
            found |= {
                module.name: f"{PACKAGE}.{family.name}.{module.name}"
                for module in _submodules(f"{PACKAGE}.{family.name}")
            }
    return found


def _submodules(package: str) -> list[pkgutil.ModuleInfo]:
    spec = find_spec(package)
    assert spec is not None, f"{package} is a package"
    return list(pkgutil.iter_modules(spec.submodule_search_locations))


def method_module(name: str) -> ModuleType:
    """The module of a method: a file in a family folder of safecl.methods, or `my_package.my_method` importable from
    outside.

    It defines `Config` (a safecl.config.MethodConfig) and `Method` (a safecl.methods.base.Method).
    Raises ValueError with the nearest known name.
    """
    if name in builtin_methods():
        return importlib.import_module(_modules()[name])
    if "." not in name:
        near = difflib.get_close_matches(name, builtin_methods(), n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known methods: {', '.join(builtin_methods())}"
        raise ValueError(
            f"unknown method `{name}`; {hint} (a method of your own is named by its module, e.g. my_package.my_method)"
        )
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"method `{name}`: its module cannot be imported: {error}") from None
    if missing := [part for part in ("Config", "Method") if not hasattr(module, part)]:
        raise ValueError(f"method `{name}`: its module defines no `{missing[0]}` class")
    return module
