"""The figures of the GPU suite: each section's results as lines of a table with measured, floor, rival and met."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEAD_GOAL = 1.2
"""The head's time at most, relative to its matrix products alone."""


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    name: str
    measured: str
    floor: str = ""
    rival: str = ""
    met: bool | None = None


Figures = Callable[[Path], Iterator[Figure]]
"""Reads the figures of a section from the folder of results."""


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def of_tests(section: str) -> Figures:
    """Return the reader of a section of tests: how many of them have passed, failed and were skipped."""

    def figures(out: Path) -> Iterator[Figure]:
        counts = counts_of_tests((out / f"{section}.log").read_text(errors="replace"))
        if counts:
            words = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
            yield Figure(section, words, met=counts.keys() <= {"passed", "skipped"} if "passed" in counts else None)

    return figures


def counts_of_tests(log: str) -> dict[str, int]:
    """Return pytest's counts by outcome, such as {"passed": 126, "skipped": 1}, from the end of its output."""
    for line in reversed(log.splitlines()):
        if found := re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", line):
            return {outcome: int(count) for count, outcome in found}
    return {}


def of_smoke(out: Path) -> Iterator[Figure]:
    for run in read_json(out / "smoke.json")["runs"]:
        yield Figure(f"engine, {run['name']}", f"{run['error']:.1e} from the CPU run", "1e-3", met=run["met"])


def of_run(out: Path) -> Iterator[Figure]:
    found = read_json(out / "run.json")
    measured = f"{found['compared']} files and lines, {len(found['differences'])} differ"
    yield Figure("whole run, stopped and resumed", measured, "bitwise", met=not found["differences"])


def of_head(out: Path) -> Iterator[Figure]:
    found = read_json(out / "head.json")
    for group in [found, *found.values()]:
        if isinstance(group, dict):
            for objective, result in group.get("objectives", {}).items():
                yield _head_figure(objective, result["rows"])


def _head_figure(objective: str, rows: dict[str, dict[str, Any]]) -> Figure:
    products, own = rows["bare products"]["ms"], rows["safecl"]["ms"]
    ratio = own / products
    rivals = sorted((row["ms"], name) for name, row in rows.items() if name not in ("bare products", "safecl"))
    return Figure(
        f"head, {objective}",
        f"{own:.2f} ms, {ratio:.2f}x of bare products",
        f"{HEAD_GOAL:g}x of {products:.2f} ms",
        ", ".join(f"{name} {ms:.2f} ms" for ms, name in rivals),
        ratio <= HEAD_GOAL,
    )


def of_flat(out: Path) -> Iterator[Figure]:
    for one in read_json(out / "flat.json")["ratios"]:
        is_roof = one["rival"].startswith("roof")
        contender = one.get("contender", "fused")
        yield Figure(
            f"flat, {one['case']}" + ("" if contender == "fused" else f", {contender}"),
            f"{one['ratio']:.2f} of {one['rival']}",
            one["rival"] if is_roof else "",
            "" if is_roof else one["rival"],
            one["met"],
        )


def of_step(out: Path) -> Iterator[Figure]:
    summary = read_json(out / "step.json")["summary"]
    for side in ("plain", "safecl"):
        row = summary.get(side, {})
        if "problem" in row:
            yield Figure(f"7B step, {side}", "does not fit", met=None if side == "plain" else False)
        elif row:
            floor = f"{row['floor_seconds']} s of products" if "floor_seconds" in row else ""
            rate = f"{row['tokens_per_second']:,} tokens/s, MFU {row.get('mfu', 'unknown')}"
            yield Figure(f"7B step, {side}", f"{row['seconds']['whole step']} s, {rate}", floor)
    if "ratio" in summary:
        yield Figure("7B step, safecl over plain", f"{summary['ratio']}x", "", "DeepSpeed with its own Adam")
    if "memory" in summary:
        memory = summary["memory"]
        planned = f"{memory['planned'] / 2**30:.1f} GiB planned"
        yield Figure("7B step, peak", f"{memory['peak'] / 2**30:.1f} GiB", planned, met=memory["met"])
    if summary.get("page_locked", {}).get("planned"):
        locked = summary["page_locked"]
        planned = f"{locked['planned'] / 2**30:.2f} GiB planned"
        yield Figure("7B step, page-locked", f"{locked['locked'] / 2**30:.2f} GiB", planned, met=locked["met"])


def of_offload(out: Path) -> Iterator[Figure]:
    found = read_json(out / "offload.json")["offload"]
    for tokens, share in found["added_share_of_a_step_at_tokens"].items():
        limit = found["limits"].get(tokens)
        floor, met = ("", None) if limit is None else (f"{limit:.0%}", share <= limit)
        yield Figure(f"offloaded anchor, Fisher, EMA at {int(tokens):,} tokens", f"{share:.1%}", floor, met=met)


def of_teacher(out: Path) -> Iterator[Figure]:
    found = read_json(out / "teacher.json")
    for one in found.get("passes", []):
        yield Figure(
            f"streamed teacher, {one['tokens']:,} tokens",
            f"{one['streamed_over_resident']:.2f}x",
            f"break-even at {found['break_even_tokens']:,} tokens",
            "resident weights",
        )
