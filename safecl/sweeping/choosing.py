"""The objective of a sweep: `max accuracy where asr.high <= 0.05 and over_refusal <= 0.2`.

objective  = ("max" | "min") value ["where" condition ("and" condition)*]
condition  = value ("<=" | "<" | ">=" | ">" | "==") number
value      = measure ["." ("mean" | "std" | "low" | "high")]        the mean where nothing is said
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from safecl.config import ConfigError
from safecl.sweeping.table import Cell, SweepTable

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
}
_PARTS = ("mean", "std", "low", "high")
_CONDITION = re.compile(r"(\S+)\s*(<=|>=|==|<|>)\s*([-+]?[0-9.]+(?:e[-+]?[0-9]+)?)", re.IGNORECASE)


@dataclass(frozen=True)
class Value:
    """A measure of a cell, and which of its numbers is meant."""

    measure: str
    part: str

    def of(self, cell: Cell) -> float | None:
        """Return the number; None where the cell has none."""
        found = cell.measures.get(self.measure)
        number: float | None = getattr(found, self.part) if found is not None else None
        return number


@dataclass(frozen=True)
class Condition:
    value: Value
    sign: str
    limit: float

    def holds(self, cell: Cell) -> bool:
        """Return whether the cell keeps it; a cell in which it was not measured does not."""
        number = self.value.of(cell)
        return number is not None and _OPERATORS[self.sign](number, self.limit)


@dataclass(frozen=True)
class Objective:
    """The value that the winner has most or least of, and the conditions that it must meet."""

    highest: bool
    value: Value
    conditions: tuple[Condition, ...] = ()

    def winner(self, cells: Sequence[Cell]) -> Cell | None:
        """Return the best cell that keeps all conditions, the first of equals; None where there is none."""
        fit = [cell for cell in cells if all(condition.holds(cell) for condition in self.conditions)]
        scored = [(score, cell) for cell in fit if (score := self.value.of(cell)) is not None]
        sign = -1.0 if self.highest else 1.0
        return min(scored, key=lambda pair: sign * pair[0], default=(0.0, None))[1]


def read_objective(text: str) -> Objective:
    """Read an objective. Raises ConfigError that shows the form."""
    match = re.fullmatch(r"\s*(max|min)\s+(\S+)(?:\s+where\s+(.+?))?\s*", text)
    if match is None:
        raise ConfigError(f"--pick {text!r}: write e.g. `max accuracy where asr.high <= 0.05`")
    conditions = [_condition(each, text) for each in re.split(r"\s+and\s+", match[3])] if match[3] else []
    return Objective(match[1] == "max", _value(match[2], text), tuple(conditions))


def check_objective(objective: Objective, table: SweepTable) -> None:
    """Raise ConfigError for a measure that no cell has, with the nearest one, and for an interval that it lacks."""
    for value in (objective.value, *(condition.value for condition in objective.conditions)):
        if value.measure not in table.measures:
            near = difflib.get_close_matches(value.measure, table.measures, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(table.measures)}"
            raise ConfigError(f"--pick: no cell has the measure {value.measure!r}; {hint}")
        if all(value.of(cell) is None for cell in table.cells):
            raise ConfigError(f"--pick: {value.measure} has no interval, so no {value.part}; use {value.measure} alone")


def _condition(text: str, whole: str) -> Condition:
    match = _CONDITION.fullmatch(text.strip())
    try:
        if match is None:
            raise ValueError
        return Condition(_value(match[1], whole), match[2], float(match[3]))
    except ValueError:
        raise ConfigError(f"--pick {whole!r}: {text!r} is no condition; write e.g. `asr.high <= 0.05`") from None


def _value(text: str, whole: str) -> Value:
    measure, dot, part = text.rpartition(".")
    if not dot:
        return Value(text, "mean")
    if part not in _PARTS:
        raise ConfigError(f"--pick {whole!r}: {text!r} has no {part!r}; there are {', '.join(_PARTS)}")
    return Value(measure, part)
