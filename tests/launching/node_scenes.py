"""Runs on two hosts (see hosts.py) that are started, cut, killed and started again, and what is left of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tests.launching.hosts import ROOT, Host, agents, hosts, reason_against, wait_for

PORT = 29477
PATIENCE = 900.0
"""Seconds until a scene is given up; two hosts on two busy cores start in minutes."""
PROGRAMS = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
OF_THE_MACHINE = ("tokens_per_second", "memory_bytes", "time")


def write_config(materials: Path, path: Path, **sections: object) -> Path:
    """Write a config of few steps on the demonstration's data and its random model."""
    data = materials / "data"
    tree = {
        "model": {"path": str(materials / "random-model"), "dtype": "fp32", "gradient_checkpointing": False},
        "tasks": [{"name": "sentiment", "train": str(data / "task.jsonl")}],
        "memory": {"source": str(data / "memory.jsonl"), "max_rows": 12, "replay_ratio": 0.5, "max_tokens": 64},
        "methods": {"er": {}, "ema": {"decay": 0.7}},
        "train": {"max_steps": 6, "tokens_per_batch": 150, "tokens_per_microbatch": 256, "max_length": 64},
        "deepspeed": {"stage": 2},
        "checkpoint": {"every": 2},
        "output": str(path.parent / "run"),
    }
    tree["train"] |= {"learning_rate": 1e-3, "allow_few_steps": True}
    for name, section in sections.items():
        old = tree.get(name)
        merged = isinstance(old, dict) and isinstance(section, dict) and section
        tree[name] = {**old, **section} if merged else section
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


@dataclass
class Job:
    """A run on hosts: `start` begins the agents, one a host; `wait` gives their exit codes."""

    config: Path
    machines: list[Host]
    ranks: int = 1
    options: tuple[str, ...] = ()
    logs: list[Path] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return Path(yaml.safe_load(self.config.read_text())["output"])

    def start(self, *which: int, nodes: str = "2", **environ: str) -> None:
        for index in which or range(len(self.machines)):
            self.start_one(index, nodes, environ=environ)

    def start_one(self, index: int, nodes: str, config: Path | None = None, environ: dict | None = None) -> None:
        machine, first = self.machines[index], self.machines[0]
        log = self.config.parent / f"{machine.name}.log"
        rank = ["--node-rank", str(index)] if "deepspeed" in self.options else []
        rendezvous = ["--rendezvous", f"{first.ip}:{PORT}"] if nodes != "1" else []
        arguments = ["launch", config or self.config, "--nodes", nodes, "--gpus-per-node", self.ranks, *rendezvous]
        machine.safecl(*arguments, *rank, *self.options, environ=environ, log=log)
        self.logs = [*self.logs, log] if log not in self.logs else self.logs

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """Wait for the agents that were started last; fail with the logs where they do not end."""
        codes = []
        for machine in self.machines:
            try:
                codes += [machine.processes[-1].wait(seconds)] if machine.processes else []
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{machine.name} has not ended\n{self.said()[-6000:]}") from None
        return codes

    def said(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs)

    def steps(self) -> int:
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def reach(self, steps: int, seconds: float = PATIENCE) -> None:
        """Wait until the run has made so many steps."""

        def reached() -> bool:
            assert any(m.processes and m.processes[-1].poll() is None for m in self.machines), self.said()[-6000:]
            return self.steps() >= steps

        wait_for(reached, seconds, f"step {steps}")

    def orphans(self) -> list[int]:
        """What still runs on the hosts though its agent has ended."""
        return [pid for m in self.machines if m.processes and m.processes[-1].poll() is not None for pid in m.running()]


@contextmanager
def two_hosts(shared: list[Path]) -> Iterator[list[Host]]:
    """Two hosts; where namespaces are forbidden, two agents on this machine."""
    with hosts("a", "b", shared=shared) if reason_against() is None else agents("a", "b") as machines:
        yield machines


def left(folder: Path) -> dict:
    """What a run leaves for its user, without wall-clock times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "metrics": [{key: value for key, value in line.items() if key not in OF_THE_MACHINE} for line in lines],
        "models": {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("model*/*.safetensors"))},
    }


def on_one_host(config: Path, ranks: int, folder: Path, cache: Path) -> dict:
    """What the same ranks leave on one host, under plain torchrun."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "SAFECL_CACHE": str(cache)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc-per-node={ranks}", "-m", "safecl", "train", str(config), f"output={folder}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return left(folder)


def why_no_ssh() -> str | None:
    """Why the deepspeed launcher cannot start ranks by ssh here; None where it can."""
    missing = [name for name in ("sshd", "ssh", "ssh-keygen", "pdsh") if shutil.which(name, path=PROGRAMS) is None]
    return f"{', '.join(missing)} not installed" if missing else reason_against()


def serve_ssh(machines: list[Host], folder: Path) -> dict[str, str]:
    """Start sshd on every host; return the variables with which ssh reaches them. folder: shared, for the keys."""
    (folder / "bin").mkdir(parents=True)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    settings = f"""\
        HostKey {folder}/host
        AuthorizedKeysFile {folder}/user.pub
        PermitRootLogin yes
        StrictModes no
        UsePAM no
        PidFile none
        """
    (folder / "sshd_config").write_text(textwrap.dedent(settings))
    program = shutil.which("sshd", path=PROGRAMS)
    for machine in machines:
        serve = f"mkdir -p /run/sshd && exec {program} -D -e -f {folder}/sshd_config"
        machine.start("sh", "-c", serve, log=folder / f"{machine.name}.log")
    wait_for(
        lambda: all("listening" in (folder / f"{machine.name}.log").read_text() for machine in machines), 60, "sshd"
    )
    options = f"-i {folder}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {options} "$@"\n')
    (folder / "bin" / "ssh").chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def run_by_ssh(machines: list[Host], config: Path, keys: Path) -> tuple[int, str]:
    """Start both hosts by one command on the first; return its exit code and what it said."""
    log, names = config.parent / "ssh.log", ",".join(machine.ip for machine in machines)
    options = ["--via", "deepspeed", "--nodes", "2", "--gpus-per-node", "1", "--rendezvous", machines[0].ip]
    environ = serve_ssh(machines, keys)
    by_ssh = ["launch.ssh=true", f"launch.hosts=[{names}]"]
    process = machines[0].safecl("launch", config, *options, *by_ssh, environ=environ, log=log)
    return process.wait(PATIENCE), log.read_text(errors="replace")


def stop_and_go_on(job: Job, at_step: int) -> list[str]:
    """Stop by a signal to one host's agent; both end with 75, and the same command finishes. Return what is wrong."""
    shutil.rmtree(job.folder, ignore_errors=True)
    job.start()
    job.reach(at_step)
    job.machines[1].send(signal.SIGTERM)
    codes = job.wait()
    wrong = [] if codes == [75, 75] else [f"exit codes {codes} after SIGTERM on one host"]
    job.start()
    codes = job.wait()
    return wrong + ([] if codes == [0, 0] else [f"exit codes {codes} at the end"])


def lose_a_host(job: Job, at_step: int, how: str, limit: float) -> tuple[float, list[str]]:
    """Lose host b at a step; return the seconds until host a has ended, and what is wrong.

    how: `rank` (one rank of it is killed), `killed` (all its processes), `power` (the cable first, so nobody is told),
    `cable` (it runs on).
    """
    job.reach(at_step)
    b = job.machines[1]
    {"rank": b.kill_a_rank, "killed": b.kill, "power": b.lose_power, "cable": b.unplug}[how]()
    began = time.monotonic()
    wrong = []
    watched = job.machines if how in ("rank", "cable") else job.machines[:1]
    for machine in watched:
        try:
            code = machine.processes[-1].wait(limit)
            wrong += [] if code == 1 else [f"{how}: {machine.name} ended with {code}"]
        except subprocess.TimeoutExpired:
            wrong.append(f"{how}: {machine.name} still runs {limit:.0f} s later")
            machine.kill()
    seconds = time.monotonic() - began
    wrong += [f"{how}: process {pid} is left" for pid in job.orphans()]
    b.plug_in()
    return seconds, wrong
