"""What the benchmarks of merges for safety share: a merge with its sweep, the choice of a setting, and tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safecl.config import RunConfig

RATES = ("asr", "affirmative", "complied", "off_task", "over_refusal")
INTEGERS = ("number", "steps")


@dataclass(frozen=True)
class Case:
    """A merge with its sweep.

    models: the roles that it gets beside the tuned model, `before` (alignment), `aligned`, or `base`, the aligned model
    as base. data: the file of rows.
    """

    title: str
    kind: str
    sweep: str
    models: tuple[str, ...] = ("aligned",)
    data: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its files."""
        return "".join(c if c.isalnum() else "-" for c in self.title).strip("-")

    @property
    def points(self) -> list[dict[str, Any]]:
        """The settings that are tried."""
        from safecl.merging.points import parse_sweeps

        return [{k: int(v) if k in INTEGERS else v for k, v in point.items()} for point in parse_sweeps([self.sweep])]


def choose(case: Case, parents: dict[str, Any], config: RunConfig, task: str, out: Path) -> list[dict[str, Any]]:
    """Measure all settings of a merge, unless that is done, and return settings and rates of each."""
    from safecl.merging import sweep

    if not (out / "sweep.json").exists():
        sweep(case.kind, case.points, config=config, out=out, **parents, **case.settings)
    found = json.loads((out / "sweep.json").read_text())["points"]
    return [{"settings": point["settings"], **rates(point, task)} for point in found]


def rates(evaluation: dict[str, Any], task: str) -> dict[str, Any]:
    """Return an evaluation's rates of safety, and the accuracy of its task."""
    return {name: evaluation["safety"][name] for name in RATES} | {"accuracy": evaluation["tasks"][task]}


def merit(point: dict[str, Any]) -> float:
    """Return what the best setting has most of."""
    return point["accuracy"]["value"] - point["asr"]["value"] - point["over_refusal"]["value"]


# -------------------------------------------------------------------------------------------------------------- tables


def setting_of(settings: dict[str, float]) -> str:
    return ", ".join(f"`{key}={value:g}`" for key, value in settings.items())


def row(title: str, setting: str, measured: Sequence[dict[str, Any]], seconds: str, columns: Sequence[str]) -> str:
    """Return a row of a Markdown table: of one measurement the rates with their 95 % intervals, of several the means
    with the smallest and the largest value."""
    cells = [_cell([one[name] for one in measured]) for name in columns]
    return f"| {title} | {setting} | {' | '.join(cells)} | {seconds} |"


def _cell(found: Sequence[dict[str, float]]) -> str:
    values = [rate["value"] for rate in found]
    low, high = (found[0]["low"], found[0]["high"]) if len(found) == 1 else (min(values), max(values))
    return f"{statistics.mean(values):.2f} ({low:.2f}–{high:.2f})"


def head(columns: Sequence[str], seconds: str = "s") -> str:
    """Return the head of a table."""
    names = [name.replace("asr", "ASR").replace("_", "-") for name in columns]
    return f"| | setting | {' | '.join(names)} | {seconds} |\n|---|---|{'---:|' * (len(columns) + 1)}"


def replace_table(page: Path, mark: str, table: str) -> None:
    """Put a table between `mark` and the next end mark of a page."""
    begin, end = f"<!-- {mark} -->\n", "<!-- end -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    page.write_text(before + begin + table + end + rest.split(end, 1)[1], encoding="utf-8")
