"""Evaluations read back from results.json or a checkpoint. Numbers only: the answers are in outputs/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from safecl.evaluation.measure import Evaluation

_EVALUATION = TypeAdapter(Evaluation)


def evaluation_from_dict(values: Mapping[str, Any]) -> Evaluation:
    """Read the result of Evaluation.to_dict. ValueError or KeyError where the values are not of that form."""
    # to_dict writes a task's name as its key, and puts the numbers of its value among its other fields
    tasks = {name: {**task, "name": name, "value": task} for name, task in values["tasks"].items()}
    return _EVALUATION.validate_python({**values, "tasks": tasks})
