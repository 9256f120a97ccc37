"""Compares what all ranks see, before the model is loaded, and writes who they are."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

from safecl.config import RunConfig
from safecl.distributed import collectives
from safecl.launching.preflight import check_ranks
from safecl.launching.status import write_ranks
from safecl.launching.stragglers import Pace
from safecl.planning.plans import RunPlan
from safecl.storage.model_records import model_files
from safecl.training.folder import LOCK
from safecl.training.identity import identity_of


def compare_ranks(plan: RunPlan, folder: Path, note: Callable[[str], None]) -> tuple[RunConfig, Pace | None]:
    """Return the config that all ranks use from now on, and what follows their pace; None for a single rank. A
    collective call.

    folder: the run folder. Raises ConfigError where ranks differ in what they train.
    """
    hosts = collectives.gather_objects([socket.gethostname()])
    if collectives.rank() == 0:
        write_ranks(folder, hosts, {task.config.name: task.num_steps for task in plan.tasks})
    if len(hosts) == 1:
        return plan.config, None
    identity = identity_of(plan)
    rows = {f"task {name}": rows for name, rows in identity["rows"].items()}
    plan.config = check_ranks(
        plan.config,
        rows | {"memory.source": str(identity["memory_rows"])},
        model_files(plan.config.model.path),
        identity["versions"],
        note,
        LOCK,
    )
    return plan.config, Pace(hosts, folder, note)
