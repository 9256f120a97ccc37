"""Runs a sweep: each run is `safecl train` in processes of its own, several at a time.

A run that has its results is left alone; one that was stopped resumes; one that fails does not stop the others. What
depends on the base model alone is built by the first run that needs it, under a lock, and read by all others
(safecl.engine.artifacts.store). Ctrl-C and SIGTERM reach the runs, which save their state and end.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safecl.config import ConfigError, dump_config, load_config
from safecl.distributed.environment import without_launcher
from safecl.evaluation.gates.folders import CONFIG, RESULTS
from safecl.exits import ExitCode
from safecl.launching.status import duration
from safecl.sweeping.axes import PlannedRun
from safecl.training.folder import EXIT_CODE

LOGS = "logs"
SECONDS_TO_SAVE = 300.0
SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class Ending:
    """The end of a run of the sweep. `code` is that of `safecl train`; DONE and GATE have results."""

    run: PlannedRun
    code: int
    seconds: float
    was_there: bool = False
    """True where the folder held the results already."""

    @property
    def has_results(self) -> bool:
        return self.code in (ExitCode.DONE, ExitCode.GATE)


class Process(Protocol):
    """The part of subprocess.Popen that a sweep uses."""

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int: ...


Start = Callable[[Sequence[str], Mapping[str, str], Path], Process]
"""Starts a command with these variables added to the environment, and its output appended to a file."""


def start_process(command: Sequence[str], variables: Mapping[str, str], log: Path) -> Process:
    """Start a command in a session of its own, so that a Ctrl-C at the terminal reaches it through the sweep alone.

    It is no rank of a job that this process may belong to.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        return subprocess.Popen(
            [*command],
            env={**without_launcher(), **variables},
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


class Sweep:
    """Runs all runs of a sweep that have no results yet."""

    def __init__(
        self,
        config: Path,
        runs: Sequence[PlannedRun],
        *,
        ranks: int = 1,
        parallel: int = 1,
        say: Callable[[str], None] = print,
        start: Start | None = None,
    ):
        """config: the file that all runs share. ranks: of each run. parallel: runs at a time. say: prints a line.
        start: starts a run; by default `start_process`."""
        self.config, self.runs, self.ranks, self.parallel = config, list(runs), ranks, parallel
        self.say, self._start = say, start or start_process
        self._running: dict[int, tuple[PlannedRun, Process, float]] = {}
        """By slot."""
        self.endings: list[Ending] = []

    def run(self) -> list[Ending]:
        """Run what is missing and return how every run ended, in the order of their ends."""
        waiting = []
        for run in self.runs:
            if is_finished(self.config, run):
                self._end(Ending(run, ExitCode.DONE, 0.0, was_there=True))
            else:
                waiting.append(run)
        try:
            while waiting or self._running:
                for slot in range(self.parallel):
                    if slot not in self._running and waiting:
                        self._begin(slot, waiting.pop(0))
                self._collect()
        except BaseException:
            self._stop()
            raise
        return self.endings

    def position(self) -> str:
        """Say which runs are at work, how many have ended, and about how long the rest takes. Safe in any thread."""
        now, running = time.monotonic(), list(self._running.values())
        at_work = ", ".join(f"{run.name} for {duration(now - began)}" for run, _, began in running)
        took = [ending.seconds for ending in list(self.endings) if not ending.was_there]
        left = ""
        if took:
            mean, waiting = statistics.fmean(took), len(self.runs) - len(self.endings) - len(running)
            rest = waiting * mean + sum(max(0.0, mean - (now - began)) for _, _, began in running)
            left = f", about {duration(rest / self.parallel)} left"
        return f"running {at_work or 'nothing'}; {len(self.endings)} of {len(self.runs)} runs have ended{left}"

    def _begin(self, slot: int, run: PlannedRun) -> None:
        log = run.folder.parent / LOGS / f"{run.name}.log"
        process = self._start(self.command(run), devices_of(slot, self.ranks, os.environ, num_gpus()), log)
        self._running[slot] = run, process, time.monotonic()

    def command(self, run: PlannedRun) -> list[str]:
        """Return the command of one run."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
        own = ["-m", "safecl", "train", str(self.config), *run.overrides, f"output={run.folder}"]
        return [sys.executable, *(launcher if self.ranks > 1 else []), *own]

    def _collect(self) -> None:
        """Wait until some run has ended, or for a moment."""
        for slot, (run, process, began) in list(self._running.items()):
            code = process.poll()
            if code is not None:
                del self._running[slot]
                self._end(Ending(run, self._own_code(run, code), time.monotonic() - began))
                return
        time.sleep(SECONDS_BETWEEN_LOOKS)

    def _own_code(self, run: PlannedRun, code: int) -> int:
        """Return safecl's exit code, which torchrun hides and the run folder keeps."""
        try:
            return int((run.folder / EXIT_CODE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return code

    def _end(self, ending: Ending) -> None:
        self.endings.append(ending)
        what = {0: "done", 3: "done, its gate is not passed", 75: "stopped"}.get(ending.code, "failed")
        how = "was there" if ending.was_there else f"{what} in {ending.seconds:.0f} s"
        where = "" if ending.has_results else f"; see {ending.run.folder.parent / LOGS / ending.run.name}.log"
        self.say(f"[{len(self.endings)}/{len(self.runs)}] {ending.run.name}: {how}{where}")

    def _stop(self) -> None:
        """Let the runs save their state and end."""
        for _, process, _ in self._running.values():
            process.terminate()
        for _, process, _ in self._running.values():
            try:
                process.wait(SECONDS_TO_SAVE)
            except subprocess.TimeoutExpired:
                continue


def is_finished(config: Path, run: PlannedRun) -> bool:
    """Return whether the folder holds the results of this very run. config: the file that all runs share.

    A key that the folder's config lacks, because an earlier safecl wrote it, counts as its default.
    """
    if not (run.folder / RESULTS).is_file():
        return False
    wanted = load_config(config, [*run.overrides, f"output={run.folder}"])
    try:
        return dump_config(load_config(run.folder / CONFIG)) == dump_config(wanted)
    except (ConfigError, OSError):
        return False


def num_gpus() -> int:
    """Return the number of NVIDIA GPUs of this machine, without a library that would open them."""
    return len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])


def devices_of(slot: int, ranks: int, environment: Mapping[str, str], gpus: int) -> dict[str, str]:
    """Return the variables that give a slot devices of its own; nothing where there are no GPUs."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    devices = [d for d in named.split(",") if d] if named is not None else [str(i) for i in range(gpus)]
    if not devices:
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices[(slot * ranks + i) % len(devices)] for i in range(ranks))}
