"""The points of a sweep over a merge's settings. Imports no torch.

    alpha=0:1:0.1          from 0 to 1, in steps of 0.1, both ends included
    density=0.1,0.3        these values

Several sweeps give every combination of their values, the first one varying slowest.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from safecl.config import ConfigError

MOST_POINTS = 500

Point = dict[str, Any]
"""The settings of one point."""


def parse_sweeps(sweeps: Sequence[str]) -> list[Point]:
    """Return all points. Raises ConfigError for a sweep that is not of the form, or too many points."""
    values: dict[str, list[float]] = {}
    for sweep in sweeps:
        key, equals, text = sweep.partition("=")
        if not equals or not key or not text:
            raise ConfigError(f"--sweep {sweep}: write a setting and its values, e.g. alpha=0:1:0.1 or alpha=0.3,0.7")
        if key in values:
            raise ConfigError(f"--sweep {sweep}: {key} is swept twice")
        values[key] = _range(sweep, text) if ":" in text else [float(_number(sweep, part)) for part in text.split(",")]
    points = [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]
    if len(points) > MOST_POINTS:
        raise ConfigError(f"--sweep: {len(points):,} points, at most {MOST_POINTS} are measured")
    return points


def _range(sweep: str, text: str) -> list[float]:
    parts = text.split(":")
    if len(parts) != 3:
        raise ConfigError(f"--sweep {sweep}: a range is first:last:step, e.g. 0:1:0.1")
    first, last, step = (_number(sweep, part) for part in parts)
    if step <= 0 or last < first:
        raise ConfigError(f"--sweep {sweep}: the step must be above 0 and the last value not below the first")
    if (last - first) / step > MOST_POINTS:
        raise ConfigError(f"--sweep {sweep}: more than {MOST_POINTS} points")
    count = int((last - first) / step) + 1
    return [float(first + i * step) for i in range(count)]


def _number(sweep: str, text: str) -> Decimal:
    try:
        number = Decimal(text.strip())
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite():
        raise ConfigError(f"--sweep {sweep}: {text.strip()!r} is not a number")
    return number


def text_of(point: Point) -> str:
    """Write a point as on the command line."""
    return " ".join(f"{key}={_text(value)}" for key, value in point.items())


def _text(value: Any) -> str:
    return f"[{','.join(map(_text, value))}]" if isinstance(value, list) else f"{value:g}"
