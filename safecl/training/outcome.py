"""The end of a run: with results, stopped by a signal, or with an error."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safecl.evaluation import GateResult


class TrainingFailed(RuntimeError):
    """The run cannot continue; the message says at which step and why. Exit code 1."""


class Stopped(Exception):
    """A signal asked the run to end, and its state is being saved."""


@dataclass
class RunResult:
    """The result of a run: its folder, everything measured (as in results.json), and the gate's verdict where there is
    a gate."""

    folder: Path
    results: dict[str, Any] = field(default_factory=dict)
    gate: GateResult | None = None
    stopped: bool = False
    """True where a signal ended the run after a step. Its state is saved, and the same command resumes it."""

    @property
    def skipped_steps(self) -> int:
        """Steps without a finite gradient, which left the weights as they were."""
        return int(self.results.get("skipped_steps", 0))

    @property
    def skipped_at_the_end(self) -> int:
        """Those of them that were the run's last steps, in a row. The saved weights are from before them."""
        return int(self.results.get("skipped_at_the_end", 0))
