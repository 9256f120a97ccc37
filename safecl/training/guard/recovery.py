"""The gate acts: what a run does when a measurement fails (`safety.on_fail`).

    report             nothing; the gate decides at the end
    stop               end the run with the model that failed
    rollback           go back to the last state that passed, lower the learning rate, and go on from there
    corrective_replay  train on the memory until the probe recovers, measure again, and go on

Every action is an event in results.json. Rows depend on the step alone, so the steps after a rollback see the rows that
they saw before it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from safecl.config import RunConfig
from safecl.config.gate import CORRECT
from safecl.evaluation import GateResult
from safecl.methods.terms import ReplayTerm
from safecl.planning.plans import TaskPlan
from safecl.training.guard.measuring import Measurements
from safecl.training.guard.passed import PassedState
from safecl.training.resume import Progress, RunSaver
from safecl.training.run import Run


class EndedEarly(Exception):
    """The gate ends the run here; what is left of the tasks is not trained."""


class RolledBack(Exception):
    """The run is in the state of `progress` again, and goes on from there."""

    def __init__(self, progress: Progress):
        super().__init__()
        self.progress = progress


class Recovery:
    """Acts on the measurements of one run."""

    def __init__(self, run: Run, tasks: list[TaskPlan], saver: RunSaver, measured: Measurements, folder: Path):
        """tasks: all tasks of the run, in order. folder: the run folder."""
        self.run, self.tasks, self.measured = run, tasks, measured
        self.config: RunConfig = run.config
        safety = self.config.safety
        self.action = safety.on_fail if safety is not None else "report"
        self._passed = PassedState(run, saver, folder) if self.action == "rollback" else None

    def begin(self, progress: Progress, resumed: bool) -> None:
        """Take over what a resumed run has done before it was stopped. A collective call."""
        self.run.learning_rate_factor = progress.learning_rate_factor
        if self._passed is not None:
            self._passed.begin(resumed)

    def act(self, progress: Progress, parts_done: int) -> None:
        """Act on the last measurement. A collective call, after each measurement.

        parts_done: parts of the task that are done once the run comes back to this place. Raises EndedEarly or
        RolledBack.
        """
        gate = self.measured.last_gate()
        if gate is None or self.action == "report":
            return
        if gate.verdict != "failed":
            if gate.passed and self._passed is not None:
                self._passed.keep(dataclasses.replace(progress, parts_done=parts_done, evaluations=[]))
            return
        if self.run.task is None or self.run.task.config.role == "align":
            return  # the aligned model, which no task has changed
        {"stop": self._stop, "rollback": self._roll_back, CORRECT: self._correct}[self.action](progress, gate)

    # ---------------------------------------------------------------------------------------------------------- actions

    def _stop(self, progress: Progress, gate: GateResult) -> None:
        self._event(progress, gate, "stop")
        raise EndedEarly

    def _roll_back(self, progress: Progress, gate: GateResult) -> None:
        passed, times = self._passed, _times(progress, "rollback")
        assert passed is not None and self.config.safety is not None
        recovery = self.config.safety.recovery
        if (step := passed.step) is None:
            self.run.log("no earlier state passed the gate; the run ends here")
            self._event(progress, gate, "stop")
            raise EndedEarly
        if times >= recovery.max_times:
            self._end_with_the_last_that_passed(progress, gate, passed if step > 0 else None)
        failed_at, factor = self.run.global_step, progress.learning_rate_factor * recovery.learning_rate_factor
        back = passed.go_back(self.tasks)
        back = dataclasses.replace(
            back, num_tokens=progress.num_tokens, events=progress.events, learning_rate_factor=factor
        )
        self.run.learning_rate_factor = factor
        self._event(back, gate, "rollback", step=failed_at, back_to=self.run.global_step, learning_rate_factor=factor)
        self.measured.set_aside_since(self.run.global_step, times + 1)
        raise RolledBack(back)

    def _end_with_the_last_that_passed(self, progress: Progress, gate: GateResult, passed: PassedState | None) -> None:
        """End the run; `passed` is None where no trained state passed. The aligned model itself is no result of a
        run."""
        self._event(progress, gate, "stop")
        if passed is not None:
            passed.go_back(self.tasks)
            self.measured.set_aside_since(self.run.global_step, len(progress.events))
            progress.events[-1]["back_to"] = self.run.global_step
            self.measured.measure(self.run, f"end, step {self.run.global_step}")
        raise EndedEarly

    def _correct(self, progress: Progress, gate: GateResult) -> None:
        assert self.config.safety is not None and self.measured.probe is not None
        recovery, probe, times = self.config.safety.recovery, self.measured.probe, _times(progress, CORRECT)
        if times >= recovery.max_times:
            return
        steps, recovered = 0, False
        while steps < recovery.max_steps and not recovered:
            some = min(recovery.check_every, recovery.max_steps - steps)
            draw = ReplayTerm(f"gate {times} {steps}", ce_weight=1.0)
            self.run.correct(some, draw, learning_rate=recovery.learning_rate, of_average=True)
            steps += some
            recovered = probe.has_recovered(probe.look(self.run))
        self._event(progress, gate, CORRECT, steps=steps, recovered=recovered)
        when = self.measured.evaluations[-1].when.removeprefix("after ")
        self.measured.measure(self.run, f"corrected {when}")

    def _event(self, progress: Progress, gate: GateResult, action: str, **facts: Any) -> None:
        failed = [check.message for check in gate.checks if check.verdict == "failed"]
        when = self.measured.evaluations[-1].when
        event = {"action": action, "when": when, "step": self.run.global_step, "failed": failed} | facts
        progress.events.append(event)
        told = {
            "stop": "the run ends here",
            "rollback": f"back to step {facts.get('back_to')}, learning rate times {facts.get('learning_rate_factor')}",
            CORRECT: f"{facts.get('steps')} steps on the memory",
        }
        self.run.log(f"safety gate failed {when} ({', '.join(failed) or gate.verdict}); {told[action]}")

    def finish(self) -> None:
        """Remove the files that only an unfinished run needs. A collective call."""
        if self._passed is not None:
            self._passed.finish()

    def close(self, timeout: float) -> None:
        """Free everything, after at most `timeout` seconds. Not a collective call."""
        if self._passed is not None:
            self._passed.close(timeout)


def _times(progress: Progress, action: str) -> int:
    return sum(event["action"] == action for event in progress.events)
