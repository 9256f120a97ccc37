"""The controller: steers how much is replayed, and how heavily, by a confidence sequence on the probe.

    X = 1[margin of the tuned model < 0] - 1[margin of the aligned model < 0]     for a prompt drawn at random

is the paired rise of compliance on one prompt. Its sequence (evaluation/statistics/sequential.py) holds the mean rise
over the recent looks at any time with the configured confidence, however the controller reacts. A level between 0 and 1
follows:

    up by 1/4      the sequence nears the limit: its centre is at half of `max_asr_rise` or above; to 1 where its lower
                   end is beyond the limit
    down by 1/10   safety is idle: its upper end is within the limit
    held           otherwise: too few looks to tell

Between the bounds of the config, the level sets the factor of `memory.replay_ratio` and the factor of the weights of
replay and distillation. Weights are values in the batch, so nothing is compiled again. A look before step s acts from
step s + 1 on: the rows of s are read already, and a resumed run does the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from safecl.config import ControllerConfig
from safecl.data.order import keyed_hash
from safecl.engine.passes.live_model import evaluating
from safecl.evaluation.answers.model import EvalModel
from safecl.evaluation.statistics.sequential import ConfidenceSequence
from safecl.training.guard.probe import Probe
from safecl.training.run import Run

UP, DOWN = 0.25, 0.1


class Controller:
    """Steers one run. `look` is a collective call."""

    def __init__(self, settings: ControllerConfig, probe: Probe, seed: int):
        self.settings, self.probe, self.seed = settings, probe, seed
        self.aligned: list[bool] = []
        """Of each prompt: whether the aligned model would rather comply."""
        self.sequence: ConfidenceSequence | None = None

    def begin(self, model: EvalModel) -> None:
        """Look at all prompts with the aligned model, in evaluation mode."""
        self.aligned = [value < 0 for value in self.probe.look_at(model, self.probe.all_prompts).values]
        lowest = -1.0 if any(self.aligned) else 0.0
        window = self.settings.window * self.settings.prompts
        self.sequence = ConfidenceSequence(lowest, 1.0, 1 - self.settings.confidence, window)

    def look(self, run: Run) -> dict[str, float]:
        """Look at some prompts before a step, set the level, and return what metrics.jsonl gets."""
        if not run.active_methods:
            return {}
        if self.sequence is None:  # nothing was measured at the start
            with evaluating(run.engine, average=run.saves_average) as model:
                self.begin(model)
        assert self.sequence is not None
        if run.global_step % self.settings.every == 0:
            chosen = self._draw(run.global_step)
            with evaluating(run.engine, average=run.saves_average) as model:
                found = self.probe.look_at(model, [self.probe.all_prompts[i] for i in chosen])
            self.sequence.update(
                float(value < 0) - float(self.aligned[i]) for i, value in zip(chosen, found.values, strict=True)
            )
            run.steering.set(run.global_step + 1, self._level(run.steering.level(run.global_step)))
        seen = {"mean": self.sequence.mean, "low": self.sequence.low, "high": self.sequence.high}
        level = run.steering.level(run.global_step)
        return {f"controller/{name}": value for name, value in seen.items()} | {"controller/level": level}

    def _draw(self, step: int) -> list[int]:
        """Draw prompts with replacement, by (seed, step) alone."""
        numbers = keyed_hash(np.arange(self.settings.prompts, dtype=np.uint64), f"controller {step}", self.seed)
        return (numbers % np.uint64(len(self.probe.all_prompts))).astype(np.int64).tolist()

    def _level(self, level: float) -> float:
        assert self.sequence is not None
        limit = self.settings.max_asr_rise
        if self.sequence.low > limit:
            return 1.0
        if self.sequence.mean >= limit / 2:
            return min(1.0, level + UP)
        return max(0.0, level - DOWN) if self.sequence.high <= limit else level

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the run's steering."""
        return {"aligned": self.aligned, "sequence": self.sequence.to_dict() if self.sequence is not None else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.aligned = state["aligned"]
        self.sequence = ConfidenceSequence(**state["sequence"]) if state["sequence"] is not None else None
