"""The training run: tasks one after the other, measured before and after, saved as Hugging Face folders.

plan (no process group yet) -> engine -> for each task: memory, anchors -> steps -> evaluation -> model folders, results.json
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from safecl import launcher
from safecl.config import ConfigError, RunConfig, dump_config
from safecl.data import describe
from safecl.engine import distributed
from safecl.engine.batch import Layout
from safecl.engine.console import Console
from safecl.engine.deepspeed_config import deepspeed_config
from safecl.engine.export import save_model
from safecl.engine.live import evaluating
from safecl.engine.memory import fill_memory
from safecl.engine.metrics import MetricsLog, check_trackers
from safecl.engine.model import LanguageModel, check_head, check_packing, choose_attention, load_model
from safecl.engine.plan import RunPlan, TaskPlan, describe_plan, plan_run
from safecl.engine.run import Run
from safecl.engine.training import StepLosses, TrainingEngine
from safecl.evaluation import Evaluation, GateResult, evaluate, judge_gate, summarise


class TrainingFailed(RuntimeError):
    """The run cannot go on; the message says at which step and why. Exit code 1."""


@dataclass
class RunResult:
    """What a run leaves: its folder, everything measured (as in results.json), and the gate's verdict where there is a gate."""

    folder: Path
    results: dict = field(default_factory=dict)
    gate: GateResult | None = None


class Trainer:
    """`Trainer(config).fit()` is the Python twin of `safecl train`; every rank calls it.

    Raises ConfigError before anything is trained, TrainingFailed while running.
    """

    def __init__(self, config: RunConfig, plan: RunPlan | None = None):
        self.config = config
        self.folder = Path(config.output)
        self.console = Console(config.log.every, rank=launcher.rank())
        check_trackers(config.log.report_to)
        self.plan = plan or plan_run(config)

    def fit(self) -> RunResult:
        """Runs all tasks and returns what was measured. KeyboardInterrupt passes through after the files are closed."""
        self._say_what_will_run()
        distributed.init_distributed()
        run = self._start()
        evaluations: list[Evaluation] = []
        with self.console:
            try:
                for index, task in enumerate(self.plan.tasks):
                    self._run_task(run, index, task, evaluations)
                result = self._finish(run, evaluations)
            finally:
                self._metrics.close()
        return result

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

    # -------------------------------------------------------------------------------------------------------------- start

    def _start(self) -> Run:
        config = self.config
        torch.manual_seed(config.train.seed)
        self._write_run_folder()
        model = LanguageModel(load_model(config.model))
        attention, reason = choose_attention(config.model.attention)
        packed = config.train.packing == "packed" or (config.train.packing == "auto" and attention == "flash_attention_2")
        self.console.fact("attention", f"{attention} ({reason}), rows {'packed' if packed else 'padded'}")
        if not check_head(model):
            self.console.note("the model's logits are more than a linear head; its own logits are used (more memory)")
        if packed:
            check_packing(model)
        layout = Layout(distributed.world_size(), config.train.tokens_per_microbatch, packed, pad_id=self.plan.tokenizer.pad_token_id or 0)
        engine = TrainingEngine(model, config, layout)
        self.console.fact("trained", f"{engine.shards.numel:,} weights on {distributed.world_size()} rank(s), {engine.device}")
        return Run(config, engine, self.plan.methods, self.console.note, self.plan.tasks)

    def _write_run_folder(self) -> None:
        if distributed.rank() == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / "config.yaml").write_text(dump_config(self.config), encoding="utf-8")
                (self.folder / "deepspeed.json").write_text(json.dumps(deepspeed_config(self.config), indent=2))
            except OSError as error:
                raise ConfigError(f"output: {self.folder}: cannot be written: {error.strerror}") from None
        distributed.barrier()
        self._metrics = MetricsLog(self.folder, self.config) if distributed.rank() == 0 else MetricsLog(None, self.config)

    # -------------------------------------------------------------------------------------------------------------- tasks

    def _run_task(self, run: Run, index: int, task: TaskPlan, evaluations: list[Evaluation]) -> None:
        aligned = task.config.role != "align"
        if index == 0 or (aligned and self.plan.tasks[index - 1].config.role == "align"):
            self._evaluate(run, "start" if index == 0 else f"before {task.config.name}", evaluations)
        if aligned and self.plan.memory is not None and run.memory is None:
            self._fill_memory(run)
        run.begin_task(task, active=aligned)
        self._train(run, task, evaluations)
        run.end_task()
        self._evaluate(run, f"after {task.config.name}", evaluations)
        if run.saves_average and index + 1 < len(self.plan.tasks):
            run.engine.shards.swap(run.engine.optimizer.tensors("ema"))  # the next task goes on from the model that this one hands over

    def _fill_memory(self, run: Run) -> None:
        with_teacher = any(getattr(settings, "needs_teacher", False) for settings in self.config.methods.values())
        memory = self.config.memory
        run.memory = fill_memory(
            run.engine, self.plan.memory, memory, seed=self.config.train.seed, source=memory.source, with_teacher=with_teacher
        )

    def _train(self, run: Run, task: TaskPlan, evaluations: list[Evaluation]) -> None:
        every = self.config.safety.every if self.config.safety is not None else "never"
        skipped_in_a_row = 0
        with self.console.progress(task.config.name, task.num_steps) as progress:
            while run.step < task.num_steps:
                began = time.perf_counter()
                losses = run.train_step(task)
                applied = run.engine.optimizer.result.applied
                skipped_in_a_row = 0 if applied else skipped_in_a_row + 1
                run.skipped_steps += not applied
                values = self._step_values(run, task, losses, time.perf_counter() - began)
                self._metrics.write(values)
                progress.step(values)
                self._check_skipped(run, task, skipped_in_a_row)
                if isinstance(every, int) and run.step % every == 0 and run.step < task.num_steps:
                    self._evaluate(run, f"{task.config.name} step {run.step}", evaluations)

    def _check_skipped(self, run: Run, task: TaskPlan, in_a_row: int) -> None:
        if in_a_row == 0:
            return
        rows = task.order.rows_of_step(run.step - 1)
        lines = ", ".join(str(int(line)) for line in task.dataset.lines[rows][:8])
        more = ", ..." if len(rows) > 8 else ""
        message = f"step {run.global_step - 1}: the gradient is not finite, step skipped (its rows are lines {lines}{more})"
        if in_a_row > self.config.train.max_skipped_steps:
            raise TrainingFailed(f"{message}; {in_a_row} in a row, the run stops; try a lower train.learning_rate or dtype: fp32")
        self.console.note(message)

    def _step_values(self, run: Run, task: TaskPlan, losses: StepLosses, seconds: float) -> dict:
        totals, result = losses.totals(), run.engine.optimizer.result
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

    # --------------------------------------------------------------------------------------------------------- evaluation

    def _evaluate(self, run: Run, when: str, evaluations: list[Evaluation]) -> None:
        if self.config.safety is not None and self.config.safety.every == "never":
            return
        if not self.plan.prompts and not any(task.eval_rows for task in self.plan.tasks):
            return
        tasks = [(task.config.name, task.config.eval, task.eval_rows) for task in self.plan.tasks if task.eval_rows]
        with evaluating(run.engine, average=run.saves_average) as model:
            found = evaluate(
                model, self.plan.tokenizer, when=when, step=run.global_step, safety=self.config.safety, prompts=self.plan.prompts,
                benign=self.plan.benign, tasks=tasks,
            )  # fmt: skip
        evaluations.append(found)
        if distributed.rank() == 0:
            found.write_outputs(self.folder / "outputs", self.config.privacy.examples)
        self.console.note(found.one_line())

    # ------------------------------------------------------------------------------------------------------------- finish

    def _finish(self, run: Run, evaluations: list[Evaluation]) -> RunResult:
        self._save_models(run)
        run.finish()
        limits = self.config.safety.gate if self.config.safety is not None else None
        gate = judge_gate(limits, evaluations[-1]) if limits is not None and evaluations else None
        result = RunResult(self.folder, self._results(run, evaluations, gate), gate)
        if distributed.rank() == 0:
            (self.folder / "results.json").write_text(json.dumps(result.results, indent=2), encoding="utf-8")
        distributed.barrier()
        self.console.results(evaluations, gate, self.folder)
        return result

    def _save_models(self, run: Run) -> None:
        live, average = self.folder / "model", run.saves_average
        if average:
            live = self.folder / "model-live"
        save_model(run.engine, self.plan.tokenizer, live)
        if average:
            with evaluating(run.engine, average=True):
                save_model(run.engine, self.plan.tokenizer, self.folder / "model")
        self.console.note(f"saved {self.folder / 'model'}" + (" (the average) and model-live (the last weights)" if average else ""))

    def _results(self, run: Run, evaluations: list[Evaluation], gate: GateResult | None) -> dict:
        import safecl

        return {
            "safecl": safecl.__version__,
            "methods": list(self.config.methods),
            "world_size": distributed.world_size(),
            "steps": run.global_step,
            "skipped_steps": run.skipped_steps,
            "saved": "average" if run.saves_average else "live",
            "evaluations": [evaluation.to_dict() for evaluation in evaluations],
            "summary": summarise(evaluations),
            "gate": gate.to_dict() if gate is not None else None,
        }


def memory_bytes() -> int:
    """Peak memory: allocated on the GPU since the start, else resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
