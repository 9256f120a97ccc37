"""The grid of a sweep: its axes, its cells (settings that are compared), and the runs of each cell (its seeds).

    methods=balanced,ewc,lisa  train.seed=0,1,2  poison.ratio=0,0.1      6 cells of 3 runs

`train.seed` is the axis of repetitions: its values are runs of the same cell. Values are YAML; a comma inside brackets
or quotes separates nothing. A value of `methods` may be a preset, a method, several joined by `+`, or `plain` for none.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safecl.config import ConfigError
from safecl.config.method_registry import builtin_methods
from safecl.config.presets import PRESETS

SEED, METHODS, PLAIN = "train.seed", "methods", "plain"
_OPENING, _CLOSING = "[{(", "]})"


@dataclass(frozen=True)
class Axis:
    """A key of the config and its values, as written."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class PlannedRun:
    """One run: its cell, its seed, its overrides without the output, and its folder."""

    cell: str
    seed: str | None
    overrides: tuple[str, ...]
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name


def read_axes(texts: Sequence[str]) -> list[Axis]:
    """Read `key=value,value` texts. Raises ConfigError."""
    axes = []
    for text in texts:
        key, equals, values = text.partition("=")
        found = [value.strip() for value in split_values(values)]
        if not equals or not key or not all(found):
            raise ConfigError(f"{text!r} is no axis of a sweep; write key=value,value, e.g. train.seed=0,1,2")
        if repeated := next((value for value in found if found.count(value) > 1), None):
            raise ConfigError(f"{text!r}: {repeated} is there twice")
        axes.append(Axis(key, tuple(found)))
    if twice := next((axis.key for axis in axes if sum(other.key == axis.key for other in axes) > 1), None):
        raise ConfigError(f"{twice} is there twice; give all its values at once, separated by commas")
    return axes


def split_values(text: str) -> list[str]:
    """Split at the commas that are in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth -= 1
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def plan_runs(axes: Sequence[Axis], folder: Path) -> list[PlannedRun]:
    """Return all runs, cell by cell; each has a folder of its own below `folder`."""
    seeds = next((axis.values for axis in axes if axis.key == SEED), (None,))
    others = [axis for axis in axes if axis.key != SEED]
    runs, names = [], set()
    for values in itertools.product(*(axis.values for axis in others)):
        cell = cell_name(others, values)
        settings = tuple(override(axis.key, value) for axis, value in zip(others, values, strict=True))
        for seed in seeds:
            of_seed = (f"{SEED}={seed}",) if seed is not None else ()
            name = _slug(cell if seed is None else f"{cell} seed {seed}")
            if name in names:
                raise ConfigError(f"two runs of the sweep would have the folder {folder / name}; name the values apart")
            names.add(name)
            runs.append(PlannedRun(cell, seed, settings + of_seed, folder / name))
    return runs


def cell_name(axes: Sequence[Axis], values: Sequence[str]) -> str:
    """Return the name of a cell: the values of its axes, with the key where several axes could have them."""
    parts = [
        value if axis.key == METHODS else f"{axis.key.rpartition('.')[2]} {value}"
        for axis, value in zip(axes, values, strict=True)
    ]
    return ", ".join(parts) or "run"


def override(key: str, value: str) -> str:
    """Return the override of a value; names of methods become a section. ConfigError for a method that does not
    exist is left to the config."""
    if key != METHODS or value in PRESETS or value.startswith("{"):
        return f"{key}={value}"
    if value == PLAIN:
        return f"{key}={{}}"
    names = value.split("+")
    if len(names) > 1 or value in builtin_methods() or "." in value:
        return f"{key}={{{', '.join(f'{name.strip()}: {{}}' for name in names)}}}"
    return f"{key}={value}"


def _slug(text: str) -> str:
    return re.sub(r"[^\w.+=-]+", "-", text).strip("-.")[:120] or "run"
