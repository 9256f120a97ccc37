"""The strength of replay and distillation in each step, which the controller may change while a run trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Steering:
    """A level between 0 and 1 by step, and the factors that it means. Without a controller both factors are 1."""

    share: Sequence[float] | None = None
    """Bounds of the factor of memory.replay_ratio; None without a controller."""
    weight: Sequence[float] | None = None
    """Bounds of the factor of the weights of replay and distillation."""
    levels: list[list[float]] = field(default_factory=list)
    """[first step, level], the last two: that of the step that is read ahead, and the one before."""

    def set(self, step: int, level: float) -> None:
        """Set the level from global step `step` on."""
        self.levels = [*(each for each in self.levels if each[0] < step), [float(step), level]][-2:]

    def level(self, step: int) -> float:
        """Return the level in global step `step`."""
        return next((level for first, level in reversed(self.levels) if first <= step), self.start)

    @property
    def start(self) -> float:
        """The level at which the replay ratio is the configured one, or the nearest."""
        if self.share is None or self.share[1] == self.share[0]:
            return 1.0
        return min(1.0, max(0.0, (1.0 - self.share[0]) / (self.share[1] - self.share[0])))

    def share_at(self, step: int) -> float:
        """Return the factor of the replay ratio in a step."""
        return self._between(self.share, step)

    def weight_at(self, step: int) -> float:
        """Return the factor of the weights of replay and distillation in a step."""
        return self._between(self.weight, step)

    def factors(self, step: int) -> tuple[float, float]:
        """Return both factors of a step."""
        return self.share_at(step), self.weight_at(step)

    def _between(self, bounds: Sequence[float] | None, step: int) -> float:
        return 1.0 if bounds is None else bounds[0] + self.level(step) * (bounds[1] - bounds[0])
