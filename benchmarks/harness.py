"""The common part of the benchmarks: contenders that alternate in one process, medians, a roof, machine facts."""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks import ROOT

if TYPE_CHECKING:
    from safecl.training.trainer import RunResult, Trainer


@dataclass
class Contender:
    """One way to do a job.

    bytes: the bytes per element that the algorithm must move. error: its distance from fp64, relative to the distance
    that the result moved.
    """

    name: str
    run: Callable[[], object]
    bytes: float
    error: float | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def row(self, numel: int, roof: float) -> dict:
        """Return the row of the table; roof: bytes per second of a device copy in the same rounds."""
        rate = self.bytes * numel / self.median
        quartiles = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else [self.median] * 3
        return {
            "ms": round(1e3 * self.median, 4),
            "ms_quartiles": [round(1e3 * quartiles[0], 4), round(1e3 * quartiles[2], 4)],
            "bytes_per_element": self.bytes,
            "gb_per_s": round(rate / 1e9, 2),
            "of_copy": round(rate / roof, 3),
            "error": self.error,
        }


LAUNCH_CYCLES = 2_000_000
"""Cycles of a GPU, about a millisecond, that it waits before a timed call."""


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of one call.

    On a GPU it is measured by events, from the begin of the first kernel on: the GPU waits while the host launches, so
    that the time of the launch is not counted.
    """
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(LAUNCH_CYCLES)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def take_turns(
    contenders: list[Contender], probe: Contender, device: torch.device, *, rounds: int, seconds: float, slack: float
) -> dict:
    """Run every contender once a round until there are `rounds` undisturbed rounds or `seconds` are over.

    A round is undisturbed if the probe (a plain copy at the start and the end of the round) took at most `slack` times
    its best time. The rule uses the copy alone, so it favours no contender. The undisturbed rounds are kept, or the
    quietest ones if there are too few. Returns the numbers of rounds run and kept.
    """
    for contender in (*contenders, probe):
        contender.run()
    deadline, found = time.monotonic() + seconds, []
    gc.disable()
    while time.monotonic() < deadline:
        before = seconds_of(probe.run, device)
        times = [0.0] * len(contenders)
        for turn in range(len(contenders)):
            # Each round starts with another contender, so that none always follows the same one.
            which = (turn + len(found)) % len(contenders)
            times[which] = seconds_of(contenders[which].run, device)
        found.append((max(before, seconds_of(probe.run, device)), before, times))
        best = min(probe_time for probe_time, *_ in found)
        if sum(probe_time <= slack * best for probe_time, *_ in found) >= rounds:
            break
    gc.enable()
    found.sort(key=lambda item: item[0])
    quiet = [item for item in found if item[0] <= slack * found[0][0]]
    kept = quiet if len(quiet) >= min(rounds, 5) else found[: min(rounds, len(found))]
    probe.seconds = [probe_time for probe_time, *_ in kept]
    for i, contender in enumerate(contenders):
        contender.seconds = [times[i] for *_, times in kept]
    return {"rounds": len(found), "kept": len(kept), "quiet": len(quiet), "slack": slack}


def fit(trainer: Trainer) -> RunResult:
    """Run safecl in this process. A signal that asked it to stop ends the benchmark with code 75, and no other run
    begins."""
    from safecl.exits import ExitCode

    try:
        return trainer.fit()
    finally:
        if trainer.was_asked_to_stop:
            sys.exit(ExitCode.STOPPED)


def reset_peak_memory() -> None:
    """Give freed memory back, and let `peak_memory` count from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the most bytes that were resident in this process since `reset_peak_memory`."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def machine(device: torch.device) -> dict:
    """Return the facts of the machine that one needs to judge and repeat a measurement."""
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": os.environ.get("COMMIT") or _output("git", "rev-parse", "--short", "HEAD"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }
    if device.type == "cuda":
        import triton

        facts |= {"gpu": torch.cuda.get_device_name(device), "triton": triton.__version__, "cuda": torch.version.cuda}
    return facts


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_json(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


def renew_page(page: Path, parts: dict[str, str]) -> None:
    """Write each part between `<!-- NAME -->` and the next `<!-- end -->` of a Markdown page."""
    text = page.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda m, part=part: f"{m[1]}{part}\n{m[2]}",
            text,
            count=1,
            flags=re.S,
        )
    page.write_text(text, encoding="utf-8")
    print(f"renewed {page}")


def print_table(title: str, rows: dict[str, dict]) -> None:
    print(f"\n{title}\n{'':42s} {'ms':>9s} {'GB/s':>8s} {'of copy':>8s} {'error':>9s}")
    for name, row in rows.items():
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        print(f"{name:42s} {row['ms']:9.3f} {row['gb_per_s']:8.1f} {row['of_copy']:8.2f} {error:>9s}")
