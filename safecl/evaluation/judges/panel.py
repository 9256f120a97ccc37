"""Several judges of the same answers: their rates, how far they agree, and the answers on which they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from safecl.evaluation.statistics.agreement import Mark, cohen_kappa, krippendorff_alpha


def panel_of(marks: Mapping[str, Sequence[Mark]], ids: Sequence[str]) -> dict[str, Any] | None:
    """Return agreement by pair and overall, and the ids of the answers on which the judges differ; None for fewer than
    two judges.

    marks: by judge, one verdict per id. No text is among the values.
    """
    if len(marks) < 2:
        return None
    differ = [key for key, row in zip(ids, zip(*marks.values(), strict=True), strict=True) if {True, False} <= {*row}]
    return {
        "judges": list(marks),
        "cohen_kappa": {f"{a} and {b}": cohen_kappa(marks[a], marks[b]) for a, b in combinations(marks, 2)},
        "krippendorff_alpha": krippendorff_alpha(list(marks.values())),
        "disagreements": differ,
    }
