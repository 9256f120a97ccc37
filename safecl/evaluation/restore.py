"""Evaluations read back from results.json or a checkpoint: numbers only, without the answers, which stand in
outputs/."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from safecl.evaluation.measure import Evaluation
from safecl.evaluation.safety import SafetyResult
from safecl.evaluation.statistics.intervals import Mean, Rate
from safecl.evaluation.task import TaskResult

_NUMBERS = {"value", "low", "high", "hits", "n", "tokens"}


def evaluation_from_dict(values: Mapping[str, Any]) -> Evaluation:
    """The inverse of Evaluation.to_dict, but for texts and outputs. KeyError where the values are not of that form."""
    safety = _safety(values["safety"]) if values["safety"] is not None else None
    tasks = {name: _task(name, result) for name, result in values["tasks"].items()}
    return Evaluation(values["when"], values["step"], safety, tasks)


def _safety(values: Mapping[str, Any]) -> SafetyResult:
    fields = {}
    for name, value in values.items():
        if name in ("asr_by_scorer", "over_refusal_by_scorer"):
            value = {scorer: _measured(rate) for scorer, rate in value.items()}
        elif isinstance(value, Mapping) and "hits" in value:
            value = _measured(value)
        fields[name] = value
    return SafetyResult(**fields)


def _task(name: str, values: Mapping[str, Any]) -> TaskResult:
    details = {detail: _measured(value) for detail, value in values["details"].items()}
    return TaskResult(name, values["metric"], _measured(values), values["higher_is_better"], details)


def _measured(values: Mapping[str, Any]) -> Rate | Mean:
    numbers = {key: value for key, value in values.items() if key in _NUMBERS}
    if "hits" in numbers:
        return Rate(**numbers)
    # JSON has no infinities: an end that is not known is null there
    ends = {"value": math.nan, "low": -math.inf, "high": math.inf}
    return Mean(**{key: ends[key] if value is None else value for key, value in numbers.items()})
