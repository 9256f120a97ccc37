"""Evaluations read back from results.json or a checkpoint. Numbers only: the answers are in outputs/."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from safecl.config import ConfigError
from safecl.config.texts import visible
from safecl.evaluation.results.moment import Evaluation

_EVALUATION = TypeAdapter(Evaluation)


def evaluation_from_dict(values: Mapping[str, Any]) -> Evaluation:
    """Read the result of Evaluation.to_dict. ValueError or KeyError where the values are not of that form."""
    # to_dict writes a task's name as its key, and puts the numbers of its value among its other fields
    tasks = {name: {**task, "name": name, "value": task} for name, task in values["tasks"].items()}
    return _EVALUATION.validate_python({**values, "tasks": tasks})


def evaluations_of(values: Iterable[Mapping[str, Any]], path: Path) -> list[Evaluation]:
    """Read the evaluations that a file holds. Raises ConfigError where one is not of that form."""
    found = []
    for each in values:
        try:
            found.append(evaluation_from_dict(each))
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigError(f"{path}: evaluation {visible(str(each.get('when')))}: {_wrong(error)}") from None
    return found


def _wrong(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return f"{visible(str(error))}; safecl did not write it so"
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{visible(where)}: {visible(first['msg'])}; safecl did not write it so"
