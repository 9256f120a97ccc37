"""The training run: tasks one after the other, measured before and after, saved as Hugging Face folders.

Read it from the top down:

  Trainer.fit         plan (made before any process group exists) -> run folder -> engine -> tasks -> results
  Trainer._run_task   the parts of a task, in order
  Trainer._train      the steps of a task, and its checkpoints
  Run.train_step      one step (run.py)

A run that was stopped or killed is resumed from its folder: the newest whole checkpoint says which part of which task
comes next.

Elsewhere: gradients are clipped in engine/zero/clipping.py, the rows of a replay draw are chosen in
replay/selection/draws.py, a checkpoint is published in engine/checkpoint/publishing.py, and the gate decides in
evaluation/gates/gate.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from safecl.config import RunConfig
from safecl.distributed import collectives, environment
from safecl.distributed.progress import STEP, phase, step_took
from safecl.distributed.signals import StopRequest
from safecl.distributed.watchdog import watching
from safecl.engine.artifacts.memory_prompts import with_memory_rows
from safecl.engine.artifacts.store import ask_first_rank
from safecl.engine.checkpoint.model_export import ModelNotFinite
from safecl.engine.checkpoint.report import SaveReport
from safecl.launching.stragglers import Pace
from safecl.planning.costs.memory_report import refuse_what_does_not_fit, settle_memory
from safecl.planning.plans import RunPlan, TaskPlan
from safecl.planning.run_plan import plan_run
from safecl.report.card import Card
from safecl.report.skipped import skipped_sentence
from safecl.training.end_merge_choice import merge_by_gate
from safecl.training.folder import RunFolder
from safecl.training.guard.measuring import Measurements
from safecl.training.guard.recovery import EndedEarly, Recovery, RolledBack
from safecl.training.identity import base_of, identity_of, refuse_folder_of_other_run
from safecl.training.nonfinite import cause_of_skip, fault_in_state
from safecl.training.opening import open_run, stop_keeping_memory
from safecl.training.outcome import RunResult, Stopped, TrainingFailed
from safecl.training.output.console import Console, StepLines
from safecl.training.output.metrics_log import MetricsLog, step_values
from safecl.training.output.model_card import card_of
from safecl.training.output.provenance import provenance_of
from safecl.training.output.results import (
    complete_folder,
    remove_what_only_an_unfinished_run_needs,
    results_of,
    save_models,
    write_report,
)
from safecl.training.ranks import compare_ranks
from safecl.training.replay_memory import make_memory
from safecl.training.resume import Progress, RunSaver
from safecl.training.run import Run
from safecl.training.screening import screen_run

__all__ = ["RunResult", "Trainer", "TrainingFailed"]

SECONDS_FOR_THE_LAST_SAVE = 20.0
"""A run that fails waits at most this long for a checkpoint that is being written. With the time that a launcher needs,
no rank outlives another by more than 30 s."""


class Trainer:
    """`Trainer(config).fit()` is the Python twin of `safecl train`; every rank calls it.

    It resumes a run that was stopped in the folder, and reports one that is finished there; with `fresh` it refuses a
    folder that holds a run. Raises ConfigError before anything is trained, TrainingFailed while running.
    """

    def __init__(self, config: RunConfig, plan: RunPlan | None = None, *, fresh: bool = False):
        self.folder = Path(config.output)
        self.fresh = fresh
        self.console = Console(config.log.every, rank=environment.rank())
        self.plan = plan or plan_run(with_memory_rows(config, self.console.note, before=plan_run))
        self.config = self.plan.config
        self.progress = Progress()
        self._files = RunFolder(self.folder)
        self._metrics = MetricsLog(None, config)
        self._saved_at: tuple[int, int, int] | None = None
        self._reported: SaveReport | None = None
        self._pace: Pace | None = None
        self._stop = StopRequest(announce=False)

    def fit(self) -> RunResult:
        """Run all tasks and return what was measured.

        SIGTERM, SIGINT, SIGUSR1 and SIGHUP end it after the current step, with `stopped` set; a second Ctrl-C raises
        KeyboardInterrupt at once.
        """
        self._began = time.perf_counter()
        self.measured = Measurements(self.plan, self.folder, self.console)
        with (
            self.console,
            StopRequest(announce=environment.rank() == 0) as self._stop,
            watching(self.folder, self.config.train.hang_timeout) as watchdog,
        ):
            try:
                self._take_folder()
                self.console.plan(self.plan)
                if (finished := self._finished_before()) is not None:
                    return finished
                with phase("collective start"):
                    collectives.init_distributed()
                    watchdog.attach()
                self.config, self._pace = compare_ranks(self.plan, self.folder, self.console.note)
                self.config = settle_memory(self.plan)
                refuse_what_does_not_fit(self.plan)
                result = self._run()
                watchdog.close(together=True)
                return result
            finally:
                if self.plan.keeps_freed_memory:
                    stop_keeping_memory()
                self._files.release()

    @property
    def was_asked_to_stop(self) -> bool:
        """Whether a signal came during `fit`, also one that came too late to stop the run."""
        return self._stop.requested

    def _run(self) -> RunResult:
        run = open_run(self.plan, self._files, self.console)
        self._identity = identity_of(self.plan, run.base_digest)
        self._saver = RunSaver(run, self.folder, self._identity, base_of(self.config, run.base_digest))
        self._recovery = Recovery(run, self.plan.tasks, self._saver, self.measured, self.folder)
        try:
            self._resume(run)
            self._run_tasks(run)
            return self._finish(run)
        except Stopped:
            return self._end_stopped(run)
        finally:
            self._close(run)

    # ----------------------------------------------------------------------------------------------------------- start

    def _take_folder(self) -> None:
        if environment.rank() == 0:
            if (note := self._files.lock()) is not None:
                self.console.note(note)
            self._files.forget_exit_code()
            self._files.remember()
        if self.fresh:
            self._files.refuse_to_overwrite()
        refuse_folder_of_other_run(self._files, self.plan)

    def _finished_before(self) -> RunResult | None:
        """Return the results that the folder holds already. A run that was killed after results.json is completed."""
        results = self._files.results()
        if results is None:
            return None
        self.console.note(
            f"{self.folder} holds this run, finished after {results['steps']} steps; "
            "to train again choose another folder"
        )
        if environment.rank() == 0:
            complete_folder(self.folder, self.console)
        self.measured.restore(results["evaluations"])
        gate = self.measured.verdict()
        self.console.results(self.measured.evaluations, gate, self.folder)
        return RunResult(self.folder, results, gate)

    def _resume(self, run: Run) -> None:
        """Restore the newest checkpoint, or start from the beginning."""
        resumed = self._saver.resume(self.console.note, self.plan.tasks)
        self.progress = resumed.progress if resumed is not None else Progress()
        self.measured.restore(self.progress.evaluations, self.progress.probe)
        self.measured.reopen()
        self._recovery.begin(self.progress, resumed is not None)
        folder = self.folder if collectives.rank() == 0 else None
        earlier = resumed.metrics if resumed is not None else b""
        self._metrics = MetricsLog(folder, self.config, earlier, run.global_step)
        self._began -= self.progress.seconds
        self._saved_at = self._position(run) if resumed is not None else None
        if resumed is not None:
            self.console.note(f"resuming from {resumed.name}, step {run.global_step}")
            for note in resumed.notes:
                self.console.note(note)
        elif self.config.checkpoint.every != "never":
            self._saver.check_room(self.console.note, self.config.checkpoint.keep)

    # ----------------------------------------------------------------------------------------------------------- tasks

    def _run_tasks(self, run: Run) -> None:
        """Run what is left of the tasks, unless the gate ends the run."""
        while self.progress.task < len(self.plan.tasks):
            try:
                self._run_task(run, self.plan.tasks[self.progress.task])
            except RolledBack as back:
                self._go_back(run, back.progress)
            except EndedEarly:
                return

    def _go_back(self, run: Run, progress: Progress) -> None:
        """Continue from the place in `progress`, whose state is restored. Checkpoints of the course that is left go
        once the new place is saved."""
        self.progress, self._saved_at = progress, None
        if self.config.checkpoint.every != "never":
            self._save(run)
            self._report_save(report := self._saver.settle())
            if report is not None and report.problem is None:
                self._saver.leave_later(report.name)

    def _run_task(self, run: Run, task: TaskPlan) -> None:
        """Do the parts of a task in order; a resumed run begins with the first that is not done."""
        parts: list[Callable[[Run, TaskPlan], None]] = [
            self._measure_before,
            self._screen,
            self._fill_memory,
            self._begin,
            self._train,
            self._measure_after,
            self._hand_over,
        ]
        for part in parts[self.progress.parts_done :]:
            with phase("preparation"):
                part(run, task)
            self.progress.parts_done += 1
            if part == self._train and self.config.checkpoint.every != "never":
                self._save(run)
            if part == parts[-1]:
                self.progress.task, self.progress.parts_done = self.progress.task + 1, 0
            self._end_where_asked(run, collectives.any_rank(self._must_end()))

    def _measure_before(self, run: Run, task: TaskPlan) -> None:
        if self.measured.before_task(run, self.progress.task):
            self._recovery.act(self.progress, self.progress.parts_done + 1)

    def _screen(self, run: Run, task: TaskPlan) -> None:
        """Screen all tasks before the first that methods act on: until then the weights are the aligned model's."""
        if self.config.scan is not None and run.tasks and task is run.tasks[0]:
            screen_run(run, self.plan.tokenizer, self.console, self.folder)

    def _fill_memory(self, run: Run, task: TaskPlan) -> None:
        """Fill the memory before the first task that methods act on."""
        rows = self.plan.memory
        if task.config.role != "align" and rows is not None and run.memory is None:
            folder, tokenizer = self._saver.memory_folder, self.plan.tokenizer
            run.memory = make_memory(run.engine, rows, self.config, tokenizer, folder=folder, note=run.log)

    def _begin(self, run: Run, task: TaskPlan) -> None:
        run.begin_task(task, active=task.config.role != "align")
        self.progress.skipped_in_a_row = 0

    def _train(self, run: Run, task: TaskPlan) -> None:
        every = self.config.checkpoint.every
        with self.console.progress(task.config.name, task.num_steps, run.step) as lines:
            while run.step < task.num_steps:
                if self.measured.between_steps(run, task):
                    self._recovery.act(self.progress, self.progress.parts_done)
                seen = self.measured.look(run)
                with phase(STEP):
                    stop = self._train_step(run, task, lines, seen)
                self._report_save(self._saver.checkpointer.peek())
                if isinstance(every, int) and run.global_step % every == 0 and run.step < task.num_steps:
                    self._save(run)
                self._end_where_asked(run, stop)

    def _measure_after(self, run: Run, task: TaskPlan) -> None:
        run.end_task()
        self._refuse_nonfinite(run, fault_in_state(run, ("weights", "ema")), "after the last update")
        merge_by_gate(run, self.measured)
        if self.measured.after_task(run, task):
            self._recovery.act(self.progress, self.progress.parts_done + 1)

    def _hand_over(self, run: Run, task: TaskPlan) -> None:
        """Start the next task from the saved model: swap in the average where the run saves it."""
        if run.saves_average and self.progress.task + 1 < len(self.plan.tasks):
            run.engine.shards.swap(run.engine.optimizer.tensors("ema"))

    # ------------------------------------------------------------------------------------------------------------ steps

    def _train_step(self, run: Run, task: TaskPlan, lines: StepLines, seen: dict[str, float]) -> bool:
        """Make one step and write its line in metrics.jsonl, with what the probe has seen before it; return True where
        a rank was asked to stop."""
        began, waited = time.perf_counter(), run.wait_seconds
        losses = run.train_step(task)
        losses.stop = self._must_end()
        applied = run.engine.optimizer.result.applied
        self.progress.skipped_in_a_row = 0 if applied else self.progress.skipped_in_a_row + 1
        run.skipped_steps += not applied
        totals = losses.totals()
        stop, nonfinite = totals.pop("stop") > 0, totals.pop("nonfinite") > 0
        seconds = time.perf_counter() - began
        step_took(seconds)
        if self._pace is not None:
            self._pace.step(run.global_step, seconds, run.wait_seconds - waited)
        values = step_values(run, task, totals, seconds) | seen
        self.progress.num_tokens += values["tokens"]
        self._metrics.write(values)
        lines.step(values)
        if nonfinite or not applied or not math.isfinite(totals["penalty"]):
            self._refuse_nonfinite(run, fault_in_state(run), "this step")
        if not applied:
            self._report_skipped(run, task)
        return stop

    def _refuse_nonfinite(self, run: Run, fault: str | None, since: str) -> None:
        """Fail the run where its state is not finite, before it is saved. fault: what `fault_in_state` has found."""
        if fault is not None:
            kept = self._saver.checkpoints.names()
            newest = f"the newest checkpoint, {kept[0]}, is from before" if kept else "there is no earlier checkpoint"
            raise TrainingFailed(
                f"step {run.global_step - 1}: {fault}; known since {since}. Nothing is saved of it; {newest}"
            )

    def _report_skipped(self, run: Run, task: TaskPlan) -> None:
        in_a_row = self.progress.skipped_in_a_row
        message = f"step {run.global_step - 1}: skipped, its gradient is not finite: {cause_of_skip(run, task)}"
        if in_a_row >= max(1, min(self.config.train.max_skipped_steps, task.num_steps // 4)):
            raise TrainingFailed(
                f"{message}; {in_a_row} in a row, the run stops; try a lower train.learning_rate or dtype: fp32"
            )
        self.console.note(message)

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def _position(self, run: Run) -> tuple[int, int, int]:
        return self.progress.task, self.progress.parts_done, run.global_step

    @phase("save")
    def _save(self, run: Run) -> None:
        """Start to save a checkpoint, unless this state is saved already."""
        if self._saved_at == self._position(run):
            return
        self.progress.seconds = time.perf_counter() - self._began
        self.progress.evaluations, self.progress.probe = self.measured.to_dicts(), self.measured.probe_state()
        self._report_save(self._saver.save(self.progress, self._metrics.so_far(), self.config.checkpoint.keep))
        self._saved_at = self._position(run)

    def _report_save(self, report: SaveReport | None) -> None:
        """Print how a save ended, once."""
        if report is not None and report is not self._reported:
            self.console.saved(report)
            self._reported = report

    def _must_end(self) -> bool:
        """Return whether this rank was asked to stop, or misses the run folder."""
        return self._stop.requested or self._files.has_vanished()

    def _end_where_asked(self, run: Run, stop: bool) -> None:
        """Save and end the run here. stop: the same on all ranks."""
        if stop:
            self._refuse_vanished_folder(run)
            self._save(run)
            raise Stopped

    def _refuse_vanished_folder(self, run: Run) -> None:
        """Fail the run on all ranks where rank 0 misses its folder. A collective call."""
        if collectives.any_rank(self._files.has_vanished()):
            raise TrainingFailed(f"step {run.global_step - 1}: {self._files.describe_loss()}")

    # -------------------------------------------------------------------------------------------------------------- end

    @phase("save")
    def _end_stopped(self, run: Run) -> RunResult:
        report = self._saver.settle()
        name, where = self._stop.name or "a signal", f"step {run.global_step}"
        if report is not None and report.problem is not None:
            raise TrainingFailed(
                f"{name} stopped the run after {where}, but {report}; the previous checkpoint is untouched"
            )
        self._report_save(report)
        self.console.note(f"{name}: stopped after {where}; the same command resumes from here")
        return RunResult(self.folder, stopped=True)

    @phase("export")
    def _finish(self, run: Run) -> RunResult:
        """Save the models last, so that their cards show what was measured; a run that is killed here does it again."""
        self._report_save(self._saver.settle())
        evaluations, gate = self.measured.evaluations, self.measured.verdict()
        num_tokens = self.progress.num_tokens
        at_the_end = self.progress.skipped_in_a_row
        skipped = skipped_sentence(run.global_step, run.skipped_steps, at_the_end)
        card = card_of(
            run, self.plan, self.folder.resolve().name, self._identity, num_tokens, evaluations, gate, skipped
        )
        passed = collectives.gather_objects([gate is None or gate.passed])[0]
        self.console.note(self._save_models(run, card, passed))
        self._refuse_vanished_folder(run)
        results = results_of(
            run,
            evaluations,
            gate,
            num_tokens=num_tokens,
            seconds=time.perf_counter() - self._began,
            metrics=self._metrics.so_far(),
            provenance=ask_first_rank(lambda: provenance_of(run, self.plan, self._identity, self.folder)),
            skipped_at_the_end=at_the_end,
            events=self.progress.events,
            drift=self.measured.weight_drift(),
        )
        if collectives.rank() == 0:
            self._files.write_results(results)
            write_report(self.folder, self.console)
            remove_what_only_an_unfinished_run_needs(self.folder)
        collectives.barrier()
        run.finish()
        self._recovery.finish()
        self.measured.finish()
        if skipped is not None:
            self.console.note(skipped)
        self.console.results(evaluations, gate, self.folder)
        return RunResult(self.folder, results, gate)

    def _save_models(self, run: Run, card: Card, passed: bool) -> str:
        try:
            return save_models(run, self.plan, self.folder, card, passed=passed)
        except ModelNotFinite as error:
            last = run.global_step - 1 - self.progress.skipped_in_a_row
            raise TrainingFailed(f"{error}; what the update of step {last} wrote was finite") from None

    def _close(self, run: Run) -> None:
        self._saver.close(SECONDS_FOR_THE_LAST_SAVE)
        self._recovery.close(SECONDS_FOR_THE_LAST_SAVE)
        run.close()
        if run.memory is not None:
            run.memory.buffer.close()
        self._metrics.close()
