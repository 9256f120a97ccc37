"""Jobs on a real Slurm of two nodes on this machine (section `slurm` of sections.py)."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ROOT
from tests.launching.hosts import wait_for
from tests.launching.node_scenes import write_config

STEPS = 80
PATIENCE = 600.0
PORT = 29488
QUEUED_AGAIN = "the job is queued again and goes on"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "squeue")

CONFIGURATION = """\
ClusterName=safecl
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=17000
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmUser=root
SlurmdUser=root
ReturnToService=2
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=3600
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port=17001 CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port=17002 CPUs=1
PartitionName=p Nodes=n1,n2 Default=YES State=UP PriorityTier=1 GraceTime=300
PartitionName=urgent Nodes=n1,n2 State=UP PriorityTier=2
"""


def slurm() -> dict:
    """Submit jobs to a real Slurm: one is stopped in three ways, queued again and finishes; two end with 2 and 3."""
    from benchmarks.faults.sections import scratch
    from safecl.demo.materials import write_materials

    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        return {
            "skipped": f"needs root and {', '.join(PROGRAMS)}; missing: {', '.join(missing) or 'root'}",
            "wrong": [],
        }
    with scratch(in_memory=False) as folder, _cluster(folder):
        write_materials(folder / "demo")
        found, wrong = _stopped_job(folder)
        codes, others = _codes_that_arrive(folder)
        return found | {"exit_codes_of_jobs": codes, "wrong": wrong + others}


# ---------------------------------------------------------------------------------------------------------- the cluster


@contextlib.contextmanager
def _cluster(folder: Path) -> Iterator[None]:
    """A controller and two nodes on this machine."""
    made = folder / "slurm"
    for name in ("state", "spool.n1", "spool.n2"):
        (made / name).mkdir(parents=True)
    (made / "slurm.conf").write_text(CONFIGURATION.format(host=socket.gethostname(), folder=made))
    os.environ["SLURM_CONF"] = str(made / "slurm.conf")
    munge = made / "munged.pid"
    subprocess.run(["install", "-d", "-o", "munge", "/run/munge", "/var/log/munge", "/var/lib/munge"], check=True)
    own = not Path("/run/munge/munge.socket.2").exists()
    if own:
        start = f"munged --force --pid-file=/run/munge/{munge.name}"
        subprocess.run(["su", "-s", "/bin/sh", "munge", "-c", start], check=True)
    subprocess.run(["slurmctld", "-c"], check=True)
    for name in ("n1", "n2"):
        subprocess.run(["slurmd", "-N", name], check=True)
    time.sleep(4)
    try:
        yield
    finally:
        subprocess.run(["scancel", "--user=root"], check=False)
        time.sleep(5)
        pids = [*made.glob("*.pid"), *([Path("/run/munge") / munge.name] if own else [])]
        for path in pids:
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(path.read_text()), signal.SIGTERM)
        time.sleep(2)


@dataclass(frozen=True)
class SlurmJob:
    """A job that `safecl launch` has submitted. number: of Slurm. run: the run folder."""

    number: str
    run: Path

    @classmethod
    def submit(cls, config: Path) -> SlurmJob:
        command = [sys.executable, "-m", "safecl", "launch", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        return cls(done.stdout.split()[-1], config.parent / "run")

    def steps(self) -> int:
        metrics = self.run / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def log(self) -> str:
        path = self.run / "logs" / f"slurm-{self.number}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def shown(self, field: str) -> str:
        """A field of the job as Slurm shows it."""
        text = subprocess.run(["scontrol", "-o", "show", "job", self.number], capture_output=True, text=True).stdout
        found = re.search(rf"\b{field}=(\S+)", text)
        return found[1] if found is not None else ""

    def has_ended(self) -> bool:
        return self.shown("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "PREEMPTED", "TIMEOUT")


def _config(folder: Path, name: str, setup: tuple[str, ...] = (), **sections: object) -> Path:
    launch = {
        "via": "slurm",
        "nodes": 2,
        "gpus_per_node": 1,
        "rendezvous": f"127.0.0.1:{PORT}",
        "slurm": {"gpus": False, "setup": [f"export PYTHONPATH={ROOT}", *setup]},
    }
    return write_config(folder / "demo", folder / name / "run.yaml", launch=launch, **sections)


# --------------------------------------------------------------------------------------------------------------- scenes


def _stop_the_steps(job: SlurmJob) -> None:
    """SIGTERM to what srun has started, on all nodes."""
    subprocess.run(["scancel", "--signal=TERM", job.number], check=True)


def _warn_the_script(job: SlurmJob) -> None:
    """SIGUSR1 to the batch script, as before the end of the job's time (--signal=B:USR1)."""
    subprocess.run(["scancel", "--batch", "--signal=USR1", job.number], check=True)


def _preempt(job: SlurmJob) -> None:
    """A job of a partition that goes first takes both nodes; Slurm sends SIGTERM and waits for GraceTime."""
    urgent = ["sbatch", "--partition=urgent", "--nodes=2", "--ntasks-per-node=1", "--output=/dev/null"]
    subprocess.run([*urgent, "--wrap=sleep 3"], check=True, capture_output=True)


STOPS = {"SIGTERM to the steps": _stop_the_steps, "SIGUSR1 to the script": _warn_the_script, "preemption": _preempt}


def _stopped_job(folder: Path) -> tuple[dict, list[str]]:
    """Stop one job in every way; each time it saves, is queued again, and goes on."""
    job = SlurmJob.submit(_config(folder, "stopped", train={"max_steps": STEPS}, checkpoint={"every": 20}))
    stopped_at, wrong = {}, []
    for number, (how, stop) in enumerate(STOPS.items(), start=1):
        begun = max(5, job.steps() + 5)
        wait_for(lambda begun=begun: job.steps() >= begun, PATIENCE, f"the job trains before {how}")
        stop(job)
        wait_for(lambda number=number: job.log().count(QUEUED_AGAIN) == number, PATIENCE, f"{how} stops the job")
        stopped_at[how] = job.steps()
        wrong += [] if (job.run / "exit_code").read_text().strip() == "75" else [f"{how}: not ended with 75"]
    wait_for(job.has_ended, PATIENCE, "the job finishes")
    wrong += [] if job.shown("ExitCode") == "0:0" else [f"exit code {job.shown('ExitCode')} at the end"]
    resumed = job.log().count("resuming from step-")
    wrong += [] if resumed == len(STOPS) else [f"resumed {resumed} times"]
    wrong += [] if job.steps() == STEPS else [f"{job.steps()} steps"]
    return {"stopped_after_step": stopped_at, "steps": job.steps(), "restarts": int(job.shown("Restarts"))}, wrong


def _codes_that_arrive(folder: Path) -> tuple[dict, list[str]]:
    """A wrong config and a failed gate: Slurm shows the codes that safecl ends with, and queues no job again."""
    prompts = {"prompts": str(folder / "demo" / "data" / "safety-prompts.jsonl"), "max_new_tokens": 8}
    gone = folder / "gone.jsonl"
    shutil.copy(folder / "demo" / "data" / "memory.jsonl", gone)
    configs = {
        2: _config(folder, "wrong", setup=(f"rm -f {gone}",), memory={"source": str(gone)}),
        3: _config(folder, "gate", safety={**prompts, "every": "task", "gate": {"max_asr": 0.05}}),
    }
    found, wrong = {}, []
    for code, config in configs.items():
        job = SlurmJob.submit(config)
        wait_for(job.has_ended, PATIENCE, f"the job ends with {code}")
        found[str(code)] = shown = job.shown("ExitCode")
        wrong += [] if shown == f"{code}:0" else [f"{shown} instead of {code}: {job.log()[-1000:]}"]
        wrong += [] if job.shown("Restarts") == "0" else [f"a job that ended with {code} was queued again"]
    return found, wrong
