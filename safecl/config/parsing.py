"""A run config as text and as a tree: YAML in which `2e-5` is a number and a key stands once, and `key.path=value`
overrides."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from safecl.config.errors import ConfigError

_DEEPEST = 8


class _Loader(yaml.SafeLoader):
    """YAML's own rule reads `2e-5` as text; here it is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def _no_duplicate_keys(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen: set[str] = set()
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"line {line}: a key must be one word, not a list or a mapping")
        if key_node.value in seen:
            raise ConfigError(f"line {line}: the key {key_node.value!r} stands twice in one section")
        seen.add(key_node.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _no_duplicate_keys)


def parse_yaml(text: str) -> Any:
    """Reads YAML as safecl does. Raises ConfigError with line and column."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {_explain(error)}") from None


def _explain(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    what = " ".join(part for part in (getattr(error, "context", None), error.problem) if part)
    line = (mark.get_snippet(indent=2, max_length=100) or "").rstrip("\0")
    return f"line {mark.line + 1}, column {mark.column + 1}: {what}" + (f"\n{line}" if line else "")


def read_tree(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError, with the nearest file where there is none of that name."""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else [], n=1
        )
        raise ConfigError(
            f"{path}: no such file" + (f"; did you mean {path.parent / near[0]}?" if near else "")
        ) from None
    except IsADirectoryError:
        inside = next(iter(sorted(path.glob("*.y*ml"))), None)
        raise ConfigError(
            f"{path}: is a folder, not a run config" + (f"; did you mean {inside}?" if inside else "")
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        what = "is empty" if tree is None else "holds no `key: value` lines"
        raise ConfigError(
            f"{path}: {what}; a run config needs at least model, tasks and output (`safecl init` writes one)"
        )
    return tree


def key_lines(text: str) -> dict[str, int]:
    """The line of every key and list item, by its dotted path (`tasks.0.train`). `text` is valid YAML."""
    found: dict[str, int] = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        is_mapping = isinstance(node, yaml.MappingNode)
        items = node.value if is_mapping else list(enumerate(node.value)) if isinstance(node, yaml.SequenceNode) else []
        for key, value in items if len(path) < _DEEPEST else []:  # an anchor may hold itself
            here = (*path, str(key.value if is_mapping else key))
            found[".".join(here)] = (key if is_mapping else value).start_mark.line + 1
            walk(value, here)

    walk(yaml.compose(text, Loader=_Loader), ())
    return found


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Sets `key.path=value` in the tree, values read as YAML; list items are named by index (`tasks.0.train=...`).
    Raises ConfigError."""
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals or not all(path.split(".")):
            raise ConfigError(f"{override!r} is not an override; write key.path=value, e.g. train.learning_rate=2e-5")
        try:
            parsed = parse_yaml(value) if value else None
        except ConfigError as error:
            raise ConfigError(f"{override!r}: the value is {error}") from None
        _set(tree, path.split("."), parsed, override)
    return tree


def _set(node: Any, keys: list[str], value: Any, override: str) -> None:
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            key = _index(node, key, ".".join(keys[:depth]), override)
        elif not isinstance(node, dict):
            raise ConfigError(f"{override!r}: {'.'.join(keys[:depth])} is a value, not a section")
        if last:
            node[key] = value
        elif isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        if not last:
            node = node[key]


def _index(items: list, key: str, where: str, override: str) -> int:
    if key.isdigit() and int(key) < len(items):
        return int(key)
    known = f"{where}.0 to {where}.{len(items) - 1}" if len(items) > 1 else f"{where}.0" if items else "there is none"
    raise ConfigError(f"{override!r}: {where} is a list of {len(items)}; an item is named by its index, {known}")
