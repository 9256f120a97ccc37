"""The state of a run, read from its folder alone: progress, step time, last checkpoint, ranks. Imports no torch."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safecl.config import ConfigError
from safecl.launching.job import LOGS
from safecl.storage.durable import replace_file
from safecl.storage.locks import FileLock

RANKS, SPEEDS = "ranks.json", "rank_speeds.jsonl"
_RECENT_STEPS = 50


@dataclass(frozen=True)
class Status:
    """The state of a run. state: running, stopped, finished, or ended for one that failed or was killed. facts: (label,
    text) lines for people."""

    state: str
    steps_done: int
    steps: int
    seconds_per_step: float | None
    facts: list[tuple[str, str]] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(
            {
                "state": self.state,
                "steps_done": self.steps_done,
                "steps": self.steps,
                "seconds_per_step": self.seconds_per_step,
                "facts": dict(self.facts),
            },
            indent=2,
        )


def write_ranks(folder: Path, hosts: list[str], tasks: dict[str, int]) -> None:
    """Write ranks.json, which says where each rank runs and how many steps each task has."""
    replace_file(folder / RANKS, json.dumps({"hosts": hosts, "tasks": tasks}, indent=1))


def status_of(folder: Path) -> Status:
    """Read the state of the run in a folder. Raises ConfigError where there is none."""
    identity = _json(folder / "run.json")
    if identity is None:
        raise ConfigError(f"{folder}: holds no run (run.json is missing); name the folder that `output` names")
    ranks = _json(folder / RANKS) or {}
    steps, metrics = sum(ranks.get("tasks", {}).values()), list(_lines(folder / "metrics.jsonl"))
    seconds = _seconds_per_step(metrics[-_RECENT_STEPS:])
    done = metrics[-1]["step"] + 1 if metrics else 0
    state = _state(folder)
    facts = [("state", _described(folder, state)), ("progress", _progress(done, steps, metrics))]
    if seconds is not None:
        left = f", about {duration(seconds * (steps - done))} left" if state == "running" and steps > done else ""
        facts.append(("step time", f"{seconds:.3g} s (median of the last {min(len(metrics), _RECENT_STEPS)}){left}"))
    facts.append(("checkpoint", _checkpoint(folder)))
    facts += _rank_facts(folder, ranks)
    return Status(state, done, steps, seconds, facts)


def _state(folder: Path) -> str:
    if (folder / "results.json").exists():
        return "finished"
    if _is_locked(folder / "run.lock"):
        return "running"
    code = _text(folder / "exit_code")
    return "stopped" if code == "75" else "ended"


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        lock = FileLock(path)
    except OSError:
        return False
    try:
        return not lock.take()
    finally:
        lock.close()


def _described(folder: Path, state: str) -> str:
    metrics = folder / "metrics.jsonl"
    ago = f", last step {duration(time.time() - metrics.stat().st_mtime)} ago" if metrics.exists() else ""
    return {
        "finished": f"finished, exit code {_text(folder / 'exit_code') or 'unknown'}",
        "running": f"running ({_text(folder / 'run.lock') or 'holder unknown'}){ago}",
        "stopped": f"stopped by a signal; the same command resumes it{ago}",
        "ended": f"not running; it failed or was killed, and the same command resumes it{ago} (logs: {folder / LOGS})",
    }[state]


def _progress(done: int, steps: int, metrics: list[dict[str, Any]]) -> str:
    task = f", task {metrics[-1]['task']}" if metrics else ""
    return f"step {done} of {steps}, {done / steps:.0%}{task}" if steps else f"step {done}{task}"


def _seconds_per_step(metrics: list[dict[str, Any]]) -> float | None:
    seconds = [line["tokens"] / line["tokens_per_second"] for line in metrics if line.get("tokens_per_second")]
    return statistics.median(seconds) if seconds else None


def _checkpoint(folder: Path) -> str:
    whole = sorted(path for path in folder.glob("checkpoints/step-*") if (path / "manifest.json").exists())
    if not whole:
        return "none yet"
    return f"{whole[-1].name}, {duration(time.time() - (whole[-1] / 'manifest.json').stat().st_mtime)} ago"


def _rank_facts(folder: Path, ranks: dict[str, Any]) -> Iterator[tuple[str, str]]:
    hosts: list[str] = ranks.get("hosts", [])
    if hosts:
        nodes = list(dict.fromkeys(hosts))
        yield "ranks", f"{len(hosts)} on {len(nodes)} node{'s' * (len(nodes) > 1)}: {', '.join(nodes)}"
    speeds = list(_lines(folder / SPEEDS))
    if speeds:
        last = speeds[-1]
        yield "slowest rank", last["slowest"]
        if last["stragglers"]:
            yield "stragglers", "; ".join(last["stragglers"])


def duration(seconds: float) -> str:
    """Format seconds: 90 s, 12 min, 3.4 h."""
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in (_text(path) or "").splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # the last line, while it is being written
            return


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
