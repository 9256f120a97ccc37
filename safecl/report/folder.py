"""Reads a folder for its page: a finished run, an unfinished one, or what `safecl eval` has written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from safecl.config import ConfigError, parse_yaml
from safecl.evaluation.judges.after_run import JUDGES
from safecl.evaluation.provenance import SCHEMA
from safecl.evaluation.results.moment import Evaluation
from safecl.evaluation.results.restore import evaluations_of
from safecl.evaluation.results.summary import summarise
from safecl.launching.status import Status, status_of
from safecl.report.page import PLAIN_STATE
from safecl.storage.records import read_lines, read_record, read_text
from safecl.storage.run_records import (
    Identity,
    JudgedMoment,
    Judgements,
    Measured,
    Results,
    Safety,
    Scanned,
    Step,
    Version,
)

Kind = Literal["finished", "unfinished", "evaluation"]
Points = list[tuple[float, float]]
"""(step, value), in the order in which they were measured."""

MEASURED = "measured.json"
"""The evaluations of a run that is not finished."""
PROBED = "probe/complying"
"""Key of metrics.jsonl with what the probe saw before a step."""
LARGEST_LOSS = 1e30
"""Larger values, and those that are no numbers, are left out of the curves."""
_LACKING: dict[str, Any] = {
    "cost": None, "gate": None, "methods": (), "steps": 0, "tokens": 0, "seconds": None, "world_size": None,
    "finished": None, "provenance": None, "summary": None, "evaluations": (),
}  # fmt: skip


@dataclass
class ReportedRun:
    """A folder's files, as far as they are there. `results` has every key of `_LACKING`."""

    folder: Path
    kind: Kind
    results: Mapping[str, Any]
    config: str = ""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """run.json; empty where it cannot be read."""
    status: Status | None = None
    """How far an unfinished run is."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def methods_text(self) -> str:
        if self.kind == "evaluation":
            return "measured without training"
        return " + ".join(self.results["methods"]) or "plain fine-tuning"

    @property
    def versions(self) -> Mapping[str, str]:
        return (self.results["provenance"] or {}).get("versions") or self.identity.get("versions") or {}

    @property
    def extra_state(self) -> int:
        """Bytes that the methods keep in addition to weights and moments."""
        return sum(size for kind, size in self.results["cost"]["state_bytes"].items() if kind not in PLAIN_STATE)

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The config as a tree; empty where it cannot be read."""
        try:
            tree = parse_yaml(self.config)
        except ConfigError:
            return {}
        return tree if isinstance(tree, dict) else {}

    def section(self, name: str) -> Mapping[str, Any]:
        """Return a section of the config; empty where there is none."""
        found = self.settings.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def privacy(self) -> str:
        """`privacy.examples` of the run's config; the strictest value where that cannot be read."""
        own = self.results.get("privacy")
        return own if own is not None else self.section("privacy").get("examples", "none")

    @cached_property
    def judged(self) -> Mapping[str, Any]:
        """judges.json, which `safecl judge` writes; empty without it."""
        return read_record(self.folder / JUDGES, Judgements) or {}

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """The evaluations, with the rates of judges that were asked later."""
        judged = {(each["when"], each["step"]): each for each in self.judged.get("moments", ())}
        found: list[Mapping[str, Any]] = []
        for values in self.results["evaluations"]:
            safety, later = values.get("safety"), judged.get((values["when"], values["step"]))
            found.append(values | {"safety": with_judges(safety, later)} if safety and later else values)
        return evaluations_of(found, self.folder)

    @property
    def panels(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Agreement of judges, by moment."""
        own = [(each.when, each.safety.panel) for each in self.evaluations if each.safety is not None]
        later = [(each["when"], each["panel"]) for each in self.judged.get("moments", ())]
        return [(when, panel) for when, panel in (*own, *later) if panel is not None]

    @property
    def summary(self) -> Mapping[str, Any]:
        """Worst moments and transfer over the run; of an unfinished one so far."""
        if self.kind == "unfinished" and self.evaluations:
            return summarise(self.evaluations)
        return self.results["summary"] or {}

    @cached_property
    def scans(self) -> list[str]:
        """Results of screening each task's rows, in words; empty without a scan."""
        found = read_record(self.folder / "scan" / "results.json", Scanned)
        return [_scanned(task, found["action"]) for task in found["tasks"]] + found["notes"] if found else []

    @cached_property
    def _steps(self) -> list[Step]:
        return read_lines(self.folder / "metrics.jsonl", Step)

    @cached_property
    def losses(self) -> dict[str, Points]:
        """Points of each term of the loss."""
        series: dict[str, Points] = {}
        for line in self._steps:
            for key, value in line.items():
                if key.startswith("loss/") and isinstance(value, (int, float)) and abs(value) < LARGEST_LOSS:
                    series.setdefault(key.removeprefix("loss/"), []).append((line["step"], value))
        return series

    @cached_property
    def probed(self) -> Points:
        """The share of prompts on which the probe saw compliance lead; empty without a probe."""
        looks = ((line["step"], line.get(PROBED)) for line in self._steps)
        return [(step, share) for step, share in looks if isinstance(share, (int, float)) and 0 <= share <= 1]


def with_judges(safety: Safety, later: JudgedMoment) -> dict[str, Any]:
    """Add the rates of judges to those of a moment: over all prompts, by risk category and by variant."""
    categories: dict[str, Any] = dict(safety.get("by_category") or {})
    for name, rates in (later.get("by_category") or {}).items():
        categories[name] = categories.get(name, {}) | rates
    variants: dict[str, Any] = dict(safety.get("variants") or {})
    for name, rates in (later.get("variants") or {}).items():
        if name in variants:
            variants[name] = variants[name] | {"asr_by_scorer": variants[name].get("asr_by_scorer", {}) | rates}
    more = {"by_category": categories, "variants": variants}
    return {**safety, "asr_by_scorer": safety["asr_by_scorer"] | later["asr"], **more}


def _scanned(task: Mapping[str, Any], action: str) -> str:
    """Describe one task's part of scan/results.json."""
    done = {"drop": "left out", "downweight": "given less weight"}.get(action, "listed")
    threshold = task["threshold"]
    alarms = f"{'at most' if threshold['source'] == 'benign' else 'about'} {threshold['false_alarm']:.1%}"
    return (
        f"{task['task']}: {task['flagged']:,} of {task['rows']:,} rows flagged and {done}; "
        f"{alarms} of harmless rows are flagged, too."
    )


# ---------------------------------------------------------------------------------------------------------------- read


def read_run(folder: str | Path) -> ReportedRun:
    """Read a run, finished or not, or the results of an evaluation. Raises ConfigError for a folder that holds none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such run folder")
    identity, config = read_record(folder / "run.json", Identity), read_text(folder / "config.yaml") or ""
    results = _results(folder)
    if results is None:
        if identity is None:
            raise ConfigError(f"{folder}: not a run folder, there is neither results.json nor run.json in it")
        return _unfinished(folder, config, identity)
    kind: Kind = "finished" if {"methods", "steps"} <= results.keys() else "evaluation"
    if kind == "evaluation" and not config:
        config = read_text(folder.parent / "config.yaml") or ""
    return ReportedRun(folder, kind, _LACKING | dict(results), config, identity or {})


def _results(folder: Path) -> Results | None:
    """Read results.json; None where there is none."""
    path = folder / "results.json"
    version = read_record(path, Version)
    if version is not None and (schema := version.get("schema", SCHEMA)) > SCHEMA:
        raise ConfigError(f"{path}: has schema {schema}, and this safecl reads up to {SCHEMA}; update safecl")
    return read_record(path, Results)


def _unfinished(folder: Path, config: str, identity: Mapping[str, Any]) -> ReportedRun:
    """Return a run that is under way, stopped, or failed, with what it has measured so far."""
    status, steps = status_of(folder), read_lines(folder / "metrics.jsonl", Step)
    measured = read_record(folder / MEASURED, Measured)
    results = {
        "methods": list((identity.get("config") or {}).get("methods") or ()),
        "steps": status.steps_done,
        "tokens": sum(line.get("tokens", 0) for line in steps),
        "evaluations": measured["evaluations"] if measured else (),
        "safecl": (identity.get("versions") or {}).get("safecl", ""),
    }
    return ReportedRun(folder, "unfinished", _LACKING | results, config, identity, status)
