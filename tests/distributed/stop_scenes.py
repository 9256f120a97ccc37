"""Whole runs of the trainer that are asked to stop, or hindered, at chosen moments, on the ranks of the pool."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from pathlib import Path
from unittest import mock

from safecl.distributed import collectives


def trainer_of(tree: dict, cache: str, fresh: bool = False):
    """(trainer, what it says) of a run config given as a tree."""
    from safecl.config import RunConfig
    from safecl.terminal import Terminal
    from safecl.training.output.console import Console
    from safecl.training.trainer import Trainer

    os.environ["SAFECL_CACHE"] = cache
    trainer = Trainer(RunConfig.model_validate(tree), fresh=fresh)
    said = io.StringIO()
    trainer.console = Console(1000, collectives.rank(), Terminal(file=said, width=400))
    return trainer, said


def fit(tree: dict, cache: str, stop: dict | None = None, fresh: bool = False) -> dict:
    """Fit once. `stop`: the rank, the signal that it gets (`name`), and the global step or the number of the evaluation
    in which it gets it."""
    trainer, said = trainer_of(tree, cache, fresh)
    with stopping(**stop) if stop is not None else contextlib.nullcontext():
        result = trainer.fit()
    asked = trainer.was_asked_to_stop
    return {"results": result.results, "stopped": result.stopped, "asked": asked, "said": said.getvalue()}


def exit_codes_of(tree: dict, cache: str, stop: dict) -> list[tuple[int, str]]:
    """(exit code, what the run folder says of it) of `safecl train`, first stopped, then not."""
    from safecl.commands.train import train_run
    from safecl.config import RunConfig

    os.environ["SAFECL_CACHE"] = cache
    config, found, before = RunConfig.model_validate(tree), [], signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stdout(io.StringIO()):
        for moment in (stopping(**stop), contextlib.nullcontext()):
            with moment:
                code = train_run(config)
            found.append((int(code), (Path(tree["output"]) / "exit_code").read_text()))
            signal.signal(signal.SIGTERM, before)
    return found


@contextlib.contextmanager
def stopping(rank: int, name: str, step: int | None = None, evaluation: int | None = None):
    from safecl.training.guard import measuring
    from safecl.training.run import Run

    train_step, evaluate, evaluations = Run.train_step, measuring.evaluate, []

    def stop_here() -> None:
        if collectives.rank() == rank:
            os.kill(os.getpid(), getattr(signal, name))

    def stepping(self, task):
        if self.global_step + 1 == step:
            stop_here()
        return train_step(self, task)

    def evaluating(*arguments, **options):
        evaluations.append(1)
        if len(evaluations) == evaluation:
            stop_here()
        return evaluate(*arguments, **options)

    with mock.patch.object(Run, "train_step", stepping), mock.patch.object(measuring, "evaluate", evaluating):
        yield


def fit_in_pieces(tree: dict, cache: str, stops: list[dict | None]) -> list[dict]:
    """Start the run once for each stop; with None it may finish."""
    return [fit(tree, cache, stop) for stop in stops]


def refused(tree: dict, cache: str, fresh: bool = False) -> str:
    """The message by which the trainer refuses to begin."""
    from safecl.config import ConfigError

    try:
        fit(tree, cache, fresh=fresh)
    except ConfigError as error:
        return str(error)
    raise AssertionError("not refused")


def fit_on_a_full_disk(tree: dict, cache: str, stop: dict | None = None) -> dict | str:
    """Fits while the disk has room for models, but for no checkpoint; returns the message where the run fails."""
    from safecl.engine.checkpoint import publishing
    from safecl.training.trainer import TrainingFailed

    with (
        mock.patch.object(publishing, "free_bytes", lambda path: 10_000),
        mock.patch("safecl.training.resume.free_bytes", lambda path: 10**12),
    ):
        try:
            return fit(tree, cache, stop)
        except TrainingFailed as failed:
            return str(failed)


def end_all_ranks_at(tree: dict, cache: str, step: int) -> None:
    """Trains until a global step and is killed there, without any clean-up."""
    from safecl.training.run import Run

    train_step = Run.train_step

    def stepping(self, task):
        if self.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(self, task)

    with mock.patch.object(Run, "train_step", stepping):
        fit(tree, cache)


def leave_lock(folder: str) -> str:
    """Tries to take a run folder that somebody holds."""
    from safecl.config import ConfigError
    from safecl.training.folder import RunFolder

    try:
        RunFolder(Path(folder)).lock()
    except ConfigError as error:
        return str(error)
    return ""
