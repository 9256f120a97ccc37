"""One rank of the demonstration: alignment, then every arm, in one process group. Started by
safecl/distributed/spawn.py."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from safecl.config import load_config
from safecl.demo.progress import Reporter
from safecl.distributed import environment
from safecl.exits import ExitCode, errors_as_messages, tracebacks


def run_arms(configs: Sequence[Path], events: Path) -> None:
    """Train every config, one after the other. A finished run is skipped, and an unfinished one is resumed. Checkpoints
    of a finished run are removed: those of a pretrained model take 1.6 GB a run."""
    from safecl.demo.console import ArmConsole
    from safecl.training.trainer import Trainer

    for path in configs:
        trainer = Trainer(load_config(path))
        reporter = Reporter(events, path.stem)
        trainer.console = ArmConsole(reporter)
        if trainer.fit().stopped:
            raise SystemExit(ExitCode.STOPPED)
        if environment.rank() == 0:
            shutil.rmtree(trainer.folder / "checkpoints", ignore_errors=True)
            reporter.finished()


if __name__ == "__main__":
    # Ctrl-C reaches the parent as well, which asks all ranks to end, and kills them at a second one. spawn.py starts
    # the ranks with the signal blocked. A training run has handlers of its own, which say that it saves.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    events, *configs = (Path(argument) for argument in sys.argv[1:])
    tracebacks.folder = events.parent
    with errors_as_messages("demo"):
        try:
            run_arms(configs, events)
        except KeyboardInterrupt:
            raise SystemExit(ExitCode.STOPPED) from None
