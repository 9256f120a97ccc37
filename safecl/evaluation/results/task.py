"""The utility of a model on one task at one moment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from safecl.evaluation.statistics.intervals import Mean, Rate


@dataclass(frozen=True)
class TaskResult:
    """One task's utility with a 95 % interval. `details`: further rates of the same answers. `outputs`: one record per
    row."""

    name: str
    metric: str
    value: Rate | Mean
    higher_is_better: bool
    details: dict[str, Rate | Mean] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    outputs: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for results.json; no text."""
        details = {name: value.to_dict() for name, value in self.details.items()}
        return {
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            **self.value.to_dict(),
            "details": details,
        }
