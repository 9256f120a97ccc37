"""Chooses among measured models: the front of those that no other beats, and the best that meets the gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safecl.evaluation.results.checks import GateResult
    from safecl.evaluation.results.moment import Evaluation


@dataclass(frozen=True)
class Measured:
    """A point of a sweep, what was measured there, and the gate's verdict where there is a gate."""

    settings: dict[str, Any]
    evaluation: Evaluation
    gate: GateResult | None = None

    @property
    def utility(self) -> float | None:
        """Mean over the tasks of their metric; one of which lower is better counts negative. None without tasks."""
        values = [task.value.value * (1 if task.higher_is_better else -1) for task in self.evaluation.tasks.values()]
        return sum(values) / len(values) if values else None

    @property
    def asr(self) -> float | None:
        """Attack success rate; None where it was not measured."""
        return self.evaluation.safety.asr.value if self.evaluation.safety else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; no text of answers."""
        gate = self.gate.to_dict() if self.gate else None
        return {"settings": self.settings, **self.evaluation.to_dict(), "utility": self.utility, "gate": gate}


def pareto_front(points: Sequence[Measured]) -> list[int]:
    """Return the indices of points that no other beats: none has both as low an ASR and as high a utility, and one of
    them better. A point without both values is not on the front."""
    known = [(i, p.asr, p.utility) for i, p in enumerate(points)]
    both = [(i, asr, utility) for i, asr, utility in known if asr is not None and utility is not None]
    return [
        i
        for i, asr, utility in both
        if not any(a <= asr and u >= utility and (a < asr or u > utility) for _, a, u in both)
    ]


def best_that_passes(points: Sequence[Measured]) -> int | None:
    """Return the index of the point with the highest utility of those that pass the gate; of equal ones that with the
    lowest ASR, then the first. None where no point passes."""
    passing = [i for i, point in enumerate(points) if point.gate is not None and point.gate.passed]

    def merit(i: int) -> tuple[float, float, int]:
        utility, asr = points[i].utility, points[i].asr
        assert utility is not None and asr is not None, "a choice by the gate needs both"
        return utility, -asr, -i

    return max(passing, key=merit, default=None)
