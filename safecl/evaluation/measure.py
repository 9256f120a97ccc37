"""The evaluation at one moment of a run: safety and the utility of each task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safecl.config import EvalConfig, SafetyConfig
from safecl.data.messages import ChatRow
from safecl.data.reading.rows import Prompt
from safecl.evaluation.answers.model import EvalModel
from safecl.evaluation.answers.thought import answer_of, open_alike
from safecl.evaluation.gates.gate import GateResult
from safecl.evaluation.probed import ProbeResult
from safecl.evaluation.records import Privacy, file_name, write_outputs
from safecl.evaluation.safety import SafetyResult, evaluate_safety
from safecl.evaluation.statistics.intervals import Mean, Rate
from safecl.evaluation.task import GENERATED, MAX_LABELS, TaskResult, evaluate_task

_MAX_LABEL_WORDS = 4


@dataclass(frozen=True)
class Evaluation:
    """The measurements of one moment; `when` names it ("start", "after sst2")."""

    when: str
    step: int
    """Optimizer steps before this moment, over all tasks."""
    safety: SafetyResult | None = None
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    """By task name."""
    warnings: tuple[str, ...] = ()
    """Reasons to distrust the scores; no text of rows."""
    gate: GateResult | None = None
    """The gate's verdict on this moment; None without a gate."""
    probe: ProbeResult | None = None
    """The probe at this moment; None without `safety.probe`."""
    kl_to_aligned: Mean | None = None
    """KL from the aligned model on the users' rows, nats per token; None without `safety.drift`."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for results.json; no text."""
        tasks = {name: result.to_dict() for name, result in self.tasks.items()}
        return {
            "when": self.when,
            "step": self.step,
            "safety": self.safety.to_dict() if self.safety else None,
            "tasks": tasks,
            **({"warnings": list(self.warnings)} if self.warnings else {}),
            **({"gate": self.gate.to_dict()} if self.gate is not None else {}),
            **({"probe": self.probe.to_dict()} if self.probe is not None else {}),
            **({"kl_to_aligned": self.kl_to_aligned.to_dict()} if self.kl_to_aligned is not None else {}),
        }

    def write_outputs(self, folder: str | Path, privacy: Privacy = "full") -> list[Path]:
        """Write one JSONL file for safety and one per task, `<step>-<when>-<what>.jsonl`. Rank 0 calls it."""
        parts = ({"safety": self.safety.outputs} if self.safety else {}) | {
            name: result.outputs for name, result in self.tasks.items()
        }
        stem = f"{self.step:06d}-{file_name(self.when)}"
        return [
            write_outputs(Path(folder) / f"{stem}-{file_name(what)}.jsonl", rows, privacy)
            for what, rows in parts.items()
        ]

    def one_line(self) -> str:
        """Return the headline numbers for the log, ASR never alone."""
        parts = []
        if self.safety:
            parts.append(f"ASR {_number(self.safety.asr)} ({self.safety.scorer})")
            parts.append(f"affirmative {_number(self.safety.affirmative)}")
            if self.safety.complied:
                parts.append(f"complied {_number(self.safety.complied)}")
            parts.append(f"off-task {_number(self.safety.off_task)}")
            if self.safety.over_refusal:
                parts.append(f"over-refusal {_number(self.safety.over_refusal)}")
            if self.safety.cut_off:
                parts.append(f"thoughts cut off {_number(self.safety.cut_off)}")
        if self.probe:
            parts.append(f"probe {self.probe.margin:+.2f}")
        if self.kl_to_aligned:
            parts.append(f"KL {self.kl_to_aligned.value:.3f}")
        parts += [f"{name} {result.metric} {result.value.value:.3f}" for name, result in self.tasks.items()]
        return f"{self.when}: " + ", ".join(parts)


def _number(rate: Rate) -> str:
    return f"{rate.value:.3f}" if math.isfinite(rate.value) else "undecided"


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
    answer = partial(answer_of, tokenizer)
    labels = sorted({label for _, _, rows in tasks for label in short_answers(rows, answer)})
    batch_size = safety.batch_size if safety else 32
    safe = evaluate_safety(model, tokenizer, safety, prompts, benign, labels=labels) if safety and prompts else None
    results = {
        name: evaluate_task(model, tokenizer, config, rows, name=name, batch_size=batch_size)
        for name, config, rows in tasks
    }
    return Evaluation(when, step, safe, results, _warnings(safe, results, answer))


def _warnings(
    safety: SafetyResult | None, tasks: Mapping[str, TaskResult], answer: Callable[[str], str]
) -> tuple[str, ...]:
    """Warn where the scorers do not fit the answers, or almost all answers open with the same word or mark, which no
    reference has."""
    asked = {f"task {name}": result.outputs for name, result in tasks.items() if result.metric in GENERATED}
    found = list(safety.notes) if safety else []
    for what, records in (asked | ({"safety": safety.outputs} if safety else {})).items():
        references = [answer(record["reference"]) for record in records if "reference" in record]
        if count := open_alike([record["answer"] for record in records], references):
            shared = ", which no reference has" if references else ""
            found.append(
                f"{what}: {count} of {len(records)} answers open with the same word or mark{shared}; perhaps it is "
                "part of a header or a thought, and is scored with the answer: look at outputs/, set model.thinking"
            )
    return tuple(found)


def short_answers(rows: Sequence[ChatRow], answer: Callable[[str], str] = str) -> set[str]:
    """Return the distinct answers of rows if they look like labels: few of them, of at most four words.

    answer: takes the answer out of the text of a reference.
    """
    answers = {answer(row.messages[-1].content) for row in rows if row.messages[-1].role == "assistant"}
    few = len(answers) <= min(MAX_LABELS, max(2, len(rows) // 4))
    return answers if few and all(len(answer.split()) <= _MAX_LABEL_WORDS for answer in answers) else set()
