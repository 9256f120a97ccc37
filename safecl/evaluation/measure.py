"""The evaluation at one moment of a run: safety and the utility of each task."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safecl.config import EvalConfig, SafetyConfig
from safecl.data.formats import ChatRow
from safecl.data.rows import Prompt
from safecl.evaluation.answers.model import EvalModel
from safecl.evaluation.records import Privacy, write_outputs
from safecl.evaluation.safety import SafetyResult, evaluate_safety
from safecl.evaluation.statistics.continual import average_score, backward_transfer, forgetting, forward_transfer
from safecl.evaluation.task import MAX_LABELS, TaskResult, evaluate_task

_MAX_LABEL_WORDS = 4
_AFTER = "after "


@dataclass(frozen=True)
class Evaluation:
    """The measurements of one moment; `when` names it ("start", "after sst2")."""

    when: str
    step: int
    """Optimizer steps before this moment, over all tasks."""
    safety: SafetyResult | None = None
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    """By task name."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for results.json; no text."""
        tasks = {name: result.to_dict() for name, result in self.tasks.items()}
        return {
            "when": self.when,
            "step": self.step,
            "safety": self.safety.to_dict() if self.safety else None,
            "tasks": tasks,
        }

    def write_outputs(self, folder: str | Path, privacy: Privacy = "full") -> list[Path]:
        """Write one JSONL file for safety and one per task, `<step>-<when>-<what>.jsonl`. Rank 0 calls it."""
        parts = ({"safety": self.safety.outputs} if self.safety else {}) | {
            name: result.outputs for name, result in self.tasks.items()
        }
        stem = f"{self.step:06d}-{_file_name(self.when)}"
        return [
            write_outputs(Path(folder) / f"{stem}-{_file_name(what)}.jsonl", rows, privacy)
            for what, rows in parts.items()
        ]

    def one_line(self) -> str:
        """Return the headline numbers for the log, ASR never alone."""
        parts = []
        if self.safety:
            parts.append(f"ASR {self.safety.asr.value:.3f} ({self.safety.scorer})")
            parts.append(f"affirmative {self.safety.affirmative.value:.3f}")
            parts.append(f"off-task {self.safety.off_task.value:.3f}")
            if self.safety.over_refusal:
                parts.append(f"over-refusal {self.safety.over_refusal.value:.3f}")
        parts += [f"{name} {result.metric} {result.value.value:.3f}" for name, result in self.tasks.items()]
        return f"{self.when}: " + ", ".join(parts)


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "unnamed"


def evaluate(
    model: EvalModel,
    tokenizer: Any,
    *,
    when: str,
    step: int = 0,
    safety: SafetyConfig | None = None,
    prompts: Sequence[Prompt] = (),
    benign: Sequence[Prompt] = (),
    tasks: Sequence[tuple[str, EvalConfig, Sequence[ChatRow]]] = (),
) -> Evaluation:
    """Measure safety (where there are prompts) and each task, given as (name, settings, rows). Every rank calls it with
    the same arguments.

    Short answers that a task teaches ("positive") count as off-task among the answers to disallowed prompts.
    """
    labels = sorted({label for _, _, rows in tasks for label in short_answers(rows)})
    batch_size = safety.batch_size if safety else 32
    return Evaluation(
        when=when,
        step=step,
        safety=evaluate_safety(model, tokenizer, safety, prompts, benign, labels=labels)
        if safety and prompts
        else None,
        tasks={
            name: evaluate_task(model, tokenizer, config, rows, name=name, batch_size=batch_size)
            for name, config, rows in tasks
        },
    )


def summarise(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Compute worst case and transfer over a run's moments: `{"max_asr", "max_asr_when", "average",
    "backward_transfer", "forgetting", ...}`.

    The matrix of scores has a row per moment "after NAME" and a column per such task. The score is the metric, or its
    negative where lower is better. Forward transfer is against the run's first moment. Values are None where nothing
    was measured.
    """
    finished = {
        evaluation.when.removeprefix(_AFTER): evaluation
        for evaluation in evaluations
        if evaluation.when.startswith(_AFTER)
    }
    matrix = [[_score(evaluation, task) for task in finished] for evaluation in finished.values()]
    rates = [
        (evaluation.safety.asr.value, evaluation.when) for evaluation in evaluations if evaluation.safety is not None
    ]
    worst = max(rates, key=lambda pair: pair[0], default=(None, None))
    summary = {"max_asr": worst[0], "max_asr_when": worst[1], "tasks": list(finished), "scores": matrix}
    if not finished:
        return summary
    start = [_score(evaluations[0], task) for task in finished]
    return summary | {
        "average": average_score(matrix),
        "backward_transfer": backward_transfer(matrix),
        "forward_transfer": forward_transfer(matrix, start),
        "forgetting": forgetting(matrix),
    }


def _score(evaluation: Evaluation, task: str) -> float | None:
    result = evaluation.tasks.get(task)
    if result is None:
        return None
    return result.value.value if result.higher_is_better else -result.value.value


def short_answers(rows: Sequence[ChatRow]) -> set[str]:
    """Return the distinct answers of rows if they look like labels: few of them, of at most four words."""
    answers = {row.messages[-1].content for row in rows if row.messages[-1].role == "assistant"}
    few = len(answers) <= min(MAX_LABELS, max(2, len(rows) // 4))
    return answers if few and all(len(answer.split()) <= _MAX_LABEL_WORDS for answer in answers) else set()
