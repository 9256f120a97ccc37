"""One file per continual-learning method: its config and its behaviour. Knows losses and shard terms, not DeepSpeed.

Importing this package imports no method and no torch: a method's module is imported when a config names it.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType

_NOT_METHODS = {"base", "presets", "scope"}


def builtin_methods() -> list[str]:
    """Names of the methods that come with safecl."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NOT_METHODS)


def method_module(name: str) -> ModuleType:
    """The module of a method: a file of this package, or `my_package.my_method` importable from outside.

    It defines `Config` (a safecl.config.MethodConfig) and `Method` (a safecl.methods.base.Method).
    Raises ValueError with the nearest known name.
    """
    if name in builtin_methods():
        return importlib.import_module(f"{__name__}.{name}")
    if "." not in name:
        near = difflib.get_close_matches(name, builtin_methods(), n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known methods: {', '.join(builtin_methods())}"
        raise ValueError(f"unknown method `{name}`; {hint} (a method of your own is named by its module, e.g. my_package.my_method)")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"method `{name}`: its module cannot be imported: {error}") from None
    if missing := [part for part in ("Config", "Method") if not hasattr(module, part)]:
        raise ValueError(f"method `{name}`: its module defines no `{missing[0]}` class")
    return module
