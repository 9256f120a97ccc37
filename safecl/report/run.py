"""The report of one run, read from its folder: what was measured, the gate, answers before and after, losses, cost, config.

`privacy.examples` of the run governs the answers: they are shown for `full` alone. (`hashed` outputs hold no text, and a page of hashes
tells a reader nothing.)
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
from safecl.engine.durable import replace_file
from safecl.evaluation.evaluation import Evaluation
from safecl.evaluation.restore import evaluation_from_dict
from safecl.evaluation.tables import measures, moments
from safecl.report.page import render

REPORT = "report.html"
MOST_ANSWERS = 6
LONGEST_ANSWER = 400
PLAIN_STATE = ("exp_avg", "exp_avg_sq")


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
    def privacy(self) -> str:
        """What the run's config says; the strictest where that cannot be read."""
        try:
            return yaml.safe_load(self.config)["privacy"]["examples"]
        except (KeyError, TypeError, yaml.YAMLError):
            return "none"

    # ---------------------------------------------------------------------------------------------------------- measured

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
            lines.append(f"{safe[-1].when}: {_refused(last)} of the disallowed prompts are refused; {safe[0].when}: {_refused(first)}.")
            if last.low > first.high:
                lines.append("Refusal was lost: the intervals do not overlap.")
        if self.results["gate"]:
            lines.append(f"Safety gate: {self.results['gate']['verdict']}.")
        return lines or ["No safety prompts were named, so nothing is said about safety here."]

    @property
    def verdict_class(self) -> str:
        if self.results["gate"]:
            return "good" if self.results["gate"]["verdict"] == "passed" else "bad"
        return "bad" if "Refusal was lost: the intervals do not overlap." in self.verdict else ""

    # ----------------------------------------------------------------------------------------------------------- answers

    @property
    def withheld(self) -> bool:
        return self.privacy != "full" and any(evaluation.safety for evaluation in self.evaluations)

    def answers(self, evaluation: Evaluation) -> dict[str, str]:
        """Disallowed prompt -> answer at that moment; empty where privacy or a missing file forbids."""
        if self.privacy != "full":
            return {}
        records = [record for path in (self.folder / "outputs").glob(f"{evaluation.step:06d}-*-safety.jsonl") for record in _lines(path)]
        return {record["prompt"]: record["answer"] for record in records if record["set"] == "disallowed" and "answer" in record}

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

    # ---------------------------------------------------------------------------------------------------------- training

    @property
    def losses(self) -> dict[str, list[tuple[float, float]]]:
        """Term of the loss -> (step, value)."""
        series: dict[str, list[tuple[float, float]]] = {}
        for line in _lines(self.folder / "metrics.jsonl"):
            for key, value in line.items():
                if key.startswith("loss/") and value is not None:
                    series.setdefault(key.removeprefix("loss/"), []).append((line["step"], value))
        return series


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
    return ReportedRun(folder, {"cost": None, "gate": None, **results}, _text(folder / "config.yaml"), _versions(folder))


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
