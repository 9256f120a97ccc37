"""The state of a run, read from its folder alone: progress, step time, last checkpoint, ranks. Imports no torch."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safecl.config import ConfigError
from safecl.config.texts import visible
from safecl.launching.job import LOGS
from safecl.storage.durable import replace_file
from safecl.storage.locks import FileLock
from safecl.storage.records import read_lines, read_record, read_text
from safecl.storage.run_records import Identity, Ranks, RankSpeeds, Step

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
    if read_record(folder / "run.json", Identity) is None:
        raise ConfigError(f"{folder}: holds no run (run.json is missing); name the folder that `output` names")
    ranks = read_record(folder / RANKS, Ranks) or Ranks()
    steps, metrics = sum(ranks.get("tasks", {}).values()), read_lines(folder / "metrics.jsonl", Step)
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


def _progress(done: int, steps: int, metrics: list[Step]) -> str:
    task = f", task {visible(metrics[-1]['task'])}" if metrics else ""
    return f"step {done} of {steps}, {done / steps:.0%}{task}" if steps else f"step {done}{task}"


def _seconds_per_step(metrics: list[Step]) -> float | None:
    seconds = [line.get("tokens", 0) / speed for line in metrics if (speed := line.get("tokens_per_second"))]
    return statistics.median(seconds) if seconds else None


def _checkpoint(folder: Path) -> str:
    whole = sorted(path for path in folder.glob("checkpoints/step-*") if (path / "manifest.json").exists())
    if not whole:
        return "none yet"
    return f"{whole[-1].name}, {duration(time.time() - (whole[-1] / 'manifest.json').stat().st_mtime)} ago"


def _rank_facts(folder: Path, ranks: Ranks) -> Iterator[tuple[str, str]]:
    hosts = ranks.get("hosts", [])
    if hosts:
        nodes = [visible(host) for host in dict.fromkeys(hosts)]
        yield "ranks", f"{len(hosts)} on {len(nodes)} node{'s' * (len(nodes) > 1)}: {', '.join(nodes)}"
    speeds = read_lines(folder / SPEEDS, RankSpeeds)
    if speeds:
        last = speeds[-1]
        yield "slowest rank", visible(last["slowest"])
        if last["stragglers"]:
            yield "stragglers", "; ".join(map(visible, last["stragglers"]))


def duration(seconds: float) -> str:
    """Format seconds: 90 s, 12 min, 3.4 h."""
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _text(path: Path) -> str | None:
    found = read_text(path)
    return None if found is None else visible(found.strip()[:100])
