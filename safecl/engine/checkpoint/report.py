"""The report of a save, and the base model that state may refer to."""

from __future__ import annotations

from dataclasses import dataclass, field

from safecl.storage.sizes import format_bytes


@dataclass(frozen=True)
class BaseModel:
    """The model that a run begins with: its name in the config, and a hash of its weights in the run's dtype."""

    name: str
    digest: str


@dataclass
class SaveReport:
    """The result of a save. `problem` says why there is no checkpoint; older ones are untouched then."""

    name: str
    num_bytes: int = 0
    seconds_blocked: float = 0.0
    """Seconds that the training waited until all was copied to host memory."""
    seconds_written: float = 0.0
    problem: str | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.problem:
            return f"checkpoint {self.name} could not be saved: {self.problem}"
        times = f"{self.seconds_blocked:.2f} s copied, {self.seconds_written:.1f} s written in the background"
        return "; ".join([f"checkpoint {self.name}: {format_bytes(self.num_bytes)}, {times}", *self.notes])
