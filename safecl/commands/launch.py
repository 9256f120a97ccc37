"""`safecl launch CFG`: prints the command that starts the ranks of a run, and runs it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

from safecl.commands.preflight import preflight
from safecl.config import ConfigError, RunConfig
from safecl.exits import ExitCode
from safecl.launching.agent import Agent
from safecl.launching.job import Job, Launch
from safecl.launching.plan import agent_folder, plan_launch
from safecl.launching.pulse import FOLDER
from safecl.launching.slurm import sweep_of
from safecl.storage.durable import replace_file
from safecl.terminal import Terminal, fact
from safecl.training.folder import EXIT_CODE, RunFolder


def launch_run(
    path: Path, arguments: list[str], config: RunConfig, *, dry_run: bool, node_rank: int | None, sweep: list[str]
) -> int:
    """Print the launch; without `dry_run` run it and return its exit code. Raises ConfigError.

    arguments: overrides, and options of `safecl train`. sweep: `key=value,value` texts.
    """
    job = Job.of(path, arguments, config)
    job = replace(job, sweep=sweep_of(sweep, job.folder))
    if job.settings.via != "kubernetes":
        preflight(config)  # a job on Kubernetes reads files of its claim, which are not here
    launch = plan_launch(job, node_rank)
    if launch.agent and not dry_run:
        _refuse_a_second_launch(job)
    _print(launch, job, with_files=dry_run)
    if dry_run:
        return ExitCode.DONE
    for file, text in launch.files.items():
        _write(file, text)
    if not launch.agent:
        return _submit(launch)
    settings = job.settings
    agent = Agent(
        launch.command,
        agent_folder(),
        job.folder / EXIT_CODE,
        settings.max_restarts,
        settings.start_timeout,
        settings.stop_timeout,
        launch.first_node,
        job.logs / FOLDER if launch.several else None,
        launch.ranks,
        say=lambda line: print(line, flush=True),
    )
    try:
        return agent.run()
    finally:
        shutil.rmtree(agent.files, ignore_errors=True)


def _refuse_a_second_launch(job: Job) -> None:
    """Raise ConfigError where a run is under way in the run folder, and this is no node that comes back to it."""
    smallest, largest = job.settings.node_range
    if smallest == largest:
        RunFolder(job.folder).refuse_where_in_use(host=socket.gethostname() if largest > 1 else None)


def _print(launch: Launch, job: Job, *, with_files: bool) -> None:
    console = Terminal()
    for label, text in [("run", f"{job.folder}, from {job.config}"), *launch.facts]:
        console.print(fact(label, text, 16))
    for path, text in launch.files.items() if with_files else ():
        if text:
            console.print(f"\n{path}", style="bold")
            console.print(text)
    console.print("command", style="bold")
    console.print(launch.command.line())
    console.file.flush()


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text)
    except OSError as error:
        raise ConfigError(f"output: {path} cannot be written: {error.strerror}") from None


def _submit(launch: Launch) -> int:
    program = launch.command.argv[0]
    if shutil.which(program) is None:
        raise ConfigError(
            f"launch.via: {program} is not installed here; run this where it is, or with --dry-run to see what it "
            "would be given"
        )
    with contextlib.suppress(KeyboardInterrupt):
        done = subprocess.run(launch.command.argv, env={**os.environ, **launch.command.environment}, check=False)
        return ExitCode.DONE if done.returncode == 0 else ExitCode.FAILED
    return ExitCode.STOPPED
