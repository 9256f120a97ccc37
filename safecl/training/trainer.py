"""The training run: tasks one after the other, measured before and after, saved as Hugging Face folders.

plan (no process group yet) -> engine -> for each task: memory, anchors -> steps -> evaluation -> model folders,
results.json

A folder in which a run was stopped or killed is gone on with: its newest whole checkpoint says which part of which task
comes next.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from safecl.config import ConfigError, RunConfig, dump_config
from safecl.data import describe
from safecl.distributed import collectives, environment
from safecl.distributed.signals import StopRequest
from safecl.engine.artifacts.teacher_outputs import needs_outputs, shared_outputs
from safecl.engine.checkpoint.model_export import save_model
from safecl.engine.checkpoint.random_state import seed_generators
from safecl.engine.checkpoint.report import SaveReport
from safecl.engine.model.settings import choose_attention
from safecl.engine.passes.live_model import evaluating
from safecl.engine.passes.opening import open_language_model
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.engine.teachers.recorded import TEACHER
from safecl.engine.zero.state_placement import needs_reference
from safecl.evaluation import Evaluation, GateResult, evaluate, judge_gate, summarise
from safecl.evaluation.restore import evaluation_from_dict
from safecl.planning.describe import describe_plan
from safecl.planning.plans import RunPlan, TaskPlan
from safecl.planning.run_plan import plan_run
from safecl.report.run import REPORT, write_run_report
from safecl.storage.durable import replace_file
from safecl.training.console import Console, Steps
from safecl.training.cost import cost_of
from safecl.training.folder import RESULTS, RunFolder
from safecl.training.identity import base_of, identity_of, refuse_other_run
from safecl.training.metrics_log import MetricsLog, check_trackers
from safecl.training.model_card import card_of
from safecl.training.replay_memory import fill_memory
from safecl.training.resume import Progress, RunSaver
from safecl.training.run import Run
from safecl.training.screening import screen_run

SECONDS_FOR_THE_LAST_SAVE = (
    60.0  # of a run that fails: longer than this it does not wait for a checkpoint that is being written
)


class TrainingFailed(RuntimeError):
    """The run cannot go on; the message says at which step and why. Exit code 1."""


class _Stopped(Exception):
    """A signal asked the run to end, and its state is being saved."""


@dataclass
class RunResult:
    """What a run leaves: its folder, everything measured (as in results.json), and the gate's verdict where there is a
    gate."""

    folder: Path
    results: dict = field(default_factory=dict)
    gate: GateResult | None = None
    stopped: bool = False
    """A signal ended the run after a step; its state is saved and the same command goes on."""


class Trainer:
    """`Trainer(config).fit()` is the Python twin of `safecl train`; every rank calls it.

    A run that was stopped in the folder goes on; one that is finished there is reported. `fresh` refuses a folder that
    holds a run. Raises ConfigError before anything is trained, TrainingFailed while running.
    """

    def __init__(self, config: RunConfig, plan: RunPlan | None = None, *, fresh: bool = False):
        self.config = config
        self.folder = Path(config.output)
        self.fresh = fresh
        self.console = Console(config.log.every, rank=environment.rank())
        check_trackers(config.log.report_to)
        self.plan = plan or plan_run(config)
        self.progress = Progress()
        self.evaluations: list[Evaluation] = []
        self._metrics = MetricsLog(None, config)
        self._saved_at: tuple[int, int, int] | None = None
        self._said: SaveReport | None = None

    def fit(self) -> RunResult:
        """Runs all tasks and returns what was measured.

        SIGTERM, SIGINT and SIGUSR1 end it after the current step, with `stopped` set; a second Ctrl-C raises
        KeyboardInterrupt at once.
        """
        self._began = time.perf_counter()
        files = RunFolder(self.folder)
        with self.console, StopRequest(announce=environment.rank() == 0) as self._stop:
            try:
                self._take_folder(files)
                self._say_what_will_run()
                if (finished := self._finished_before(files)) is not None:
                    return finished
                collectives.init_distributed()
                return self._run(files)
            finally:
                files.release()

    def _run(self, files: RunFolder) -> RunResult:
        run = self._start(files)
        try:
            self._resume(run)
            while self.progress.task < len(self.plan.tasks):
                self._run_task(run, self.plan.tasks[self.progress.task])
            return self._finish(run)
        except _Stopped:
            return self._end_stopped(run)
        finally:
            self._close(run)

    def _say_what_will_run(self) -> None:
        for what, value in describe_plan(self.plan):
            self.console.fact(what, value)
        for task in self.plan.tasks:
            title = f"task {task.config.name}"
            self.console.show(lambda task=task, title=title: describe(
                task.dataset, self.plan.tokenizer, examples=self.config.privacy.examples, title=title
            ))  # fmt: skip
        for note in self.plan.notes:
            self.console.note(note)

    # ------------------------------------------------------------------------------------------------------------ start

    def _take_folder(self, files: RunFolder) -> None:
        if environment.rank() == 0:
            if (note := files.lock()) is not None:
                self.console.note(note)
            files.forget_exit_code()
        if self.fresh:
            files.refuse_to_overwrite()
        if files.holdings():
            refuse_other_run(files.identity() or {}, identity_of(self.plan), str(self.folder))

    def _finished_before(self, files: RunFolder) -> RunResult | None:
        results = files.results()
        if results is None:
            return None
        evaluations = [evaluation_from_dict(values) for values in results["evaluations"]]
        self.console.note(
            f"{self.folder} holds this run, finished after {results['steps']} steps; to train again choose another folder"
        )
        if environment.rank() == 0:
            self._do_what_was_left()
        gate = self._judge(evaluations)
        self.console.results(evaluations, gate, self.folder)
        return RunResult(self.folder, results, gate)

    def _do_what_was_left(self) -> None:
        """Of a run that was killed when its results were there already."""
        if not (self.folder / REPORT).exists():
            self._write_report()
        shutil.rmtree(self.folder / TEACHER, ignore_errors=True)

    def _start(self, files: RunFolder) -> Run:
        config = self.config
        seed_generators(config.train.seed)
        self._write_run_folder(files)
        model, layout, store = open_language_model(
            config.model, packing=config.train.packing, tokens_per_microbatch=config.train.tokens_per_microbatch,
            pad_id=self.plan.tokenizer.pad_token_id, note=self.console.note,
        )  # fmt: skip
        attention, reason = choose_attention(config.model.attention)
        self.console.fact("attention", f"{attention} ({reason}), rows {'packed' if layout.packed else 'padded'}")
        engine = TrainingEngine(model, config, layout, store, keep_store=needs_reference(config))
        self._write({"deepspeed.json": json.dumps(engine.deepspeed_config, indent=2)})
        ranks = f"{collectives.world_size()} rank{'s' if collectives.world_size() > 1 else ''}"
        self.console.fact("trained", f"{engine.shards.numel:,} weights on {ranks}, {engine.device}")
        run = Run(config, engine, self.plan.methods, self.console.note, self.plan.tasks)
        run.plan = self.plan
        self._identity = identity_of(self.plan, store.digest)
        self._saver = RunSaver(run, self.folder, self._identity, base_of(config, store.digest))
        return run

    def _write_run_folder(self, files: RunFolder) -> None:
        if collectives.rank() == 0:
            try:
                files.write_identity(identity_of(self.plan))
            except OSError as error:
                raise ConfigError(f"output: {self.folder}: cannot be written: {error.strerror}") from None
        self._write({"config.yaml": dump_config(self.config)})
        collectives.barrier()

    def _write(self, contents: dict[str, str]) -> None:
        """Files of the run folder, by name, from rank 0."""
        for name, text in contents.items() if collectives.rank() == 0 else ():
            try:
                (self.folder / name).write_text(text, encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"output: {self.folder}: cannot be written: {error.strerror}") from None

    def _resume(self, run: Run) -> None:
        """Restores what the newest checkpoint holds, or begins at the beginning."""
        resumed = self._saver.resume(self.console.note, self.plan.tasks)
        self.progress = resumed.progress if resumed is not None else Progress()
        self.evaluations = [evaluation_from_dict(values) for values in self.progress.evaluations]
        self._metrics = MetricsLog(
            self.folder if collectives.rank() == 0 else None,
            self.config,
            resumed.metrics if resumed is not None else b"",
            run.global_step,
        )
        self._began -= self.progress.seconds
        self._saved_at = self._position(run) if resumed is not None else None
        if resumed is not None:
            self.console.note(f"going on from {resumed.name}, step {run.global_step}")
            for note in resumed.notes:
                self.console.note(note)
        elif self.config.checkpoint.every != "never":
            self._saver.check_room(self.console.note, self.config.checkpoint.keep)

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def _position(self, run: Run) -> tuple[int, int, int]:
        return self.progress.task, self.progress.parts_done, run.global_step

    def _save(self, run: Run) -> None:
        if self._saved_at == self._position(run):
            return
        self.progress.seconds = time.perf_counter() - self._began
        self.progress.evaluations = [evaluation.to_dict() for evaluation in self.evaluations]
        self._say(self._saver.save(self.progress, self._metrics.so_far(), self.config.checkpoint.keep))
        self._saved_at = self._position(run)

    def _say(self, report: SaveReport | None) -> None:
        if report is not None and report is not self._said:
            self.console.saved(report)
            self._said = report

    def _pause(self, run: Run, stop: bool) -> None:
        """Ends the run here where `stop` says so, the same on all ranks."""
        if stop:
            self._save(run)
            raise _Stopped

    def _end_stopped(self, run: Run) -> RunResult:
        report = self._saver.settle()
        name, where = self._stop.name or "a signal", f"step {run.global_step}"
        if report is not None and report.problem is not None:
            raise TrainingFailed(
                f"{name} stopped the run after {where}, but {report}; the checkpoint before is untouched"
            )
        self._say(report)
        self.console.note(f"{name}: stopped after {where}; the same command goes on from here")
        return RunResult(self.folder, stopped=True)

    def _close(self, run: Run) -> None:
        self._saver.close(SECONDS_FOR_THE_LAST_SAVE)
        run.close()
        if run.memory is not None:
            run.memory.buffer.close()
        self._metrics.close()

    # ------------------------------------------------------------------------------------------------------------ tasks

    def _run_task(self, run: Run, task: TaskPlan) -> None:
        """The parts of a task in order; a resumed run begins with the first that is not done."""
        parts = [
            self._measure_before,
            self._screen,
            self._fill_memory,
            self._begin,
            self._train,
            self._measure_after,
            self._hand_over,
        ]
        for part in parts[self.progress.parts_done :]:
            part(run, task)
            self.progress.parts_done += 1
            if part == self._train and self.config.checkpoint.every != "never":
                self._save(run)
            if part == parts[-1]:
                self.progress.task, self.progress.parts_done = self.progress.task + 1, 0
            self._pause(run, collectives.any_rank(self._stop.requested))

    def _is_aligned(self, task: TaskPlan) -> bool:
        return task.config.role != "align"

    def _measure_before(self, run: Run, task: TaskPlan) -> None:
        index = self.progress.task
        if index == 0:
            self._evaluate(run, "start")
        elif self._is_aligned(task) and not self._is_aligned(self.plan.tasks[index - 1]):
            self._evaluate(run, f"before {task.config.name}")

    def _screen(self, run: Run, task: TaskPlan) -> None:
        """Once, before the first task that methods act on: until then the weights are the aligned model's."""
        if self.config.scan is not None and run.tasks and task is run.tasks[0]:
            screen_run(run, self.plan.tokenizer, self.console, self.folder)

    def _fill_memory(self, run: Run, task: TaskPlan) -> None:
        if not self._is_aligned(task) or self.plan.memory is None or run.memory is not None:
            return
        config, rows = self.config, self.plan.memory
        with_teacher, is_base = needs_outputs(config), config.tasks[0].role != "align"
        # The outputs of a model that this run has aligned are nobody else's, and stay in the run's own memory.
        shared = (
            shared_outputs(run.engine, rows, config, self.plan.tokenizer, note=run.log)
            if with_teacher and is_base
            else None
        )
        run.memory = fill_memory(
            run.engine,
            rows,
            config.memory,
            seed=config.train.seed,
            source=config.memory.source,
            with_teacher=with_teacher,
            folder=self._saver.memory_folder,
            shared=shared,
        )

    def _begin(self, run: Run, task: TaskPlan) -> None:
        run.begin_task(task, active=self._is_aligned(task))
        self.progress.skipped_in_a_row = 0

    def _measure_after(self, run: Run, task: TaskPlan) -> None:
        run.end_task()
        self._evaluate(run, f"after {task.config.name}")

    def _hand_over(self, run: Run, task: TaskPlan) -> None:
        """The next task goes on from the model that this one is saved as."""
        if run.saves_average and self.progress.task + 1 < len(self.plan.tasks):
            run.engine.shards.swap(run.engine.optimizer.tensors("ema"))

    def _train(self, run: Run, task: TaskPlan) -> None:
        every = self.config.checkpoint.every
        with self.console.progress(task.config.name, task.num_steps, run.step) as progress:
            while run.step < task.num_steps:
                self._measure_between(run, task)
                stop = self._train_step(run, task, progress)
                self._say(self._saver.checkpointer.peek())
                if isinstance(every, int) and run.global_step % every == 0 and run.step < task.num_steps:
                    self._save(run)
                self._pause(run, stop)

    def _measure_between(self, run: Run, task: TaskPlan) -> None:
        """Before the next step, so that a run resumed here measures what was still to be measured, and nothing
        twice."""
        every = self.config.safety.every if self.config.safety is not None else "never"
        when = f"{task.config.name} step {run.step}"
        if (
            isinstance(every, int)
            and run.step
            and run.step % every == 0
            and all(done.when != when for done in self.evaluations)
        ):
            self._evaluate(run, when)

    def _train_step(self, run: Run, task: TaskPlan, progress: Steps) -> bool:
        """One step and its line in metrics.jsonl; True where a rank was asked to stop."""
        began = time.perf_counter()
        losses = run.train_step(task)
        losses.stop = self._stop.requested
        applied = run.engine.optimizer.result.applied
        self.progress.skipped_in_a_row = 0 if applied else self.progress.skipped_in_a_row + 1
        run.skipped_steps += not applied
        totals = losses.totals()
        stop = totals.pop("stop") > 0
        values = self._step_values(run, task, totals, time.perf_counter() - began)
        self.progress.num_tokens += values["tokens"]
        self._metrics.write(values)
        progress.step(values)
        self._check_skipped(run, task, self.progress.skipped_in_a_row)
        return stop

    def _check_skipped(self, run: Run, task: TaskPlan, in_a_row: int) -> None:
        if in_a_row == 0:
            return
        rows = task.order.rows_of_step(run.step - 1)
        lines = ", ".join(str(int(line)) for line in task.dataset.lines[rows][:8])
        more = ", ..." if len(rows) > 8 else ""
        message = (
            f"step {run.global_step - 1}: the gradient is not finite, step skipped (its rows are lines {lines}{more})"
        )
        if in_a_row > self.config.train.max_skipped_steps:
            raise TrainingFailed(
                f"{message}; {in_a_row} in a row, the run stops; try a lower train.learning_rate or dtype: fp32"
            )
        self.console.note(message)

    def _step_values(self, run: Run, task: TaskPlan, totals: dict[str, float], seconds: float) -> dict:
        result = run.engine.optimizer.result
        tokens, penalty = int(totals.pop("tokens")), totals.pop("penalty")
        values = {"step": run.global_step - 1, "task": task.config.name}
        values |= {f"loss/{term}": value for term, value in totals.items()}
        if result.penalty is not None:
            values["loss/penalty"] = penalty
        values["grad_norm"] = float(result.grad_norm) if result.grad_norm is not None else None
        values["learning_rate"] = run.last_learning_rate
        values["tokens"] = tokens
        values["tokens_per_second"] = round(tokens / seconds, 1)
        values["memory_bytes"] = memory_bytes()
        values["skipped_steps"] = run.skipped_steps
        return values

    # ------------------------------------------------------------------------------------------------------- evaluation

    def _evaluate(self, run: Run, when: str) -> None:
        if self.config.safety is not None and self.config.safety.every == "never":
            return
        if not self.plan.prompts and not any(task.eval_rows for task in self.plan.tasks):
            return
        tasks = [(task.config.name, task.config.eval, task.eval_rows) for task in self.plan.tasks if task.eval_rows]
        with self.console.working(f"{when}: measuring"), evaluating(run.engine, average=run.saves_average) as model:
            found = evaluate(
                model,
                self.plan.tokenizer,
                when=when,
                step=run.global_step,
                safety=self.config.safety,
                prompts=self.plan.prompts,
                benign=self.plan.benign,
                tasks=tasks,
            )
        self.evaluations.append(found)
        if collectives.rank() == 0:
            found.write_outputs(self.folder / "outputs", self.config.privacy.examples)
        self.console.measured(found)

    # ----------------------------------------------------------------------------------------------------------- finish

    def _finish(self, run: Run) -> RunResult:
        self._say(self._saver.settle())
        gate = self._judge(self.evaluations)
        self._save_models(run, gate)
        result = RunResult(self.folder, self._results(run, gate), gate)
        if collectives.rank() == 0:
            replace_file(self.folder / RESULTS, json.dumps(result.results, indent=2))
            self._write_report()
        collectives.barrier()
        run.finish()
        self.console.results(self.evaluations, gate, self.folder)
        return result

    def _write_report(self) -> None:
        """The page says again what results.json and outputs/ say, so a run without it is no failure."""
        try:
            write_run_report(self.folder)
        except OSError as error:
            self.console.note(
                f"report.html could not be written: {error.strerror}; `safecl report {self.folder}` makes it"
            )

    def _judge(self, evaluations: list[Evaluation]) -> GateResult | None:
        limits = self.config.safety.gate if self.config.safety is not None else None
        return judge_gate(limits, evaluations[-1]) if limits is not None and evaluations else None

    def _save_models(self, run: Run, gate: GateResult | None) -> None:
        """Last, so that the cards say what was measured; a run that is killed here does this again."""
        live, average = self.folder / "model", run.saves_average
        card = card_of(
            run, self.folder.resolve().name, self._identity, self.progress.num_tokens, self.evaluations, gate
        )
        if average:
            live = self.folder / "model-live"
        own = replace(card, measured=not average)
        saved = save_model(run.engine, self.plan.tokenizer, live, card=own.text())
        if average:
            with evaluating(run.engine, average=True):
                own = replace(card, average=True)
                saved = save_model(run.engine, self.plan.tokenizer, self.folder / "model", card=own.text())
        both = " (the average) and model-live (the last weights)" if average else ""
        self.console.note(f"saved {self.folder / 'model'}{both}: {saved}")

    def _results(self, run: Run, gate: GateResult | None) -> dict:
        import safecl

        return {
            "safecl": safecl.__version__,
            "methods": list(self.config.methods),
            "world_size": collectives.world_size(),
            "steps": run.global_step,
            "skipped_steps": run.skipped_steps,
            "tokens": self.progress.num_tokens,
            "seconds": collectives.gather_objects([round(time.perf_counter() - self._began, 3)])[0],
            "cost": cost_of(run, self._metrics.so_far()),
            "saved": "average" if run.saves_average else "live",
            "kept_bytes": run.kept_bytes(),
            "evaluations": [evaluation.to_dict() for evaluation in self.evaluations],
            "summary": summarise(self.evaluations),
            "gate": gate.to_dict() if gate is not None else None,
        }


def memory_bytes() -> int:
    """Peak memory: allocated on the GPU since the start, else resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
