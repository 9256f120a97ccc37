"""Every benchmark imports, and every name that it takes from safecl exists: many of them run on a GPU only."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import ROOT

FILES = sorted([*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "launch").glob("*.py")])


def taken_from_safecl(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name) of every import from safecl, also inside functions, and of every attribute of such a module."""
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "safecl":
            for alias in node.names:
                yield node.module, alias.name
                if importlib.util.find_spec(f"{node.module}.{alias.name}") if _is_package(node.module) else None:
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield modules[node.value.id], node.attr


def _is_package(name: str) -> bool:
    return hasattr(importlib.import_module(name), "__path__")


def exists(module: str, name: str) -> bool:
    if hasattr(importlib.import_module(module), name):
        return True
    return _is_package(module) and importlib.util.find_spec(f"{module}.{name}") is not None


def import_script(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Import a file of launch/, which is in no package and imports its neighbours."""
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"imported_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_it_imports_and_every_name_that_it_takes_from_safecl_exists(path, monkeypatch):
    room, *names = path.relative_to(ROOT).with_suffix("").parts
    if room == "benchmarks":
        importlib.import_module(".".join([room, *names]).removesuffix(".__init__"))
    else:
        import_script(path, monkeypatch)
    missing = [f"{place}.{name}" for place, name in taken_from_safecl(ast.parse(path.read_text()))
               if not exists(place, name)]  # fmt: skip
    assert not missing, f"{path.name} takes {missing}"


def test_a_wrong_name_inside_a_function_is_found():
    tree = ast.parse("def f():\n    from safecl.engine.model.structure import _parameters_on_meta\n")
    assert [exists(*taken) for taken in taken_from_safecl(tree)] == [False]
    tree = ast.parse("from safecl.kernels import backends\nbackends.tables()\n")
    assert [exists(*taken) for taken in taken_from_safecl(tree)] == [True, False]
