"""Runs on two hosts of namespaces (section `nodes` of sections.py)."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ROOT

LIMIT = 30.0
"""Seconds in which the ranks of the other host have ended, once a loss is noticed (docs/reliability.md)."""
HANG_TIMEOUT = 10
RESTARTS = 20


def nodes(scenes: Sequence[str] = ()) -> dict:
    """Run the scenes that are named; without names, those that are not done yet. Return what was measured, and what
    was wrong.

    A scene that does not get through is told and left out, so the next call tries it again.
    """
    from benchmarks.faults.sections import read_results, scratch, write_section
    from safecl.demo.materials import write_materials
    from tests.launching.hosts import reason_against

    if (reason := reason_against()) is not None:
        return {"skipped": reason, "wrong": []}
    if unknown := [name for name in scenes if name not in SCENES]:
        sys.exit(f"no scene {unknown[0]!r}; there are {', '.join(SCENES)}")
    found, missing = read_results().get("nodes", {}).get("found", {}), []
    for name in scenes or [name for name in SCENES if name not in found]:
        began = time.monotonic()
        try:
            with scratch(in_memory=False) as folder:
                write_materials(folder / "demo")
                result, wrong = SCENES[name](folder, folder / name)
        except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
            print(f"  {name}: not through: {error}", flush=True)
            missing.append(f"{name}: not through")
            continue
        print(f"  {name}: {result}, {len(wrong)} wrong {wrong}", flush=True)
        own = {"wrong": wrong, "seconds": round(time.monotonic() - began)}
        found[name] = result | own | {"load_average": round(os.getloadavg()[0], 1)}
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
    """A rank or a host is killed, a host loses its power, or is cut off: the other ends in time, and one host finishes
    the run."""
    from tests.launching.node_scenes import PATIENCE, Job, left, lose_a_host, two_hosts, write_config

    found, wrong = {}, []
    train = {"max_steps": 30, "hang_timeout": HANG_TIMEOUT}
    config = write_config(folder / "demo", here / "run.yaml", train=train, checkpoint={"every": 3})
    rows = None
    for how in ("rank", "killed", "power", "cable"):
        with two_hosts([folder]) as machines:
            job = Job(config, machines, ranks=2)
            shutil.rmtree(job.folder, ignore_errors=True)
            job.start()
            seconds, problems = lose_a_host(job, 4, how, limit=HANG_TIMEOUT + 2 * LIMIT)
            found[how], wrong = round(seconds, 1), wrong + problems
            allowed = LIMIT + (0 if how in ("rank", "killed") else HANG_TIMEOUT)
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


SCENES = {
    "start": _start,
    "restarts": _restarts,
    "slow": _slow,
    "bitwise": _bitwise,
    "elastic": _elastic,
    "losses": _losses,
    "ssh": _ssh,
    "skew": _skew,
}


# ---------------------------------------------------------------------------------------------------------------- table


def table(results: dict) -> str:
    """The figures of the sections `nodes` and `slurm` for docs/launching.md."""
    found, job = results["nodes"]["found"], results["slurm"]
    lines = ["| scene | what | found | limit |", "|---|---|---|---|"]
    for scene, what, told, limit in (*_rows(found), ("slurm", *_slurm_row(job))):
        wrong = (job if scene == "slurm" else found[scene])["wrong"]
        lines.append(f"| `{scene}` | {what} | {told if not wrong else f'WRONG: {wrong}'} | {limit} |")
    return "\n".join(lines)


def _rows(found: dict) -> list[tuple[str, str, str, str]]:
    start, restarts, slow, elastic = (found[name] for name in ("start", "restarts", "slow", "elastic"))
    gone = found["losses"]["seconds_until_the_other_host_has_ended"]
    hang = found["losses"]["hang_timeout"]
    allowed = f"{LIMIT:.0f} s, and `hang_timeout` ({hang} s) to notice"
    ranks = " to ".join(elastic["ranks_of_the_attempts"])
    return [
        ("start", "from the command to the first step", f"{start['seconds_to_the_first_step']} s", "25 s"),
        ("start", "preflight", f"{start['seconds_of_preflight']} s", "10 s"),
        ("bitwise", f"2 hosts x 2 ranks: {'; '.join(found['bitwise']['equal'])}", "bitwise one host", ""),
        ("ssh", "both hosts started by one command, through pdsh and ssh", "bitwise one host", ""),
        ("losses", "a rank is killed: both hosts have ended", f"{gone['rank']} s", f"{LIMIT:.0f} s"),
        ("losses", "a host is killed: the other has ended", f"{gone['killed']} s", f"{LIMIT:.0f} s"),
        ("losses", "a host loses its power, and nobody is told", f"{gone['power']} s", allowed),
        ("losses", "the link is down: both hosts have ended", f"{gone['cable']} s", allowed),
        ("losses", "the same command, with the node that is there", "done, the same rows", ""),
        ("restarts", f"{restarts['kills']} kills of a host, each restarted", f"{restarts['kills']} of 20, bitwise", ""),
        ("elastic", f"a host is lost and comes back: ranks {ranks}", "done", ""),
        ("slow", f"a link that takes {slow['milliseconds']} ms", "bitwise one host", ""),
        ("skew", "a clock 90 s ahead", found["skew"]["told"], ""),
    ]


def _slurm_row(job: dict) -> tuple[str, str, str]:
    stops = ", ".join(job["stopped_after_step"])
    codes = " and ".join(job["exit_codes_of_jobs"])
    what = f"a job on two nodes: {stops}; each time it saves and is queued again; exit codes {codes}"
    return what, f"{job['steps']} of {job['steps']} steps, {job['restarts']} restarts; the codes arrive", ""


def renew_docs(results: dict) -> None:
    """Write the table into docs/launching.md, where all scenes are done."""
    from benchmarks.harness import renew_page

    if SCENES.keys() <= results.get("nodes", {}).get("found", {}).keys() and "exit_codes_of_jobs" in results["slurm"]:
        renew_page(ROOT / "docs" / "launching.md", {"nodes": table(results)})
