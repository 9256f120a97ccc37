"""The evaluation at one moment of a run: safety and the utility of each task."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safecl.evaluation.records import Privacy, file_name, write_outputs
from safecl.evaluation.results.checks import GateResult
from safecl.evaluation.results.probed import ProbeResult
from safecl.evaluation.results.safety import SafetyResult
from safecl.evaluation.results.task import TaskResult
from safecl.evaluation.statistics.intervals import Mean, Rate


@dataclass(frozen=True)
class Evaluation:
    """The measurements of one moment; `when` names it ("start", "after sst2")."""

    when: str
    step: int
    """Optimizer steps before this moment, over all tasks."""
    safety: SafetyResult | None = None
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    """By task name."""
    warnings: tuple[str, ...] = ()
    """Reasons to distrust the scores; no text of rows."""
    gate: GateResult | None = None
    """The gate's verdict on this moment; None without a gate."""
    probe: ProbeResult | None = None
    """The probe at this moment; None without `safety.probe`."""
    kl_to_aligned: Mean | None = None
    """KL from the aligned model on the users' rows, nats per token; None without `safety.drift`."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for results.json; no text."""
        tasks = {name: result.to_dict() for name, result in self.tasks.items()}
        return {
            "when": self.when,
            "step": self.step,
            "safety": self.safety.to_dict() if self.safety else None,
            "tasks": tasks,
            **({"warnings": list(self.warnings)} if self.warnings else {}),
            **({"gate": self.gate.to_dict()} if self.gate is not None else {}),
            **({"probe": self.probe.to_dict()} if self.probe is not None else {}),
            **({"kl_to_aligned": self.kl_to_aligned.to_dict()} if self.kl_to_aligned is not None else {}),
        }

    def write_outputs(self, folder: str | Path, privacy: Privacy = "full") -> list[Path]:
        """Write one JSONL file for safety and one per task, `<step>-<when>-<what>.jsonl`. Rank 0 calls it."""
        parts = ({"safety": self.safety.outputs} if self.safety else {}) | {
            name: result.outputs for name, result in self.tasks.items()
        }
        stem = f"{self.step:06d}-{file_name(self.when)}"
        return [
            write_outputs(Path(folder) / f"{stem}-{file_name(what)}.jsonl", rows, privacy)
            for what, rows in parts.items()
        ]

    def one_line(self) -> str:
        """Return the headline numbers for the log, ASR never alone."""
        parts = []
        if self.safety:
            parts.append(f"ASR {_number(self.safety.asr)} ({self.safety.scorer})")
            parts.append(f"affirmative {_number(self.safety.affirmative)}")
            if self.safety.complied:
                parts.append(f"complied {_number(self.safety.complied)}")
            parts.append(f"off-task {_number(self.safety.off_task)}")
            if self.safety.over_refusal:
                parts.append(f"over-refusal {_number(self.safety.over_refusal)}")
            if self.safety.cut_off:
                parts.append(f"thoughts cut off {_number(self.safety.cut_off)}")
        if self.probe:
            parts.append(f"probe {self.probe.margin:+.2f}")
        if self.kl_to_aligned:
            parts.append(f"KL {self.kl_to_aligned.value:.3f}")
        parts += [f"{name} {result.metric} {result.value.value:.3f}" for name, result in self.tasks.items()]
        return f"{self.when}: " + ", ".join(parts)


def _number(rate: Rate) -> str:
    return f"{rate.value:.3f}" if math.isfinite(rate.value) else "undecided"
