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

from safecl.distributed import collectives
from safecl.distributed.progress import phase
from safecl.engine.checkpoint.model_export import save_model
from safecl.engine.passes.live_model import LiveModel, evaluating
from safecl.evaluation import Evaluation, GateResult, evaluate, judge_gate
from safecl.evaluation.answers.model import EvalModel
from safecl.evaluation.gates.outcomes import outputs_file, read_records
from safecl.evaluation.restore import evaluation_from_dict
from safecl.evaluation.serving.models import answered_by_vllm
from safecl.evaluation.serving.server import VLLM_LOG
from safecl.planning.plans import RunPlan, TaskPlan
from safecl.report.folder import MEASURED
from safecl.storage.durable import replace_file
from safecl.training.console import Console
from safecl.training.run import Run

MEASURED_MODEL = ".measured-model"
"""The folder of the weights that a server answers with, while it does."""


class Measurements:
    """All evaluations of a run so far. Its methods measure where the config asks for it; they are collective calls."""

    def __init__(self, plan: RunPlan, folder: Path, console: Console):
        """folder: the run folder; each answer is written into its outputs/."""
        self.plan, self.folder, self.console = plan, folder, console
        self.evaluations: list[Evaluation] = []

    def restore(self, evaluations: list[dict[str, Any]]) -> None:
        """Take over what `to_dicts` returned before the run was stopped. Not a collective call."""
        self.evaluations = [evaluation_from_dict(values) for values in evaluations]

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the evaluations in the form of results.json. Not a collective call."""
        return [evaluation.to_dict() for evaluation in self.evaluations]

    def before_task(self, run: Run, index: int) -> None:
        """Measure the given model, and the one that an alignment task has made."""
        task = self.plan.tasks[index]
        if index == 0:
            self.measure(run, "start")
        elif task.config.role != "align" and self.plan.tasks[index - 1].config.role == "align":
            self.measure(run, f"before {task.config.name}")

    def between_steps(self, run: Run, task: TaskPlan) -> None:
        """Measure before every `safety.every`-th step.

        Measuring before a step, and not after the previous one, lets a run that is resumed here measure what is
        missing, and nothing twice.
        """
        every = self.plan.config.safety.every if self.plan.config.safety is not None else "never"
        if not isinstance(every, int) or run.step == 0 or run.step % every:
            return
        when = f"{task.config.name} step {run.step}"
        if all(done.when != when for done in self.evaluations):
            self.measure(run, when)

    def after_task(self, run: Run, task: TaskPlan) -> None:
        self.measure(run, f"after {task.config.name}")

    def measure(self, run: Run, when: str) -> None:
        """Measure the model that the run would save now, keep the result, and print it."""
        config = self.plan.config
        if config.safety is not None and config.safety.every == "never":
            return
        if (found := self.ask(run, when)) is None:
            return
        found = replace(found, gate=self.judge(found))
        self.evaluations.append(found)
        if collectives.rank() == 0:
            found.write_outputs(self.folder / "outputs", config.privacy.examples)
            replace_file(self.folder / MEASURED, json.dumps({"evaluations": self.to_dicts()}))
        self.console.measured(found)

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
            self._answering(run, live) as model,
        ):
            return evaluate(
                model,
                plan.tokenizer,
                when=when,
                step=run.global_step,
                safety=plan.config.safety,
                prompts=plan.prompts,
                benign=plan.benign,
                tasks=tasks,
            )

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


def aligned_moment(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """Return the measurement of the aligned model: the last one at the start or before a task; None where there is
    none."""
    moments = [each for each in evaluations if each.when == "start" or each.when.startswith("before ")]
    return next((each for each in reversed(moments) if each.safety is not None), None)
