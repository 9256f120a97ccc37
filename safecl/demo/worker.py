"""One rank of the demonstration: alignment, then every arm, in one process group. Started by safecl/spawn.py."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from safecl import launcher
from safecl.commands.ending import Ending, ExitCode, errors_told
from safecl.config import load_config


def run_arms(configs: Sequence[Path], times: Path) -> None:
    """Trains every config, one after the other; rank 0 writes {config's stem: seconds} to `times` after each."""
    from safecl.engine.checkpoint import SaveReport
    from safecl.engine.console import Console
    from safecl.engine.trainer import Trainer

    class ArmConsole(Console):
        """Progress and what was measured; the demonstration prints one table for all arms instead of one for each."""

        arm = ""

        def fact(self, what: str, value: str) -> None:
            pass

        def show(self, make: object) -> None:
            pass

        def progress(self, name: str, num_steps: int, done: int = 0) -> AbstractContextManager:
            return super().progress(self.arm, num_steps, done)

        def saved(self, report: SaveReport) -> None:
            if report.problem is not None:
                super().saved(report)

        def results(self, evaluations: list, gate: object, folder: Path) -> None:
            pass

    seconds: dict[str, float] = {}
    for path in configs:
        trainer = Trainer(load_config(path))
        trainer.console = ArmConsole(trainer.config.log.every, launcher.rank())
        trainer.console.arm = path.stem
        result = trainer.fit()
        if result.stopped:
            raise SystemExit(ExitCode.STOPPED)
        seconds[path.stem] = result.results["seconds"]
        if launcher.rank() == 0:
            times.write_text(json.dumps(seconds), encoding="utf-8")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent as well, which speaks of it and ends all ranks
    times, *configs = (Path(argument) for argument in sys.argv[1:])
    Ending.run_folder = times.parent
    with errors_told("demo"):
        run_arms(configs, times)
