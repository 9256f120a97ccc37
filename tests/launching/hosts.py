"""Hosts on one machine: a network namespace each, joined by a bridge of veth pairs, with names, processes and mounts of
their own. Nothing but the folders that are named as shared is shared.

Needs root and a kernel with namespaces; `reason_against()` says why it cannot be done here.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
NETWORK = "10.77"


@functools.cache
def reason_against() -> str | None:
    """Why hosts cannot be made here; None where they can."""
    if os.geteuid() != 0:
        return "namespaces as hosts need root"
    name = f"safecl-probe-{os.getpid()}"
    try:
        done = _ip("netns", "add", name, check=False)
        if done.returncode:
            return f"this machine makes no network namespaces: {done.stderr.strip()}"
        inside = ["ip", "netns", "exec", name, "unshare", "--mount", "--uts", "--pid", "--fork", "true"]
        done = subprocess.run(inside, capture_output=True, text=True, check=False)
        return f"this machine makes no namespaces: {done.stderr.strip()}" if done.returncode else None
    except FileNotFoundError as error:
        return f"{error.filename} is not installed"
    finally:
        with contextlib.suppress(OSError):
            _ip("netns", "del", name, check=False)


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=check)


@dataclass
class Host:
    """One host. shared: folders that look the same on every host; all else below /tmp, /var/tmp and /dev/shm is its
    own."""

    name: str
    namespace: str
    link: str
    ip: str
    shared: list[Path]
    processes: list[subprocess.Popen] = field(default_factory=list)

    def start(self, *command: object, environ: Mapping[str, str] | None = None, log: Path) -> subprocess.Popen:
        """Start a command on this host; its output goes to a log."""
        inside = [
            *("ip", "netns", "exec", self.namespace),
            *("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"),
            *("sh", "-c", self._own_mounts() + 'exec "$@"', "sh"),
        ]
        # A user's own cache of the machine is not there on another host.
        env = {**os.environ, "SAFECL_CACHE": "/tmp/cache", "HOME": "/tmp", **(environ or {})}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            env.pop(name, None)
        with log.open("ab") as file:
            process = subprocess.Popen(
                [*inside, *map(str, command)], env=env, stdout=file, stderr=file, stdin=subprocess.DEVNULL, cwd=ROOT
            )
        self.processes.append(process)
        return process

    def _own_mounts(self) -> str:
        kept = [path.resolve() for path in (*self.shared, ROOT, Path(sys.prefix), *_extensions())]
        kept = [path for path in kept if not any(other in path.parents for other in kept)]
        aside = [(path, f"/run/{self.namespace}-{index}") for index, path in enumerate(kept)]
        lines = [f"hostname {self.name}", "mount -t tmpfs none /run", "ip link set lo up"]
        lines += [f"mkdir -p {there} && mount --bind {shlex.quote(str(path))} {there}" for path, there in aside]
        lines += ["mount -t tmpfs none /tmp", "mount -t tmpfs none /var/tmp", "mount -t tmpfs none /dev/shm"]
        lines += [
            f"mkdir -p {shlex.quote(str(path))} && mount --bind {there} {shlex.quote(str(path))}"
            for path, there in aside
        ]
        return " && ".join([*lines, f"cd {shlex.quote(str(ROOT))}"]) + " && "

    def safecl(self, *arguments: object, environ: Mapping[str, str] | None = None, log: Path) -> subprocess.Popen:
        return self.start(sys.executable, "-m", "safecl", *arguments, environ=environ, log=log)

    def send(self, number: int) -> None:
        """Send a signal to what was started last: to the agent, not to the programs that make its namespaces."""
        os.kill(self.inner(), number)

    def inner(self) -> int:
        """The process id, outside of the host, of what was started last."""
        (child,) = Path(f"/proc/{self.processes[-1].pid}/task/{self.processes[-1].pid}/children").read_text().split()
        return int(child)

    def running(self) -> list[int]:
        """The process ids of everything that runs on this host."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace, check=False).stdout.split()]

    def unplug(self) -> None:
        """Cut the cable: packets are lost, and nobody is told."""
        _ip("link", "set", self.link, "down")

    def plug_in(self) -> None:
        _ip("link", "set", self.link, "up")

    def lose_power(self) -> None:
        """End everything at once, and tell nobody."""
        self.unplug()
        self.kill()

    def kill_a_rank(self) -> None:
        for pid in self.running():
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if "train" in words and "torch.distributed.run" not in words:
                return os.kill(pid, signal.SIGKILL)
        raise AssertionError(f"no rank runs on {self.name}")

    def kill(self) -> None:
        for pid in self.running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()


class Agent(Host):
    """A stand-in for a host where namespaces are forbidden: processes of this machine, which reach each other by
    127.0.0.1."""

    def start(self, *command: object, environ: Mapping[str, str] | None = None, log: Path) -> subprocess.Popen:
        env = {**os.environ, **(environ or {})}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            env.pop(name, None)
        with log.open("ab") as file:
            process = subprocess.Popen(
                [*map(str, command)], env=env, stdout=file, stderr=file, stdin=subprocess.DEVNULL, cwd=ROOT
            )
        self.processes.append(process)
        return process

    def inner(self) -> int:
        return self.processes[-1].pid

    def running(self) -> list[int]:
        return [process.pid for process in self.processes if process.poll() is None]


@contextlib.contextmanager
def agents(*names: str) -> Iterator[list[Host]]:
    """Make stand-ins for hosts, and end what they have started."""
    made: list[Host] = [Agent(name, "", "lo", "127.0.0.1", []) for name in names]
    try:
        yield made
    finally:
        for agent in made:
            agent.kill()


def _extensions() -> list[Path]:
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "/tmp/torch_ext"))
    return [folder] if folder.is_dir() else []


@contextlib.contextmanager
def hosts(*names: str, shared: list[Path]) -> Iterator[list[Host]]:
    """Make hosts that reach each other; remove them, and all that runs on them, afterwards."""
    tag = f"s{os.getpid() % 100000}"
    bridge, made = f"{tag}br", []
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("link", "set", bridge, "up")
        for index, name in enumerate(names):
            namespace, link, ip = f"{tag}-{name}", f"{tag}v{index}", f"{NETWORK}.{os.getpid() % 250}.{index + 1}"
            _ip("netns", "add", namespace)
            made.append(Host(name, namespace, link, ip, shared))
            _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _ip("link", "set", link, "master", bridge, "up")
            _ip("-n", namespace, "addr", "add", f"{ip}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "eth0", "up")
            _ip("-n", namespace, "link", "set", "lo", "up")
        yield made
    finally:
        for host in made:
            host.kill()
            _ip("link", "del", host.link, check=False)  # at once; with its namespace it would go some time later
            _ip("netns", "del", host.namespace, check=False)
        _ip("link", "del", bridge, check=False)


def wait_for(condition, seconds: float, what: str) -> None:
    """Wait until a condition holds; fail after a while."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.05)
