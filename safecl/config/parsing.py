"""Reading a run config as a tree: YAML in which `2e-5` is a number and no key occurs twice, and `key.path=value`
overrides."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from safecl.config.errors import ConfigError
from safecl.config.texts import visible

MOST_NESTED, MOST_VALUES, MOST_DIGITS = 32, 100_000, 40
"""Limits of a config."""
MOST_BYTES = 2 * 2**20

_LONG_NUMBER = re.compile(rf"[-+]?[0-9][0-9_:]{{{MOST_DIGITS},}}")
_DEEPEST = 8
"""Depth down to which the lines of keys are looked up; the config is less deep."""


class _Loader(yaml.SafeLoader):
    """Reads `2e-5` as a number; YAML 1.1 takes it for text and wants `2.0e-5`."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$"
        r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"line {line}: a key must be one word, not a list or a mapping")
        if key_node.value in seen:
            raise ConfigError(f"line {line}: the key {key_node.value!r} occurs twice in one section")
        seen.add(key_node.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def parse_yaml(text: str) -> Any:
    """Read YAML, with the differences of this module. Raises ConfigError with line and column."""
    try:
        _refuse_bombs(text)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {_explain(error)}") from None
    except ConfigError:
        raise
    except (ValueError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        # PyYAML passes on what int(), datetime and its own tables raise for a value that its tag does not fit
        raise ConfigError(f"not valid YAML: a value that cannot be read ({visible(str(error))[:80]})") from None


def _refuse_bombs(text: str) -> None:
    """Raise ConfigError for a text that would take minutes to read, or overflow the stack.

    The parser's events are counted before anything is made of them. An alias counts as all that it stands for.
    """
    open_sizes, anchors = [0], [""]
    sizes: dict[str, int] = {}
    for event in yaml.parse(text, Loader=_Loader):
        place = f"line {event.start_mark.line + 1 if event.start_mark is not None else 1}"
        if isinstance(event, yaml.CollectionStartEvent):
            open_sizes.append(1)
            anchors.append(event.anchor or "")
        elif isinstance(event, yaml.CollectionEndEvent):
            size = open_sizes.pop()
            sizes[anchors.pop()] = size
            open_sizes[-1] += size
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in anchors:
                raise ConfigError(f"{place}: &{event.anchor} contains itself")
            open_sizes[-1] += sizes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.ScalarEvent):
            open_sizes[-1] += 1
            if _LONG_NUMBER.fullmatch(event.value):
                raise ConfigError(f"{place}: a number of more than {MOST_DIGITS} digits")
        if len(open_sizes) > MOST_NESTED:
            raise ConfigError(f"{place}: nested more than {MOST_NESTED} deep")
        if open_sizes[-1] > MOST_VALUES:
            raise ConfigError(f"{place}: more than {MOST_VALUES:,} values, with those that aliases (`*name`) stand for")


def _explain(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or (mark := error.problem_mark) is None:
        return " ".join(str(error).split())
    what = " ".join(part for part in (error.context, error.problem) if part)
    line = (mark.get_snippet(indent=2, max_length=100) or "").rstrip("\0")
    return f"line {mark.line + 1}, column {mark.column + 1}: {what}" + (f"\n{line}" if line else "")


def read_tree(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError; where there is no such file it names the nearest one."""
    try:
        tree = parse_yaml(_read_text(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_did_you_mean(_nearest_file(path))}") from None
    except IsADirectoryError:
        inside = min(path.glob("*.y*ml"), default=None)
        raise ConfigError(f"{path}: is a folder, not a run config{_did_you_mean(inside)}") from None
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


def _read_text(path: Path) -> str:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ConfigError("not a regular file")
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ConfigError(f"more than {MOST_BYTES:,} bytes long; a run config has some thousands")
    return content.decode("utf-8-sig")


def _nearest_file(path: Path) -> Path | None:
    names = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return path.parent / near[0] if near else None


def _did_you_mean(file: Path | None) -> str:
    return f"; did you mean {file}?" if file is not None else ""


def key_lines(text: str) -> dict[str, int]:
    """The line of every key and list item, by its dotted path (`tasks.0.train`). `text` is valid YAML."""
    found: dict[str, int] = {}

    def walk(node: yaml.Node | None, path: tuple[str, ...]) -> None:
        if len(path) == _DEEPEST:  # a YAML anchor may contain itself
            return
        for key, marked, value in _items(node):
            here = (*path, key)
            found[".".join(here)] = marked.start_mark.line + 1
            walk(value, here)

    walk(yaml.compose(text, Loader=_Loader), ())
    return found


def _items(node: yaml.Node | None) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Yield (key, node that gives its line, value) for each item of a mapping or list; nothing for a plain value."""
    if isinstance(node, yaml.MappingNode):
        yield from ((str(key.value), key, value) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        yield from ((str(index), value, value) for index, value in enumerate(node.value))


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Set `key.path=value` in the tree, with values read as YAML; a list item is named by its index
    (`tasks.0.train=...`). Raises ConfigError."""
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
    for depth, name in enumerate(keys):
        where = ".".join(keys[:depth])
        key: Any = name
        if isinstance(node, list):
            key = _index(node, name, where, override)
        elif not isinstance(node, dict):
            raise ConfigError(f"{override!r}: {where} is a value, not a section")
        if depth == len(keys) - 1:
            node[key] = value
            return
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[key]


def _index(items: list[Any], key: str, where: str, override: str) -> int:
    if key.isdigit() and int(key) < len(items):
        return int(key)
    known = f"{where}.0 to {where}.{len(items) - 1}" if len(items) > 1 else f"{where}.0" if items else "there is none"
    raise ConfigError(f"{override!r}: {where} is a list of {len(items)}; an item is named by its index, {known}")
