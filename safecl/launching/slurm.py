"""Slurm: a batch script in which srun starts `safecl launch` on every node, which starts torchrun. Imports no torch.

A job that is preempted or at the end of its time gets a signal, saves, ends with 75 and is put into the queue again.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from safecl.config import ConfigError
from safecl.launching.job import FILES, LOGS, Command, Job, Launch, python
from safecl.launching.variables import variables_of

SECONDS_FOR_THE_OTHERS = 120
"""srun ends the other nodes this long after the first one has ended."""
SECONDS_TO_SAVE = 300
"""Slurm warns the job this long before its time is over, where launch.stop_timeout is longer."""


def plan(job: Job) -> Launch:
    """Return the submission of the batch script. Raises ConfigError."""
    path = job.folder / FILES / "job.sbatch"
    ranks, nodes = job.ranks_per_node(), job.settings.node_range[1]
    runs = f", {len(job.sweep)} runs" if job.sweep else ""
    variables = variables_of(job.settings, {})
    facts = [("ranks", f"{nodes} node{'s' * (nodes > 1)} x {ranks}{runs}, by Slurm"), ("script", str(path))]
    # sbatch runs a copy of the script and does not make the folder of its output.
    written = {path: script_of(job, ranks, python()), job.logs / ".slurm": ""}
    return Launch([*facts, *variables.facts()], Command(("sbatch", str(path))), written)


def script_of(job: Job, ranks: int, interpreter: str) -> str:
    """Return the batch script. ranks: on each node. interpreter: the Python that has safecl, outside of a container."""
    head = "\n".join(f"#SBATCH {option}" for option in _options(job, ranks))
    settings = [*_exports(job.settings.environment), *job.settings.slurm.setup]
    srun = " ".join(_srun(job))
    nodes = job.settings.node_range[1]
    own = ["launch", str(job.config), "--via", "torchrun", "--nodes", str(nodes), "--gpus-per-node", str(ranks)]
    own += ["--max-restarts", "0"]
    program = shlex.join([*_in_container(job), interpreter if job.settings.slurm.container is None else "python3"])
    return _SCRIPT.format(
        head=head,
        settings="".join(f"{line}\n" for line in settings),
        run=_chosen_run(job),
        folder=shlex.quote(str(job.folder)) if not job.sweep else '"$output"',
        first=_first_node(job),
        srun=srun,
        program=f"{program} -m safecl {shlex.join(own)}",
        arguments=" ".join([shlex.join(["--", *job.overrides, *job.options]), *(['"${run[@]}"'] if job.sweep else [])]),
    )


# The batch shell gets the signal first. srun passes it on to every node: the agents there wait for their ranks, which
# finish the step and save. A job is queued again only where it was stopped: by a signal that came to this script, or
# to the ranks themselves, which then leave 75 in the run folder. A job that a user has cancelled is not running.
_SCRIPT = """\
#!/bin/bash
{head}
{settings}{run}folder={folder}
{first}
rm -f "$folder/exit_code"
stopped=
pass_on() {{ stopped=1; kill -USR1 "$step" 2>/dev/null; }}
trap pass_on USR1 TERM
{srun} {program} --rendezvous "$first" {arguments} &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"
code=$?
if [ "$code" -eq 75 ] && {{ [ -n "$stopped" ] || [ "$(cat "$folder/exit_code" 2>/dev/null)" = 75 ]; }}; then
  if scontrol --oneliner show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
    echo "safecl: stopped by a signal and saved; the job is queued again and goes on"
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
"""


def _options(job: Job, ranks: int) -> list[str]:
    slurm, nodes = job.settings.slurm, job.settings.node_range[1]
    log = "slurm-%A_%a.out" if job.sweep else "slurm-%j.out"
    options = [
        f"--job-name={job.name}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        "--requeue",
        "--open-mode=append",
        f"--output={job.folder.absolute() / LOGS / log}",
        f"--signal=B:USR1@{min(job.settings.stop_timeout, SECONDS_TO_SAVE)}",
    ]
    given = {
        "--partition": slurm.partition,
        "--account": slurm.account,
        "--qos": slurm.qos,
        "--time": slurm.time,
        "--cpus-per-task": slurm.cpus_per_task,
        "--gpus-per-node": ranks if slurm.gpus else None,
        "--array": f"0-{len(job.sweep) - 1}" if job.sweep else None,
    }
    return [*options, *(f"{name}={value}" for name, value in given.items() if value is not None), *slurm.extra]


def _srun(job: Job) -> list[str]:
    slurm = job.settings.slurm
    words = ["srun", f"--wait={SECONDS_FOR_THE_OTHERS}"]
    if slurm.container is not None and slurm.container_runtime == "pyxis":
        words.append(f"--container-image={shlex.quote(slurm.container)}")
        if slurm.container_mounts:
            words.append(f"--container-mounts={shlex.quote(','.join(slurm.container_mounts))}")
    return words


def _in_container(job: Job) -> list[str]:
    slurm = job.settings.slurm
    if slurm.container is None or slurm.container_runtime == "pyxis":
        return []
    binds = [f"--bind={','.join(slurm.container_mounts)}"] if slurm.container_mounts else []
    return ["apptainer", "exec", "--nv", *binds, slurm.container]


def _first_node(job: Job) -> str:
    if job.settings.rendezvous is not None:
        return f"first={shlex.quote(job.settings.rendezvous)}"
    return f'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):{job.settings.port}'


def _exports(environment: Mapping[str, str]) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]


# ---------------------------------------------------------------------------------------------------------------- sweep


def sweep_of(wanted: list[str], folder: Path) -> tuple[tuple[str, ...], ...]:
    """Return the overrides of every run of a sweep, its own run folder among them.

    wanted: `key=value,value` texts; all combinations are run. Raises ConfigError.
    """
    choices = []
    for text in wanted:
        key, _, values = text.partition("=")
        if not key or not values:
            raise ConfigError(f"--sweep {text}: give a key and its values, as train.learning_rate=1e-5,2e-5")
        choices.append([f"{key}={value}" for value in values.split(",")])
    return tuple((*run, f"output={folder / _label(run)}") for run in itertools.product(*choices)) if choices else ()


def _label(run: tuple[str, ...]) -> str:
    return "_".join(re.sub(r"[^\w.=-]+", "-", override.rpartition(".")[2] or override) for override in run)


def _chosen_run(job: Job) -> str:
    if not job.sweep:
        return ""
    lines = "\n".join(f"  {index}) run=({shlex.join(run)});;" for index, run in enumerate(job.sweep))
    return f"case $SLURM_ARRAY_TASK_ID in\n{lines}\nesac\noutput=${{run[-1]#output=}}"
