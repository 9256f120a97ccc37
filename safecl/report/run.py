"""The report of one run, read from its folder: what was measured, the gate, answers before and after, losses, cost,
config.

`privacy.examples` of the run governs the answers: they are shown for `full` alone. (`hashed` outputs hold no text, and
a page of hashes tells a reader nothing.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from safecl.config import ConfigError
from safecl.evaluation.measure import Evaluation
from safecl.evaluation.restore import evaluation_from_dict
from safecl.evaluation.tables import measures, moments
from safecl.report.page import PLAIN_STATE, render
from safecl.storage.durable import replace_file

REPORT = "report.html"
REFUSAL_LOST = "Refusal was lost: the intervals do not overlap."
MOST_ANSWERS = 6
LONGEST_ANSWER = 400


@dataclass
class ReportedRun:
    """A finished run, as its folder tells it."""

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
        """Bytes that the methods keep beside weights and moments."""
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
        """What the run's config says; the strictest where that cannot be read."""
        return (self.settings.get("privacy") or {}).get("examples", "none")

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What was tuned on what, as the config says it."""
        model, memory = self.settings.get("model") or {}, self.settings.get("memory") or {}
        found = [("base model", model.get("path"))]
        found += [(f"task {task['name']}", task["train"]) for task in self.settings.get("tasks", ())]
        found += [("memory", memory.get("source")), ("methods", self.methods_text)]
        return [(what, str(value)) for what, value in found if value]

    @cached_property
    def scans(self) -> list[str]:
        """What the screen of each task's rows has found and what was done about it, in words."""
        try:
            found = json.loads((self.folder / "scan" / "results.json").read_text(encoding="utf-8"))
            return [_scanned(task, found["action"]) for task in found["tasks"]] + found["notes"]
        except (OSError, ValueError, KeyError):
            return []

    # --------------------------------------------------------------------------------------------------------- measured

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        return [evaluation_from_dict(values) for values in self.results["evaluations"]]

    @cached_property
    def shown(self) -> list[Evaluation]:
        return moments(self.evaluations)

    @property
    def rows(self) -> list:
        return measures(self.shown)

    @property
    def columns(self) -> list[tuple[str, str]]:
        return [(evaluation.when, f"step {evaluation.step}") for evaluation in self.shown]

    @property
    def left_out(self) -> int:
        return len(self.evaluations) - len(self.shown)

    @property
    def verdict(self) -> list[str]:
        """What the numbers carry, in words."""
        lines = []
        safe = [evaluation for evaluation in self.evaluations if evaluation.safety is not None]
        if safe:
            first, last = safe[0].safety.asr, safe[-1].safety.asr
            lines.append(
                f"{_at(safe[-1])} {_refused(last)} of the disallowed prompts are refused, {_at(safe[0]).lower()} {_refused(first)}."
            )
            lines.append(
                REFUSAL_LOST if last.low > first.high else "No loss of refusal is seen: the intervals overlap."
            )
            if (now := safe[-1].safety.over_refusal) and (before := safe[0].safety.over_refusal):
                lines.append(
                    f"Of the benign prompts {now.value:.1%} ({now.low:.1%} to {now.high:.1%}) are refused, before {before.value:.1%}."
                )
        lines += self._utility
        if self.results["gate"]:
            lines.append(f"Safety gate: {self.results['gate']['verdict']}.")
        return lines or ["No safety prompts were named, so nothing is said about safety here."]

    @property
    def verdict_class(self) -> str:
        if self.results["gate"]:
            return "good" if self.results["gate"]["verdict"] == "passed" else "bad"
        return "bad" if REFUSAL_LOST in self.verdict else ""

    @property
    def _utility(self) -> list[str]:
        """Each task's own metric at the last moment at which it was taken, just after the task where others followed,
        and at the first; and what a sequence of tasks has kept."""
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
        if None not in (kept := [summary.get(key) for key in ("average", "backward_transfer", "forgetting")]):
            lines.append(
                "Over the sequence of tasks: average score {:.3f}, backward transfer {:+.3f}, forgetting {:.3f}.".format(
                    *kept
                )
            )
        return lines

    # ---------------------------------------------------------------------------------------------------------- answers

    @property
    def withheld(self) -> bool:
        return self.privacy != "full" and any(evaluation.safety for evaluation in self.evaluations)

    def answers(self, evaluation: Evaluation) -> dict[str, str]:
        """Disallowed prompt -> answer at that moment; empty where privacy or a missing file forbids."""
        if self.privacy != "full":
            return {}
        records = [
            record
            for path in (self.folder / "outputs").glob(f"{evaluation.step:06d}-*-safety.jsonl")
            for record in _lines(path)
        ]
        return {
            record["prompt"]: record["answer"]
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
        """Term of the loss -> (step, value)."""
        series: dict[str, list[tuple[float, float]]] = {}
        for line in _lines(self.folder / "metrics.jsonl"):
            for key, value in line.items():
                if key.startswith("loss/") and value is not None:
                    series.setdefault(key.removeprefix("loss/"), []).append((line["step"], value))
        return series


def _at(evaluation: Evaluation) -> str:
    return "Before training" if evaluation.step == 0 else evaluation.when.capitalize()


def _scanned(task: Mapping[str, Any], action: str) -> str:
    """One task's part of scan/results.json."""
    done = {"drop": "left out", "downweight": "weighed less"}.get(action, "listed")
    alarms = (
        f"{'at most' if task['threshold']['source'] == 'benign' else 'about'} {task['threshold']['false_alarm']:.1%}"
    )
    return f"{task['task']}: {task['flagged']:,} of {task['rows']:,} rows flagged and {done}; {alarms} of harmless rows are flagged, too."


def _refused(asr) -> str:
    return f"{1 - asr.value:.1%} ({1 - asr.high:.1%} to {1 - asr.low:.1%})"


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []


def side_by_side(answers: Sequence[Mapping[str, str]], most: int = MOST_ANSWERS) -> list[tuple[str, list[str]]]:
    """Prompts that all have answered, those with differing answers first; long texts cut."""
    common = [prompt for prompt in answers[0] if all(prompt in other for other in answers)]
    common.sort(key=lambda prompt: len({other[prompt] for other in answers}) == 1)
    return [(_cut(prompt), [_cut(other[prompt]) for other in answers]) for prompt in common[:most]]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_ANSWER else text[:LONGEST_ANSWER] + " ..."


def read_run(folder: str | Path) -> ReportedRun:
    """A finished run. Raises ConfigError for a folder that holds none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such run folder")
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        if not {"evaluations", "methods", "steps"} <= results.keys():
            raise ConfigError(f"{folder}: its results.json is of an evaluation alone, not of a run")
    except FileNotFoundError:
        under_way = (folder / "run.json").exists()
        hint = (
            "the run is not finished; the command that began it goes on"
            if under_way
            else "not a run folder, there is no results.json in it"
        )
        raise ConfigError(f"{folder}: {hint}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / 'results.json'}: cannot be read: {error}") from None
    return ReportedRun(
        folder, {"cost": None, "gate": None, **results}, _text(folder / "config.yaml"), _versions(folder)
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _versions(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / "run.json").read_text(encoding="utf-8")).get("versions", {}))
    except (OSError, ValueError):
        return {}


def run_report(run: ReportedRun) -> str:
    """The page as text."""
    return render("run.html", run=run, results=run.results, version=run.results.get("safecl", ""))


def write_run_report(folder: str | Path) -> Path:
    """Writes report.html into the folder of a finished run, whole or not at all; returns its path."""
    run = read_run(folder)
    replace_file(run.folder / REPORT, run_report(run))
    return run.folder / REPORT
