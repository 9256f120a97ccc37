"""Section `demo` of benchmarks/faults/sections.py: the demonstration is killed in every phase and started again.

    python -m benchmarks.faults.sections demo

The whole process group gets SIGKILL a random time after the phase has begun. After the last kill the demonstration must
end by itself, and its models, metrics and answers must equal those of one that was never killed, byte for byte.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ROOT

OF_THE_MACHINE = ("tokens_per_second", "memory_bytes")


Condition = Callable[[float], bool]
"""Whether a condition holds since a time; files from before that time do not count."""


@dataclass(frozen=True)
class Phase:
    """A phase of the demonstration, which is killed up to `within` seconds after the phase has begun."""

    name: str
    begun: Condition
    within: float = 0.0


def kill_in_every_phase(folder: Path, seed: int) -> dict:
    """Return the `killed` phases in order, the `missed` ones, which ended before the kill, and what is `wrong`."""
    whole, demo = folder / "whole", folder / "demo"
    codes = [start(whole).wait()]
    chance, killed, missed = random.Random(seed), [], []
    everything = list(phases(demo))
    for phase, after in itertools.zip_longest(everything, everything[1:]):
        in_time = _kill_in(phase, after, demo, chance)
        (killed if in_time else missed).append(phase.name)
        print(f"  {phase.name}: {'killed' if in_time else 'missed'}", flush=True)
    codes.append(start(demo).wait())
    wrong = [f"exit codes {codes}"] if any(codes) else list(_differences(whole, demo))
    return {"kills": len(killed), "killed": killed, "missed": missed, "wrong": wrong}


def start(folder: Path) -> subprocess.Popen:
    """Start the demonstration in its own process group."""
    environment = {**os.environ, "SAFECL_CACHE": str(folder.with_name(f"{folder.name}-cache")), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "safecl", "demo", str(folder)]
    command = ["nice", "-n", "5", *command]  # so that this process gets the CPU at the time of the kill
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, env=environment, cwd=ROOT)


def phases(demo: Path) -> Iterator[Phase]:
    """Yield all phases, from the first file to the last page."""
    from safecl.demo.arms import ARMS

    runs = ["aligned", *(arm.name for arm in ARMS)]
    yield Phase("writing data", _is_there(demo / "data"))
    yield Phase("tokenizer and random model", _is_there(demo / "random-model"))
    yield Phase("starting ranks", _is_there(demo / f"{ARMS[-1].name}.yaml"), within=8)
    for run in runs:
        yield from _phases_of_a_run(demo / run)
    yield Phase("demonstration's page", _has(demo / "progress.jsonl", len(runs), b'"finished"'), within=0.5)


def _phases_of_a_run(folder: Path) -> Iterator[Phase]:
    steps, metrics = 200 if folder.name == "aligned" else 80, folder / "metrics.jsonl"
    yield Phase(f"{folder.name}: loading, memory, first measures", _is_there(folder / "run.json"), within=4)
    yield Phase(f"{folder.name}: training", _has(metrics, 1), within=4)
    yield Phase(f"{folder.name}: saving a checkpoint", _is_there(folder / "checkpoints" / ".partial"))
    yield Phase(f"{folder.name}: measuring at the end", _has(metrics, steps), within=1)
    yield Phase(f"{folder.name}: writing the model folder", _is_there(folder / ".model.partial"))
    yield Phase(f"{folder.name}: results and page", _is_there(folder / "results.json"))


def _is_there(path: Path) -> Condition:
    return lambda since: path.exists() and path.stat().st_mtime >= since


def _has(path: Path, count: int, text: bytes = b"\n") -> Condition:
    return lambda since: _is_there(path)(since) and path.read_bytes().count(text) >= count


def _kill_in(phase: Phase, after: Phase | None, demo: Path, chance: random.Random) -> bool:
    """Kill the demonstration; return False if the phase was over before it was noticed, so that the next was killed."""
    process, since = start(demo), time.time() - 0.01
    moment, in_time = None, True
    while moment is None or time.monotonic() < moment:
        if process.poll() is not None:
            return False
        if moment is None and _now(phase.begun, since):
            moment = time.monotonic() + chance.uniform(0, phase.within)
        elif moment is None and after is not None and _now(after.begun, since):
            moment, in_time = time.monotonic(), False
        time.sleep(0.0005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return in_time


def _now(condition: Condition, since: float) -> bool:
    try:
        return condition(since)
    except OSError:  # the file vanished between two calls
        return False


def _differences(whole: Path, demo: Path) -> Iterator[str]:
    """Yield the differences from the demonstration that was never killed, and the leftovers of kills.

    Checkpoints, memory and artifacts are intermediate files and are not compared.
    """
    for path in sorted(
        path
        for path in whole.rglob("*")
        if path.is_file() and not {"checkpoints", "memory", "artifacts"} & set(path.parts)
    ):
        other = demo / path.relative_to(whole)
        if not other.exists():
            yield f"{other.relative_to(demo)} is missing"
        elif path.name == "metrics.jsonl":
            yield from [] if _measured(path) == _measured(other) else [f"{other.relative_to(demo)} has other numbers"]
        elif path.parent.name in ("model", "model-live", "outputs", "random-model", "data"):
            # rows hold the path of their source file
            same = path.read_bytes().replace(bytes(whole), b"") == other.read_bytes().replace(bytes(demo), b"")
            yield from [] if same else [f"{other.relative_to(demo)} has other bytes"]
    for left in sorted(path for path in demo.rglob("*") if ".partial" in path.name or path.name.endswith(".old")):
        yield f"{left.relative_to(demo)} is left over"


def _measured(metrics: Path) -> list[dict]:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in OF_THE_MACHINE} for line in lines]
