"""The questions of an evaluation: disallowed and benign prompts, and held-out rows of tasks. They are read once and may
be put to many models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safecl.config import EvalConfig, FieldMap, RunConfig, SafetyConfig
from safecl.config.data import PASS_AT_1
from safecl.data.config_rows import read_eval_rows, read_training_rows
from safecl.evaluation.answers.texts import under_system
from safecl.evaluation.code.problems import read_problems
from safecl.evaluation.contamination import check_disjoint
from safecl.evaluation.gates.gate import check_gate_is_decidable

if TYPE_CHECKING:
    from safecl.data import ChatRow, Prompt
    from safecl.evaluation.answers.model import EvalModel
    from safecl.evaluation.results.moment import Evaluation


@dataclass(frozen=True)
class Questions:
    """Prompts and tasks with the settings of their evaluation. tasks: (name, settings, rows). False without any."""

    safety: SafetyConfig | None
    prompts: Sequence[Prompt]
    benign: Sequence[Prompt]
    tasks: Sequence[tuple[str, EvalConfig, list[ChatRow]]]

    def __bool__(self) -> bool:
        return bool(self.prompts or self.tasks)

    def measure(self, model: EvalModel, tokenizer: Any, when: str) -> Evaluation:
        """Put them to a model. Every rank calls it; `when` names the moment or the model."""
        from safecl.evaluation.measure import evaluate

        return evaluate(
            model,
            tokenizer,
            when=when,
            safety=self.safety,
            prompts=self.prompts,
            benign=self.benign,
            tasks=self.tasks,
        )


def questions_of(config: RunConfig) -> Questions:
    """Read what a run config measures. Raises ConfigError, also for prompts that stand in its training data."""
    prompts, benign = read_safety_prompts(config.safety)
    if prompts:
        check_disjoint([*prompts, *benign], read_training_rows(config))
    tasks = [
        (task.name, task.eval, read_held_out(config.safety, task.eval, task.fields))
        for task in config.tasks
        if task.eval is not None
    ]
    return Questions(config.safety, prompts, benign, tasks)


def read_held_out(safety: SafetyConfig | None, settings: EvalConfig | None, fields: FieldMap | None) -> list[ChatRow]:
    """Read held-out rows of a task, under the system message of `safety`. fields: the task's own templates."""
    if settings is not None and settings.metric == PASS_AT_1:
        rows = read_problems(settings)
    else:
        rows = read_eval_rows(settings, fields)
    return rows if safety is None else under_system(safety.system, rows)


def read_safety_prompts(safety: SafetyConfig | None) -> tuple[list[Prompt], list[Prompt]]:
    """Read the disallowed and the benign prompts. ConfigError where too few for the gate."""
    from safecl.data import read_prompts

    if safety is None:
        return [], []
    prompts = under_system(safety.system, read_prompts(safety.prompts, safety.max_prompts))
    benign = read_prompts(safety.benign_prompts, safety.max_prompts, only_safe=True) if safety.benign_prompts else []
    benign = under_system(safety.system, benign)
    if safety.gate is not None:
        check_gate_is_decidable(
            safety.gate, num_prompts=len(prompts), num_benign=len(benign), prompts=prompts, benign=benign
        )
    return prompts, benign
