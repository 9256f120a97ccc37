"""From a config and options to the command that starts the ranks. Imports no torch."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from safecl.config import ConfigError, LaunchConfig, RunConfig
from safecl.config.errors import explain
from safecl.launching import deepspeed, kubernetes, slurm, torchrun
from safecl.launching.job import Job, Launch


def with_options(config: RunConfig, options: dict[str, Any]) -> RunConfig:
    """Return the config with the options of the command line in its section `launch`. Raises ConfigError."""
    given = {key: value for key, value in options.items() if value is not None}
    try:
        settings = LaunchConfig.model_validate(config.launch.model_dump() | given)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, LaunchConfig, ("launch",)))) from None
    return config.model_copy(update={"launch": settings})


def plan_launch(job: Job, node_rank: int | None = None) -> Launch:
    """Return what starts the job. Raises ConfigError for what would not start."""
    if job.sweep and job.settings.via != "slurm":
        raise ConfigError(f"--sweep: is for --via slurm, whose array runs them; this is {job.settings.via}")
    if job.settings.via == "slurm":
        return slurm.plan(job)
    if job.settings.via == "kubernetes":
        return kubernetes.plan(job)
    if job.settings.via == "deepspeed":
        return deepspeed.plan(job, agent_folder(), node_rank)
    return torchrun.plan(job, agent_folder())


def agent_folder() -> Path:
    """The folder of this agent and its ranks on this machine."""
    return Path(tempfile.gettempdir()) / f"safecl-launch-{os.getpid()}"
