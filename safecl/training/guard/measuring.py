"""Measures the model of a run: at the start, between steps, after each task. The gate judges each measurement; the last
one decides.

Limits on a rise compare with the aligned model: the measurement at the start, or the one after an alignment task.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safecl.config import ProbeConfig
from safecl.config.gate import CORRECT
from safecl.distributed import collectives
from safecl.distributed.progress import phase
from safecl.engine.artifacts.store import ask_first_rank
from safecl.engine.checkpoint.model_export import save_model
from safecl.engine.passes.live_model import LiveModel, evaluating
from safecl.evaluation import Evaluation, GateResult, evaluate, judge_gate
from safecl.evaluation.answers.model import EvalModel
from safecl.evaluation.gates.outcomes import outputs_file, read_records
from safecl.evaluation.records import rename_outputs
from safecl.evaluation.results.restore import evaluation_from_dict
from safecl.evaluation.serving.models import answered_by_vllm
from safecl.evaluation.serving.server import VLLM_LOG
from safecl.planning.plans import RunPlan, TaskPlan
from safecl.report.folder import MEASURED
from safecl.storage.durable import replace_file
from safecl.storage.model_folder import tuned_model
from safecl.training.guard.controller import Controller
from safecl.training.guard.drift import Drift, weight_drift
from safecl.training.guard.probe import Probe
from safecl.training.output.console import Console
from safecl.training.run import Run

MEASURED_MODEL = ".measured-model"
"""The folder of the weights that a server answers with, while it does."""
ROLLED_BACK = "rolled back"


class Measurements:
    """All evaluations of a run so far. Its methods measure where the config asks for it; they are collective calls."""

    def __init__(self, plan: RunPlan, folder: Path, console: Console):
        """folder: the run folder; each answer is written into its outputs/."""
        self.plan, self.folder, self.console = plan, folder, console
        self.evaluations: list[Evaluation] = []
        safety = plan.config.safety
        needs_probe = safety is not None and (
            safety.probe is not None or safety.controller is not None or safety.on_fail == CORRECT
        )
        self.probe = Probe(plan, safety.probe or ProbeConfig()) if safety is not None and needs_probe else None
        """None where the run has no probe."""
        self.drift = Drift(plan, safety.drift, folder) if safety is not None and safety.drift is not None else None
        self.controller = (
            Controller(safety.controller, self.probe, plan.config.train.seed)
            if safety is not None and safety.controller is not None and self.probe is not None
            else None
        )

    def restore(self, evaluations: list[dict[str, Any]], probe: dict[str, Any] | None = None) -> None:
        """Take over what `to_dicts` and `probe_state` returned before the run was stopped. Not a collective call."""
        self.evaluations = [evaluation_from_dict(values) for values in evaluations]
        if self.probe is not None and probe is not None:
            self.probe.load_state_dict(probe)
            if self.controller is not None:
                self.controller.load_state_dict(probe["controller"])

    def probe_state(self) -> dict[str, Any] | None:
        """Return the state of the probe; None without one. Not a collective call."""
        if self.probe is None:
            return None
        controller = self.controller.state_dict() if self.controller is not None else None
        return self.probe.state_dict() | {"controller": controller}

    def reopen(self) -> None:
        """Read the files of the run folder that the next measurements of a resumed run need, after `restore`. Raises
        ConfigError where one is missing or damaged. Not a collective call."""
        if self.drift is not None and aligned_moment(self.evaluations) is not None:
            self.drift.reopen()

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the evaluations in the form of results.json. Not a collective call."""
        return [evaluation.to_dict() for evaluation in self.evaluations]

    def before_task(self, run: Run, index: int) -> bool:
        """Measure the given model, and the one that an alignment task has made. Return whether it did."""
        task = self.plan.tasks[index]
        if index == 0:
            return self.measure(run, "start")
        if task.config.role != "align" and self.plan.tasks[index - 1].config.role == "align":
            return self.measure(run, f"before {task.config.name}")
        return False

    def between_steps(self, run: Run, task: TaskPlan) -> bool:
        """Measure before every `safety.every`-th step. Return whether it did.

        Measuring before a step, and not after the previous one, lets a run that is resumed here measure what is
        missing, and nothing twice.
        """
        every = self.plan.config.safety.every if self.plan.config.safety is not None else "never"
        if not isinstance(every, int) or run.step == 0 or run.step % every:
            return False
        when = f"{task.config.name} step {run.step}"
        return all(done.when != when for done in self.evaluations) and self.measure(run, when)

    def after_task(self, run: Run, task: TaskPlan) -> bool:
        return self.measure(run, f"after {task.config.name}")

    def look(self, run: Run) -> dict[str, float]:
        """Look at the probe before every `safety.probe.every`-th step, and let the controller look; return what they
        say, for metrics.jsonl."""
        safety, found = self.plan.config.safety, dict[str, float]()
        if self.probe is None or safety is None:
            return found
        with phase("evaluation"):
            if safety.probe is not None and run.global_step % safety.probe.every == 0:
                seen = self.probe.look(run)
                found = {"probe/margin": seen.mean, "probe/complying": seen.complying.value}
            if self.controller is not None:
                found |= self.controller.look(run)
        return found

    def measure(self, run: Run, when: str) -> bool:
        """Measure the model that the run would save now, keep the result, and print it. Return whether there is
        anything to measure."""
        config = self.plan.config
        if config.safety is not None and config.safety.every == "never":
            return False
        if (found := self.ask(run, when)) is None:
            return False
        found = replace(found, gate=self.judge(found))
        self.evaluations.append(found)
        if collectives.rank() == 0:
            found.write_outputs(self.folder / "outputs", config.privacy.examples)
            replace_file(self.folder / MEASURED, json.dumps({"evaluations": self.to_dicts()}))
        self.console.measured(found)
        return True

    def ask(self, run: Run, when: str) -> Evaluation | None:
        """Measure the model that the run would save now; None where the config measures nothing."""
        plan = self.plan
        tasks = [
            (task.config.name, task.config.eval, task.eval_rows)
            for task in plan.tasks
            if task.config.eval is not None and task.eval_rows
        ]
        if not plan.prompts and not tasks:
            return None
        with (
            phase("evaluation"),
            self.console.working(f"{when}: measuring"),
            evaluating(run.engine, average=run.saves_average, many_passes=not self._is_served) as live,
        ):
            with self._answering(run, live) as model:
                found = evaluate(
                    model,
                    plan.tokenizer,
                    when=when,
                    step=run.global_step,
                    safety=plan.config.safety,
                    prompts=plan.prompts,
                    benign=plan.benign,
                    tasks=tasks,
                )
            return self._looked_at(found, live)

    def _looked_at(self, found: Evaluation, live: LiveModel) -> Evaluation:
        """Add what the probe and the distance from the aligned model say of the model that was measured."""
        aligned = is_aligned(found.when)
        if self.probe is not None:
            found = replace(found, probe=self.probe.beside(found, live, is_aligned=aligned))
        if self.controller is not None and aligned:
            self.controller.begin(live)
        if self.drift is not None:
            found = replace(found, kl_to_aligned=self.drift.measure(live, is_aligned=aligned))
        return found

    @property
    def _is_served(self) -> bool:
        safety = self.plan.config.safety
        return safety is not None and safety.backend == "vllm"

    @contextmanager
    def _answering(self, run: Run, live: LiveModel) -> Iterator[EvalModel]:
        """Yield the live model, or with `safety.backend: vllm` one whose answers come from a server of its weights.

        The weights lie in a folder of the run folder meanwhile.
        """
        safety = self.plan.config.safety
        if safety is None or not self._is_served:
            yield live
            return
        folder = self.folder / MEASURED_MODEL
        save_model(run.engine, self.plan.tokenizer, folder)
        try:
            with answered_by_vllm(live, folder.absolute(), safety.vllm, self.folder / VLLM_LOG) as model:
                yield model
        finally:
            if collectives.rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)

    def last_gate(self) -> GateResult | None:
        """Return the gate's verdict on the last measurement as it was made. Not a collective call."""
        return self.evaluations[-1].gate if self.evaluations else None

    def weight_drift(self) -> dict[str, dict[str, float]] | None:
        """Return the distance of the saved weights from those of the start, by layer; None where the config does not
        ask. A collective call, after the models are saved."""
        tuned = tuned_model(self.folder)
        if self.drift is None or tuned is None:
            return None
        return ask_first_rank(lambda: weight_drift(self.plan.config.model.path, tuned))

    def finish(self) -> None:
        """Remove the files that only an unfinished run needs. Not a collective call."""
        if self.drift is not None and collectives.rank() == 0:
            self.drift.finish()

    def set_aside_since(self, step: int, number: int) -> None:
        """Mark the measurements after `step`, whose steps a rollback has undone. They stay in the results, since they
        are moments of the run. number: of the rollback."""
        for i, found in enumerate(self.evaluations):
            if found.step > step and not found.when.startswith(ROLLED_BACK):
                when = f"{ROLLED_BACK} {number}: {found.when}"
                if collectives.rank() == 0:
                    rename_outputs(self.folder / "outputs", found.step, found.when, when)
                self.evaluations[i] = replace(found, when=when)

    def verdict(self) -> GateResult | None:
        """Return the gate's verdict on the last evaluation; None without a gate. Not a collective call."""
        return self.judge(self.evaluations[-1]) if self.evaluations else None

    def judge(self, found: Evaluation) -> GateResult | None:
        """Judge an evaluation, kept or new, by the config's gate, which may be another than that of a run before a
        resume."""
        evaluations = self.evaluations if found in self.evaluations else [*self.evaluations, found]
        safety = self.plan.config.safety
        if safety is None or safety.gate is None or found.safety is None:
            return None
        reference = None
        if safety.gate.is_relative and (aligned := aligned_moment(evaluations)) is not None:
            reference = self._with_outputs(aligned).safety.outputs  # type: ignore[union-attr]
        return judge_gate(safety.gate, self._with_outputs(found), reference or None)

    def _with_outputs(self, evaluation: Evaluation) -> Evaluation:
        """Return the evaluation with its records of safety, which a resumed run reads from its outputs/."""
        path = outputs_file(self.folder / "outputs", evaluation.when, evaluation.step)
        if evaluation.safety is None or evaluation.safety.outputs or not path.is_file():
            return evaluation
        return replace(evaluation, safety=replace(evaluation.safety, outputs=read_records(path)))


def is_aligned(when: str) -> bool:
    """Return whether the model of this moment is the aligned one."""
    return when == "start" or when.startswith("before ")


def aligned_moment(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """Return the measurement of the aligned model: the last one at the start or before a task; None where there is
    none."""
    moments = [each for each in evaluations if is_aligned(each.when)]
    return next((each for each in reversed(moments) if each.safety is not None), None)
