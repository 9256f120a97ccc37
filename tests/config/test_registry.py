"""A method is one file: no room that runs methods imports one or knows its name, and what a run must know of a method
is declared by its config."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

import safecl
from safecl.config import MethodConfig
from safecl.config.method_registry import builtin_methods, method_module, methods_that

PACKAGE = Path(safecl.__file__).parent
ROOMS = ("commands", "config", "data", "engine", "planning", "training")
# The presets, the example of the tables in docs/memory.md, and an action of the gate that has a method's name.
MAY_NAME_METHODS = {
    PACKAGE / "config" / "presets.py",
    PACKAGE / "config" / "gate.py",
    PACKAGE / "planning" / "costs" / "memory_tables.py",
}
# `ema` is a kind of state and a teacher, too; as a method it is a key of `methods`.
AS_A_METHOD = re.compile(
    rf"\b({'|'.join(name for name in builtin_methods() if name != 'ema')})\b|\bmethods\.ema\b|\bmethod `?ema\b|\{{ema\b"
)


def files() -> list[Path]:
    found = [path for room in ROOMS for path in sorted((PACKAGE / room).rglob("*.py"))]
    assert len(found) > 80
    return [path for path in found if path not in MAY_NAME_METHODS]


def imported_methods(tree: ast.Module) -> Iterator[str]:
    """Modules of methods that a file imports, wherever in the file."""
    homes = {method_module(name).__name__ for name in builtin_methods()}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name in homes)


def quoted_methods(tree: ast.Module) -> Iterator[str]:
    """Texts that name a method; documentation may."""
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            if AS_A_METHOD.search(node.value):
                yield f"line {node.lineno}: {node.value!r}"
        if isinstance(node, (ast.Subscript, ast.Compare)) and "methods" in ast.unparse(node):
            if any(isinstance(part, ast.Constant) and part.value == "ema" for part in ast.walk(node)):
                yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("look", [imported_methods, quoted_methods])
def test_no_room_that_runs_methods_knows_one(look):
    found = {str(path.relative_to(PACKAGE)): list(look(ast.parse(path.read_text("utf-8")))) for path in files()}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("look", "source"),
    [
        (imported_methods, "from safecl.methods.penalties import ewc"),
        (imported_methods, "def f():\n    import safecl.methods.averages.ema as average"),
        (imported_methods, "from safecl.methods.averages.psmt import Config"),
        (quoted_methods, "masked = 'psmt' in methods"),
        (quoted_methods, "f'use methods.lwf.outputs: {value}'"),
        (quoted_methods, "kept = 'ema' in config.methods"),
        (quoted_methods, "config.methods['ema']"),
    ],
)
def test_the_scan_notices_a_method(look, source):
    assert len(list(look(ast.parse(source)))) == 1


def test_no_room_probes_the_settings_of_a_method():
    declared = {name for name, value in vars(MethodConfig).items() if isinstance(value, property)}
    assert {"needs_memory", "needs_teacher", "keeps_average", "fisher_file", "is_proximal"} <= declared
    probe = re.compile(r"\b(?:getattr|hasattr)\(\w*(?:settings|method|config)\w*, \"(\w+)\"")
    found = [name for path in files() for name in probe.findall(path.read_text("utf-8"))]
    assert not declared & set(found)


def test_a_config_that_declares_nothing_needs_nothing():
    class Config(MethodConfig):
        """Empty."""

    settings = Config()
    declared = {name for name, value in vars(MethodConfig).items() if isinstance(value, property)}
    assert settings.acts_on == "task"
    assert not any(getattr(settings, name) for name in declared - {"acts_on"})
    assert settings.decay_for(100) is None and settings.weight_on_start(100) == 0.0


def test_a_declaration_is_a_class_variable_or_a_property_and_no_key():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pydantic warns of a field that hides an attribute

        class Config(MethodConfig):
            """Declares both ways, with keys of the names that users know."""

            needs_memory: ClassVar[bool] = True
            proximal: bool = False
            """A key."""
            fisher: str | None = None
            """A key."""

            @property
            def is_proximal(self) -> bool:
                return self.proximal

    assert list(Config.model_fields) == ["proximal", "fisher"]
    assert Config().needs_memory and not Config().is_proximal and Config(proximal=True).is_proximal
    assert Config(proximal=True).model_dump() == {"proximal": True, "fisher": None}


@pytest.mark.parametrize("name", builtin_methods())
def test_a_method_declares_its_keys_and_hides_no_declaration(name):
    module = method_module(name)
    assert issubclass(module.Config, MethodConfig) and not set(module.Config.model_fields) & set(dir(MethodConfig))
    assert module.Config().has_penalty or "proximal" not in module.Config.model_fields
    assert ("fisher" in module.Config.model_fields) == (module.Config().fisher_size is not None)


def test_methods_are_found_by_what_they_declare():
    assert methods_that(lambda settings: settings.keeps_average) == [
        "dema",
        "ema",
        "i_lora",
        "psmt",
        "temporal_ensemble",
    ]
    assert methods_that(lambda settings: settings.fisher_size is not None) == ["ewc"]
    assert methods_that(lambda settings: settings.has_penalty) == [
        "asft",
        "ewc",
        "hierarchical",
        "l2_sp",
        "lisa",
        "online_ewc",
    ]


def test_the_sections_that_name_rows_share_their_keys_behind_their_own_path():
    from safecl.config import MemoryConfig, TaskConfig
    from safecl.config.data import RowsConfig

    keys = list(RowsConfig.model_fields)
    assert keys == ["split", "format", "fields", "max_rows"]
    for section, first in (
        (TaskConfig, ["name", "train"]),
        (MemoryConfig, ["source", "prompts", "benign_prompts", "answers"]),
    ):
        assert issubclass(section, RowsConfig)
        assert list(section.model_fields)[: len(first) + len(keys)] == [*first, *keys]
