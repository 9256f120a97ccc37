"""Runs whose folder is removed, moved, replaced or slow while they train, on the ranks of the pool."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from unittest import mock

from safecl.distributed import collectives
from tests.distributed import stop_scenes
from tests.distributed.test_watchdog import wait_for


def fit(tree: dict, cache: str, how: str, step: int | None) -> str:
    """Fit, and lose the folder before a global step, or before the export where step is None. Return the message."""
    from safecl.training import trainer
    from safecl.training.run import Run

    train_step, save_models, folder = Run.train_step, trainer.save_models, Path(tree["output"])

    def lose() -> None:
        if collectives.rank() == 0:
            wait_for(folder / "checkpoints" / "latest")
            if how == "removed":
                shutil.rmtree(folder)
            else:
                folder.rename(folder.with_name("moved"))
            if how == "replaced":
                folder.mkdir()

    def stepping(self, task):
        if self.global_step == step:
            lose()
        return train_step(self, task)

    def saving(*arguments, **options):
        if step is None:
            lose()
        return save_models(*arguments, **options)

    with mock.patch.object(Run, "train_step", stepping), mock.patch.object(trainer, "save_models", saving):
        try:
            stop_scenes.fit(tree, cache)
        except trainer.TrainingFailed as failed:
            return str(failed)
    return ""


def fit_on_a_slow_disk(tree: dict, cache: str, seconds: float) -> dict:
    """Fit while each file takes some seconds to reach the disk."""
    sync = os.fsync

    def slowly(handle: int) -> None:
        time.sleep(seconds)
        sync(handle)

    with mock.patch.object(os, "fsync", slowly):
        return stop_scenes.fit(tree, cache)
