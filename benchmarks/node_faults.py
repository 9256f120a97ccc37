"""Runs on two hosts of namespaces, and on a real Slurm of two nodes (sections `nodes` and `slurm` of faults.py)."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT = 30.0
"""Seconds in which the ranks of the other host have ended, once a loss is noticed (docs/reliability.md)."""
HANG_TIMEOUT = 10
RESTARTS = 20
STEPS_OF_THE_JOB = 60


def nodes() -> dict:
    """Run the scenes on two hosts that are not done yet; return what was measured, and what was wrong.

    A scene that does not get through is told and left out, so the next call tries it again.
    """
    from faults import read_results, scratch, write_section

    from safecl.demo.materials import write_materials
    from tests.launching.hosts import reason_against

    if (reason := reason_against()) is not None:
        return {"skipped": reason, "wrong": []}
    found, missing = read_results().get("nodes", {}).get("found", {}), []
    for scene in (_restarts, _slow, _bitwise, _elastic, _losses, _ssh, _skew, _start):
        name = scene.__name__.strip("_")
        if name in found:
            continue
        try:
            with scratch(in_memory=False) as folder:
                write_materials(folder / "demo")
                result, wrong = scene(folder, folder / name)
        except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
            print(f"  {name}: not through: {error}", flush=True)
            missing.append(f"{name}: not through")
            continue
        print(f"  {name}: {result}, {len(wrong)} wrong {wrong}", flush=True)
        found[name] = result | {"wrong": wrong, "load_average": round(os.getloadavg()[0], 1)}
        write_section("nodes", _summary(found))
    summary = _summary(found)
    return summary | {"wrong": summary["wrong"] + missing}


def _summary(found: dict) -> dict:
    return {"found": found, "wrong": [f"{name}: {problem}" for name, one in found.items() for problem in one["wrong"]]}


# --------------------------------------------------------------------------------------------------------------- scenes


def _bitwise(folder: Path, here: Path) -> tuple[dict, list[str]]:
    """Four ranks on two hosts leave what they leave on one, under both launchers."""
    from tests.launching.node_scenes import Job, left, on_one_host, two_hosts, write_config

    wrong, runs = [], []
    for stage in (2, 3):
        config = write_config(folder / "demo", here / f"stage-{stage}" / "run.yaml", deepspeed={"stage": stage})
        expected = on_one_host(config, 4, here / f"one-{stage}", folder / "cache")
        for via in ("torchrun", "deepspeed"):
            with two_hosts([folder]) as machines:
                job = Job(config, machines, ranks=2, options=("--via", via))
                shutil.rmtree(job.folder, ignore_errors=True)
                job.start()
                codes = job.wait()
                wrong += [] if codes == [0, 0] else [f"{via}, stage {stage}: exit codes {codes}"]
                wrong += [f"{via}: process {pid} is left" for pid in job.orphans()]
            if not wrong and left(job.folder) != expected:
                wrong.append(f"{via}, stage {stage}: not bitwise what one host leaves")
            runs.append(f"{via}, stage {stage}")
    return {"equal": runs}, wrong


def _ssh(folder: Path, here: Path) -> tuple[dict, list[str]]:
    """One command on the first host starts both, by pdsh and ssh; the result is that of one host."""
    from tests.launching.node_scenes import left, on_one_host, run_by_ssh, two_hosts, why_no_ssh, write_config

    if (reason := why_no_ssh()) is not None:
        return {"skipped": reason}, []
    config = write_config(folder / "demo", here / "run.yaml")
    expected = on_one_host(config, 2, here / "one", folder / "cache")
    with two_hosts([folder]) as machines:
        code, _ = run_by_ssh(machines, config, folder / "keys")
    wrong = [] if code == 0 else [f"exit code {code}"]
    wrong += [] if wrong or left(here / "run") == expected else ["not bitwise what one host leaves"]
    return {"ranks": 2}, wrong


def _losses(folder: Path, here: Path) -> tuple[dict, list[str]]:
    """A host is killed, loses its power, is cut off: the other one ends in time, and one host finishes the run."""
    from tests.launching.node_scenes import PATIENCE, Job, left, lose_a_host, two_hosts, write_config

    found, wrong = {}, []
    train = {"max_steps": 30, "hang_timeout": HANG_TIMEOUT}
    config = write_config(folder / "demo", here / "run.yaml", train=train, checkpoint={"every": 3})
    rows = None
    for how in ("killed", "power", "cable"):
        with two_hosts([folder]) as machines:
            job = Job(config, machines, ranks=2)
            shutil.rmtree(job.folder, ignore_errors=True)
            job.start()
            seconds, problems = lose_a_host(job, 4, how, limit=HANG_TIMEOUT + 2 * LIMIT)
            found[how], wrong = round(seconds, 1), wrong + problems
            allowed = LIMIT + (0 if how == "killed" else HANG_TIMEOUT)
            wrong += [f"{how}: {seconds:.0f} s, more than {allowed:.0f}"] if seconds > allowed else []
            machines[1].kill()
            job.start_one(0, "1")  # the same command, with the node that is there
            code = machines[0].processes[-1].wait(PATIENCE)
            wrong += [] if code == 0 else [f"{how}: the node that is there ends with {code}"]
        tokens = [line["tokens"] for line in left(job.folder)["metrics"]]
        wrong += [f"{how}: other rows"] if rows is not None and tokens != rows else []
        rows = tokens
    return {"seconds_until_the_other_host_has_ended": found, "hang_timeout": HANG_TIMEOUT}, wrong


def _elastic(folder: Path, here: Path) -> tuple[dict, list[str]]:
    """`--nodes 1:2 --max-restarts`: a host loses its power, the other goes on alone; it comes back and joins."""
    from tests.launching.node_scenes import Job, two_hosts, write_config

    config = write_config(
        folder / "demo",
        here / "run.yaml",
        train={"max_steps": 400, "hang_timeout": HANG_TIMEOUT},
        launch={"last_call": 5},
        checkpoint={"every": 5},
    )
    wrong: list[str] = []
    with two_hosts([folder]) as machines:
        job = Job(config, machines, options=("--max-restarts", "3"))
        job.start(nodes="1:2")
        job.reach(10)
        machines[1].lose_power()
        began, lost_at = time.monotonic(), job.steps()
        job.reach(lost_at + 10)
        alone = time.monotonic() - began
        machines[1].plug_in()
        job.start_one(1, "1:2")
        codes = job.wait()
        wrong += [] if codes == [0, 0] else [f"exit codes {codes}"]
        wrong += [f"process {pid} is left" for pid in job.orphans()]
    worlds = re.findall(r"weights on (\d) ranks?", job.said())
    wrong += [] if worlds == ["2", "1", "2"] else [f"ranks of the attempts: {worlds}"]
    return {"seconds_until_ten_more_steps_alone": round(alone, 1), "ranks_of_the_attempts": worlds}, wrong


def _restarts(folder: Path, here: Path) -> tuple[dict, list[str]]:
    """Kill a host twenty times; the last restart finishes the run bitwise as if nothing had happened.

    A call that is stopped goes on behind its last kill: what it has done is kept in .faults/restarts, which git
    ignores, until it is through.
    """
    from tests.launching.node_scenes import Job, left, on_one_host, two_hosts, write_config

    here, steps, wrong = ROOT / ".faults" / "restarts", 2 * RESTARTS + 6, []
    if not (here / "demo").exists():
        shutil.copytree(folder / "demo", here / "demo")
    train = {"max_steps": steps, "hang_timeout": HANG_TIMEOUT}
    config, one, done = write_config(here / "demo", here / "run.yaml", train=train), here / "one", here / "kills"
    expected = left(one) if (one / "results.json").exists() else on_one_host(config, 2, one, here / "cache")
    with two_hosts([here]) as machines:
        job = Job(config, machines)
        for number in range(int(done.read_text()) if done.exists() else 0, RESTARTS):
            job.start()
            job.reach(2 * number + 3)
            machines[random.Random(number).randrange(2)].kill()
            for machine in machines:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    machine.processes[-1].wait(60)
                machine.kill()
            done.write_text(str(number + 1))
            print(f"    restart {number + 1}: killed after step {job.steps()}", flush=True)
        job.start()
        codes = job.wait()
        wrong += [] if codes == [0, 0] else [f"exit codes {codes} at the end"]
    wrong += [] if left(job.folder) == expected else ["not bitwise what an undisturbed run leaves"]
    shutil.rmtree(here)
    return {"kills": RESTARTS, "steps": steps}, wrong


def _skew(folder: Path, here: Path) -> tuple[dict, list[str]]:
    """The clock of a host is 90 s ahead: both values are told, and the run is what it is without."""
    from tests.launching.node_scenes import Job, two_hosts, write_config

    config = write_config(folder / "demo", here / "run.yaml")
    (here / "ahead").mkdir()
    (here / "ahead" / "sitecustomize.py").write_text("import time\nreal = time.time\ntime.time = lambda: real() + 90\n")
    with two_hosts([folder]) as machines:
        job = Job(config, machines)
        job.start_one(0, "2")
        job.start_one(1, "2", environ={"PYTHONPATH": f"{here / 'ahead'}:{os.environ.get('PYTHONPATH', '')}"})
        codes = job.wait()
    told = re.search(r"the clocks of the nodes are (\d+) s apart", job.said())
    wrong = [] if codes == [0, 0] else [f"exit codes {codes}"]
    wrong += [] if told is not None and told[1] == "90" else ["the skew is not told"]
    return {"told": told[0] if told is not None else None}, wrong


def _slow(folder: Path, here: Path) -> tuple[dict, list[str]]:
    """A link that takes 20 ms: the preflight shows it, and the result is the same bit for bit."""
    from tests.launching.node_scenes import PORT, Job, left, on_one_host, two_hosts, write_config
    from tests.launching.slow_link import slow_link

    config = write_config(folder / "demo", here / "run.yaml")
    expected = on_one_host(config, 2, here / "one", folder / "cache")
    with two_hosts([folder]) as machines:
        ends = [(machine.namespace, f"10.78.0.{index}") for index, machine in enumerate(machines, start=1)]
        with slow_link(20.0, *ends):
            arguments = ["launch", config, "--nodes", "2", "--gpus-per-node", "1", "--rendezvous", f"10.78.0.1:{PORT}"]
            job = Job(config, machines)
            for machine in machines:
                job.logs.append(here / f"{machine.name}.log")
                machine.safecl(*arguments, log=job.logs[-1])
            codes = job.wait()
    if codes != [0, 0]:
        return {}, [f"exit codes {codes}: {job.said()[-1000:]}"]
    wrong = []
    told = re.search(r"all-reduce of [\d.]+ MB in ([\d.]+) s", job.said())
    wrong += [] if "on slow0" in job.said() and told is not None else ["the link is not told"]
    wrong += [] if left(job.folder) == expected else ["not bitwise what one host leaves"]
    return {"milliseconds": 20, "all_reduce_seconds": float(told[1]) if told is not None else None}, wrong


def _start(folder: Path, here: Path) -> tuple[dict, list[str]]:
    """Seconds from the command to the first step, and of the preflight. The processor time of the whole job, of six
    steps, tells what a busy machine adds."""
    from tests.launching.node_scenes import Job, two_hosts, write_config

    config = write_config(folder / "demo", here / "run.yaml")
    with two_hosts([folder]) as machines:
        job = Job(config, machines)
        began, used = time.monotonic(), _processor_seconds()
        job.start()
        job.reach(1)
        seconds = time.monotonic() - began
        job.wait()
        used = _processor_seconds() - used
    checked = float(re.findall(r"checked in ([\d.]+) s", job.said())[0])
    wrong = [f"{seconds:.0f} s to the first step, more than 25"] if seconds > 25 else []
    wrong += [f"preflight took {checked:.1f} s, more than 10"] if checked > 10 else []
    times = {"seconds_to_the_first_step": round(seconds, 1), "seconds_of_preflight": checked}
    return times | {"processor_seconds": round(used, 1), "cores": os.cpu_count()}, wrong


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ---------------------------------------------------------------------------------------------------------------- Slurm


def slurm() -> dict:
    """Submit a job to a real Slurm, stop it by a signal, and see it queued again and finished."""
    from faults import scratch

    programs = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "squeue")
    missing = [name for name in programs if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        return {
            "skipped": f"needs root and {', '.join(programs)}; missing: {', '.join(missing) or 'root'}",
            "wrong": [],
        }
    with scratch(in_memory=False) as folder, _cluster(folder):
        return _preempted_job(folder)


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
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port=17001 CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port=17002 CPUs=1
PartitionName=p Nodes=n1,n2 Default=YES State=UP
"""


@contextlib.contextmanager
def _cluster(folder: Path) -> Iterator[None]:
    """A controller and two nodes on this machine."""
    import socket

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


def _preempted_job(folder: Path) -> dict:
    from safecl.demo.materials import write_materials
    from tests.launching.hosts import ROOT, wait_for
    from tests.launching.node_scenes import write_config

    write_materials(folder / "demo")
    port = 29488
    launch = {
        "via": "slurm",
        "nodes": 2,
        "gpus_per_node": 1,
        "rendezvous": f"127.0.0.1:{port}",
        "slurm": {"gpus": False, "setup": [f"export PYTHONPATH={ROOT}"]},
    }
    settings = {"train": {"max_steps": STEPS_OF_THE_JOB}, "checkpoint": {"every": 20}, "launch": launch}
    config = write_config(folder / "demo", folder / "run.yaml", **settings)
    run = folder / "run"
    submitted = subprocess.run(["safecl", "launch", str(config)], capture_output=True, text=True, check=True).stdout
    job = submitted.split()[-1]

    def steps() -> int:
        metrics = run / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def queue() -> str:
        return subprocess.run(["squeue", "-h", "-o", "%i"], capture_output=True, text=True, check=False).stdout

    wait_for(lambda: steps() >= 5, 180, "the job trains")
    stopped_at = steps()
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    wait_for(lambda: (run / "exit_code").exists(), 120, "the job stops")
    code = (run / "exit_code").read_text().strip()
    wait_for(lambda: (run / "results.json").exists(), 900, "the job is queued again and finishes")
    wait_for(lambda: job not in queue().split(), 60, "the job has left the queue")
    log = (run / "logs" / f"slurm-{job}.out").read_text()
    wrong = [] if code == "75" else [f"exit code {code} after the signal"]
    wrong += [] if "resuming from step-" in log else ["the job began anew"]
    wrong += [] if steps() == STEPS_OF_THE_JOB else [f"{steps()} steps"]
    return {"stopped_after_step": stopped_at, "steps": steps(), "wrong": wrong}
