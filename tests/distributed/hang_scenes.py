"""Ranks that hang, as processes of their own: the watchdog ends them. Stderr of each rank goes into a file."""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

from safecl.distributed import progress, watchdog
from safecl.distributed.progress import STEP, phase, step_took
from safecl.distributed.signals import StopRequest
from tests.distributed import stop_scenes


def sleep() -> None:
    time.sleep(1000)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def keep_the_lock() -> None:
    re.match(r"(a+)+$", "a" * 60 + "b")  # in C, without giving back Python's lock


HANGS = {"sleeps": sleep, "is stopped": stop, "keeps the lock": keep_the_lock}


def redirect_stderr(said: str) -> None:
    os.dup2(os.open(f"{said}-{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)


def loop(folder: str, said: str, how: str, rank: int, where: str = STEP, timeout: float = 0.8) -> None:
    """Steps of one all-reduce, an evaluation every fifth; one rank hangs in its eighth step or in an evaluation."""
    import torch
    import torch.distributed as dist

    redirect_stderr(said)
    own = int(os.environ["RANK"])
    Path(f"{said}-process-{own}").write_text(str(os.getpid()))
    limits = dict.fromkeys(progress.SECONDS_WITHOUT_A_BEAT, timeout)
    with (
        mock.patch.dict(progress.SECONDS_WITHOUT_A_BEAT, limits),
        mock.patch.object(watchdog, "SECONDS_FOR_THE_STORE", 1.0),
        mock.patch.object(watchdog, "SECONDS_AFTER_A_SIGNAL", 3.0),
        mock.patch.object(watchdog, "SECONDS_AFTER_A_SECOND_CTRL_C", 0.5),
        StopRequest(),
        watchdog.watching(Path(folder), 1000.0 if how == "waits for a signal" else timeout) as dog,
    ):
        dog.tick = 0.1
        dog.attach()
        for step in range(12):
            name = "evaluation" if step % 5 == 4 else STEP
            with phase(name):
                if own == rank and name == where and step in (7, 9):
                    HANGS["sleeps" if how == "waits for a signal" else how]()
                dist.all_reduce(torch.ones(4))
                step_took(0.01)
        dog.close(together=True)
    Path(f"{said}-{own}-finished").touch()


def pause_and_slow_work(folder: str, said: str) -> None:
    """Work that is slower than the limit of a step but shows beats, evaluations that are slow, and a pause of all."""
    import torch
    import torch.distributed as dist

    redirect_stderr(said)
    own = int(os.environ["RANK"])
    Path(f"{said}-process-{own}").write_text(str(os.getpid()))
    with watchdog.watching(Path(folder), 0.8) as dog:
        dog.tick = 0.1
        dog.attach()
        with phase(STEP):
            for _ in range(12):
                time.sleep(0.1)
                progress.beat()
            dist.all_reduce(torch.ones(4))
        with phase("evaluation"):
            time.sleep(1.5 if own else 0.0)
            dist.all_reduce(torch.ones(4))
        Path(f"{said}-ready-{own}").touch()
        with phase(STEP):
            time.sleep(0.4)  # the test pauses all ranks in here, for much longer than the limit
            dist.all_reduce(torch.ones(4))
        dog.close(together=True)
    Path(f"{said}-{own}-finished").touch()


def join(folder: str, rank: int, ranks: int, port: int, seconds: float) -> None:
    """Join a process group within so many seconds; write what is said where it does not come about."""
    from datetime import timedelta

    from safecl.distributed import collectives

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    with mock.patch.object(collectives, "START_TIMEOUT", timedelta(seconds=seconds)):
        try:
            collectives.init_distributed()
            said = f"joined {collectives.world_size()}"
        except collectives.RanksMissing as error:
            said = str(error)
    Path(folder, f"said-{rank}").write_text(said)


# ---------------------------------------------------------------------------------------------------------- whole runs


def at_step(how: str, step: int, run_folder: Path):
    """Replace the trainer's step: it hangs before a global step, when there is a checkpoint to resume from."""
    from safecl.training.run import Run

    train_step = Run.train_step

    def stepping(self, task):
        if self.global_step + 1 == step:
            deadline = time.monotonic() + 2.0  # shorter than the limit of a step
            while not (run_folder / "checkpoints" / "latest").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            HANGS[how]()
        return train_step(self, task)

    return mock.patch.object(Run, "train_step", stepping)


def in_phase(name: str, how: str):
    """Hang in a phase of the run."""
    from safecl.distributed import collectives
    from safecl.engine.checkpoint.writing import CheckpointWriter
    from safecl.training import trainer
    from safecl.training.guard import measuring

    places = {
        "collective start": (collectives, "init_distributed"),
        "load": (trainer, "open_run"),
        "evaluation": (measuring, "evaluate"),
        "save": (CheckpointWriter, "_write_files"),
        "export": (trainer, "save_models"),
        "preparation": (trainer, "make_memory"),
    }
    owner, function = places[name]
    return mock.patch.object(owner, function, lambda *arguments, **options: HANGS[how]())


def fit_and_hang(tree: dict, cache: str, said: str, rank: int, where: str, how: str, limit: float) -> None:
    """Fit on all ranks; one of them hangs in its fifth step, or in another phase, whose limit is short then."""
    redirect_stderr(said)
    own = int(os.environ["RANK"])
    Path(f"{said}-process-{own}").write_text(str(os.getpid()))
    with ExitStack() as stack:
        if where != STEP:
            stack.enter_context(mock.patch.dict(progress.SECONDS_WITHOUT_A_BEAT, {where: limit}))
        if own == rank:
            hang = at_step(how, 5, Path(tree["output"])) if where == STEP else in_phase(where, how)
            stack.enter_context(hang)
        stop_scenes.fit(tree, cache)
    Path(f"{said}-{own}-finished").touch()


def fit_slowly(tree: dict, cache: str, said: str) -> None:
    """Fit, with steps that are slow enough to be interrupted by a test."""
    from safecl.training.run import Run

    train_step = Run.train_step

    def slowly(self, task):
        Path(f"{said}-step-{self.global_step}-{os.environ['RANK']}").touch()
        time.sleep(0.5)
        return train_step(self, task)

    redirect_stderr(said)
    with mock.patch.object(Run, "train_step", slowly):
        stop_scenes.fit(tree, cache)
    Path(f"{said}-{os.environ['RANK']}-finished").touch()


def fit_with_a_clock_that_jumps(tree: dict, cache: str) -> dict:
    """Fit while every look at the wall clock gives another day."""
    import random

    chance, now = random.Random(int(os.environ["RANK"])), time.time
    with mock.patch.object(time, "time", lambda: now() + chance.uniform(-1e7, 1e7)):
        return stop_scenes.fit(tree, cache)
