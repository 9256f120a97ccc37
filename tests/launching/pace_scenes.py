"""The pace of the ranks of the pool."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

from safecl.distributed import collectives
from safecl.launching import stragglers


def late_rows_on_rank_1(folder: str) -> list[str]:
    """Six steps, compared every third. The matrix products of all ranks take one time."""
    said: list[str] = []
    with (
        mock.patch.object(stragglers, "STEPS", 3),
        mock.patch.object(stragglers.Probe, "median", lambda self: 0.001),
    ):
        pace = stragglers.Pace(["a", "b"], Path(folder), said.append)
        for step in range(1, 7):
            pace.step(step, seconds=2.0, waited=float(collectives.rank()))
    return said
