"""A type checker sees the same names as the importer of a package whose names are imported on first use."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["safecl.data", "safecl.evaluation", "safecl.replay", "safecl.scan"])
def test_names_for_type_checkers_are_the_names_that_are_imported_on_first_use(name):
    package = importlib.import_module(name)
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module.removeprefix(f"{name}.") for node in guarded.body for alias in node.names}
    assert typed == package._HOMES
    assert all(hasattr(package, public) for public in package.__all__)
