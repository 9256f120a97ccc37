"""`safecl train CONFIG` as one rank of torchrun, whose steps are slow and whose rank 1 may fail or hang in one.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.faults.ending_run CONFIG FOLDER [raises | hangs]

Each rank leaves a file `ready-RANK` in FOLDER when it comes to that step.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from unittest import mock

STEP = 3


def main() -> None:
    config, folder, *how = sys.argv[1:]
    from safecl.cli import main as command
    from safecl.training.run import Run

    train_step, rank = Run.train_step, os.environ["RANK"]

    def stepping(self, task):
        if self.global_step == STEP:
            Path(folder, f"ready-{rank}").touch()
            if how == ["raises"] and rank == "1":
                raise RuntimeError("a fault of the test")
            if how == ["hangs"] and rank == "1":
                time.sleep(1000)
        time.sleep(0.1)
        return train_step(self, task)

    sys.argv = ["safecl", "train", config]
    with mock.patch.object(Run, "train_step", stepping):
        command()


if __name__ == "__main__":
    main()
