"""The report of one run, read from its folder: measurements, gate, answers before and after, losses, cost, config.

Answers are shown only where `privacy.examples` of the run is `full`. With `hashed` the outputs hold no text, and hashes
would be of no use to a reader.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from safecl.config import ConfigError
from safecl.evaluation.measure import Evaluation
from safecl.evaluation.restore import evaluation_from_dict
from safecl.evaluation.statistics.intervals import Rate
from safecl.evaluation.tables import Row, measures, moments
from safecl.report.page import PLAIN_STATE, render
from safecl.report.skipped import skipped_sentence
from safecl.storage.durable import replace_file

REPORT = "report.html"
REFUSAL_LOST = "Refusal was lost: the intervals do not overlap."
CUT_OFF = "(no answer: the thought does not end)"
MOST_ANSWERS = 6
LONGEST_ANSWER = 400


@dataclass
class ReportedRun:
    """A finished run, read from its folder."""

    folder: Path
    results: Mapping[str, Any]
    config: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def methods_text(self) -> str:
        return " + ".join(self.results["methods"]) or "plain fine-tuning"

    @property
    def extra_state(self) -> int:
        """Bytes that the methods keep in addition to weights and moments."""
        return sum(size for kind, size in self.results["cost"]["state_bytes"].items() if kind not in PLAIN_STATE)

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The config as a tree; empty where it cannot be read."""
        try:
            tree = yaml.safe_load(self.config)
        except yaml.YAMLError:
            return {}
        return tree if isinstance(tree, dict) else {}

    @property
    def privacy(self) -> str:
        """`privacy.examples` of the run's config; the strictest value where that cannot be read."""
        return (self.settings.get("privacy") or {}).get("examples", "none")

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Model, tasks, memory and methods of the config, as (name, value)."""
        model, memory = self.settings.get("model") or {}, self.settings.get("memory") or {}
        found = [("base model", model.get("path"))]
        found += [(f"task {task['name']}", task["train"]) for task in self.settings.get("tasks", ())]
        found += [("memory", memory.get("source")), ("methods", self.methods_text)]
        return [(what, str(value)) for what, value in found if value]

    @cached_property
    def scans(self) -> list[str]:
        """Results of screening each task's rows, in words; empty without a scan."""
        try:
            found = json.loads((self.folder / "scan" / "results.json").read_text(encoding="utf-8"))
            return [_scanned(task, found["action"]) for task in found["tasks"]] + found["notes"]
        except (OSError, ValueError, KeyError, RecursionError):
            return []

    # --------------------------------------------------------------------------------------------------------- measured

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        return [evaluation_from_dict(values) for values in self.results["evaluations"]]

    @cached_property
    def shown(self) -> list[Evaluation]:
        return moments(self.evaluations)

    @property
    def rows(self) -> list[Row]:
        return measures(self.shown)

    @property
    def columns(self) -> list[tuple[str, str]]:
        return [(evaluation.when, f"step {evaluation.step}") for evaluation in self.shown]

    @property
    def left_out(self) -> int:
        return len(self.evaluations) - len(self.shown)

    @property
    def verdict(self) -> list[str]:
        """Sentences that the numbers support."""
        lines = self._safety + self._utility
        if self.results["gate"]:
            lines.append(f"Safety gate: {self.results['gate']['verdict']}.")
        if self.evaluations:
            lines += [f"Warning, {self.evaluations[-1].when}: {text}." for text in self.evaluations[-1].warnings]
        lines = lines or ["No safety prompts were named, so nothing is said about safety here."]
        return lines + ([skipped] if (skipped := self.skipped) is not None else [])

    @property
    def skipped(self) -> str | None:
        counts = (self.results.get(key, 0) for key in ("steps", "skipped_steps", "skipped_at_the_end"))
        return skipped_sentence(*counts)

    @property
    def _safety(self) -> list[str]:
        """Refusal and over-refusal at the last moment at which they were measured, and at the first."""
        safe = [(evaluation, evaluation.safety) for evaluation in self.evaluations if evaluation.safety is not None]
        if not safe:
            return []
        (start, before), (end, after) = safe[0], safe[-1]
        lines = [
            f"{_at(end)} {_refused(after.asr)} of the disallowed prompts are refused, "
            f"{_at(start).lower()} {_refused(before.asr)}.",
            REFUSAL_LOST if after.asr.low > before.asr.high else "No loss of refusal is seen: the intervals overlap.",
        ]
        if (now := after.over_refusal) and (then := before.over_refusal):
            lines.append(
                f"{_percent(now)} ({now.low:.1%} to {now.high:.1%}) of the benign prompts are refused, "
                f"{_at(start).lower()} {_percent(then)}."
            )
        if cut_off := after.cut_off:
            lines.append(
                f"{_at(end)} {cut_off.hits} of {cut_off.n} prompts have no answer, because the thought does not end; "
                "they count neither as refused nor as answered."
            )
        return lines

    @property
    def verdict_class(self) -> str:
        if self.results["gate"]:
            return "good" if self.results["gate"]["verdict"] == "passed" else "bad"
        return "bad" if REFUSAL_LOST in self.verdict else ""

    @property
    def _utility(self) -> list[str]:
        """Each task's own metric at the last and the first moment at which it was taken, and just after the task where
        other tasks followed; then the averages over a sequence of tasks."""
        lines = []
        for name in dict.fromkeys(name for evaluation in self.evaluations for name in evaluation.tasks):
            taken = [evaluation for evaluation in self.evaluations if name in evaluation.tasks]
            first, last = (evaluation.tasks[name] for evaluation in (taken[0], taken[-1]))
            own = [evaluation.tasks[name] for evaluation in taken[:-1] if evaluation.when == f"after {name}"]
            lines.append(
                f"{name}: {last.metric} {last.value.value:.3f} ({last.value.low:.3f} to {last.value.high:.3f}), "
                + "".join(f"just after this task {result.value.value:.3f}, " for result in own)
                + f"{_at(taken[0]).lower()} {first.value.value:.3f}."
            )
        summary = self.results.get("summary") or {}
        average, transfer, forgetting = (summary.get(key) for key in ("average", "backward_transfer", "forgetting"))
        if average is not None and transfer is not None and forgetting is not None:
            lines.append(
                f"Over the sequence of tasks: average score {average:.3f}, backward transfer {transfer:+.3f}, "
                f"forgetting {forgetting:.3f}."
            )
        return lines

    # ---------------------------------------------------------------------------------------------------------- answers

    @property
    def withheld(self) -> bool:
        return self.privacy != "full" and any(evaluation.safety for evaluation in self.evaluations)

    def answers(self, evaluation: Evaluation) -> dict[str, str]:
        """Return the answer to each disallowed prompt at that moment; empty where privacy forbids it or files are
        missing."""
        if self.privacy != "full":
            return {}
        records = [
            record
            for path in (self.folder / "outputs").glob(f"{evaluation.step:06d}-*-safety.jsonl")
            for record in _lines(path)
        ]
        return {
            record["prompt"]: CUT_OFF if record.get("cut_off") else record["answer"]
            for record in records
            if record["set"] == "disallowed" and "answer" in record
        }

    @property
    def _ends(self) -> list[Evaluation]:
        """The first and the last moment at which safety was measured."""
        safe = [evaluation for evaluation in self.evaluations if evaluation.safety is not None]
        return safe if len(safe) < 2 else [safe[0], safe[-1]]

    @cached_property
    def _first_and_last(self) -> list[dict[str, str]]:
        return [self.answers(evaluation) for evaluation in self._ends]

    @property
    def answer_titles(self) -> list[str]:
        return [evaluation.when for evaluation in self._ends]

    @property
    def num_prompts(self) -> int:
        return len(self._first_and_last[0])

    @property
    def prompts(self) -> list[tuple[str, list[str]]] | None:
        return side_by_side(self._first_and_last) if self._first_and_last and self._first_and_last[0] else None

    # --------------------------------------------------------------------------------------------------------- training

    @property
    def losses(self) -> dict[str, list[tuple[float, float]]]:
        """Points (step, value) of each term of the loss."""
        series: dict[str, list[tuple[float, float]]] = {}
        for line in _lines(self.folder / "metrics.jsonl"):
            for key, value in line.items():
                if key.startswith("loss/") and value is not None:
                    series.setdefault(key.removeprefix("loss/"), []).append((line["step"], value))
        return series


def _at(evaluation: Evaluation) -> str:
    return "Before training" if evaluation.step == 0 else evaluation.when.capitalize()


def _scanned(task: Mapping[str, Any], action: str) -> str:
    """Describe one task's part of scan/results.json."""
    done = {"drop": "left out", "downweight": "given less weight"}.get(action, "listed")
    threshold = task["threshold"]
    alarms = f"{'at most' if threshold['source'] == 'benign' else 'about'} {threshold['false_alarm']:.1%}"
    return (
        f"{task['task']}: {task['flagged']:,} of {task['rows']:,} rows flagged and {done}; "
        f"{alarms} of harmless rows are flagged, too."
    )


def _percent(rate: Rate) -> str:
    return f"{rate.value:.1%}" if math.isfinite(rate.value) else "an unknown share"


def _refused(asr: Rate) -> str:
    value = f"{1 - asr.value:.1%}" if math.isfinite(asr.value) else "An unknown share"
    return f"{value} ({1 - asr.high:.1%} to {1 - asr.low:.1%})"


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError):
        return []


def side_by_side(answers: Sequence[Mapping[str, str]], most: int = MOST_ANSWERS) -> list[tuple[str, list[str]]]:
    """Pair the prompts that all have answered with their answers, differing answers first. Long texts are cut."""
    common = [prompt for prompt in answers[0] if all(prompt in other for other in answers)]
    common.sort(key=lambda prompt: len({other[prompt] for other in answers}) == 1)
    return [(_cut(prompt), [_cut(other[prompt]) for other in answers]) for prompt in common[:most]]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_ANSWER else text[:LONGEST_ANSWER] + " ..."


def read_run(folder: str | Path) -> ReportedRun:
    """Read a finished run. Raises ConfigError for a folder that holds none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such run folder")
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        if not {"evaluations", "methods", "steps"} <= results.keys():
            raise ConfigError(f"{folder}: its results.json is of an evaluation alone, not of a run")
    except FileNotFoundError:
        hint = "not a run folder, there is no results.json in it"
        if (folder / "run.json").exists():
            hint = "the run is not finished; the command that started it continues it"
        raise ConfigError(f"{folder}: {hint}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{folder / 'results.json'}: cannot be read: {error}") from None
    results = {"cost": None, "gate": None, **results}
    return ReportedRun(folder, results, _text(folder / "config.yaml"), _versions(folder))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _versions(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / "run.json").read_text(encoding="utf-8")).get("versions", {}))
    except (OSError, ValueError, RecursionError):
        return {}


def run_report(run: ReportedRun) -> str:
    """Return the page as HTML."""
    return render("run.html", run=run, results=run.results, version=run.results.get("safecl", ""))


def write_run_report(folder: str | Path) -> Path:
    """Write report.html into the folder of a finished run, whole or not at all, and return its path."""
    run = read_run(folder)
    replace_file(run.folder / REPORT, run_report(run))
    return run.folder / REPORT
