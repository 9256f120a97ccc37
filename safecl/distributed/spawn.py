"""Start several ranks of one Python module on this machine, without a launcher's messages. The first failure or a
signal ends them all."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from safecl.distributed import environment
from safecl.distributed.signals import StopSignals

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 4.0


def run_ranks(
    module: str,
    arguments: Sequence[str],
    num_ranks: int,
    *,
    watch: Callable[[], object] = lambda: None,
    patience: float = 0.0,
    grace: float = _GRACE_SECONDS,
) -> int:
    """Run `python -m module arguments` in `num_ranks` processes and wait. Return 0, or the exit code of the first rank
    that failed (minus the signal's number for a rank that was killed).

    Every rank gets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, and its share of the cores as
    OMP_NUM_THREADS. `watch` is called while they run. `patience`: seconds that the other ranks have to end by
    themselves after one has failed.

    A signal that asks this process to end asks the ranks, by SIGTERM, and waits `grace` seconds for them, for example
    while they save; a second Ctrl-C kills them at once. Then this process gets its signal again.
    """
    port = environment.free_port()
    ranks: list[subprocess.Popen[bytes]] = []
    stop = _Stop(grace)
    try:
        with StopSignals(stop.ask, stop.insist):
            with _ctrl_c_waits():
                for rank in range(num_ranks):
                    ranks.append(_start(module, arguments, rank, num_ranks, port))
            code = _wait(ranks, watch, patience, stop)
    finally:
        _end(ranks, 0.0 if stop.is_over() else _GRACE_SECONDS)
    if stop.number is not None:
        signal.raise_signal(stop.number)
    return code


class _Stop:
    """A signal that asks this process to end, and how long its ranks have for that."""

    def __init__(self, grace: float):
        self.number: int | None = None
        self._grace = grace
        self._ends_at = float("inf")
        self._is_passed_on = False

    def ask(self, number: int) -> None:
        self.number, self._ends_at = number, time.monotonic() + self._grace

    def insist(self, number: int) -> None:
        if number == signal.SIGINT:
            self._ends_at = time.monotonic()

    def is_over(self) -> bool:
        """Return whether the ranks must be gone."""
        return time.monotonic() >= self._ends_at

    def pass_on(self, ranks: Sequence[subprocess.Popen[bytes]]) -> None:
        """Ask the ranks to end, once and where there was a signal."""
        if self.number is not None and not self._is_passed_on:
            self._is_passed_on = True
            _terminate(ranks)


@contextlib.contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Block SIGINT here, and permanently in the started processes: a terminal sends it to them as well, which would end
    their imports with a traceback. The parent gets it afterwards, and ends all ranks."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(module: str, arguments: Sequence[str], rank: int, num_ranks: int, port: int) -> subprocess.Popen[bytes]:
    threads = str(max(1, (os.cpu_count() or 1) // num_ranks))
    variables = {
        **os.environ,
        environment.LAUNCHED: "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
    }
    return subprocess.Popen([sys.executable, "-m", module, *arguments], env=variables)


def _wait(ranks: list[subprocess.Popen[bytes]], watch: Callable[[], object], patience: float, stop: _Stop) -> int:
    failure, failed_at = 0, 0.0
    while True:
        watch()
        stop.pass_on(ranks)
        codes = [rank.poll() for rank in ranks]
        if not failure and (failed := [code for code in codes if code]):
            failure, failed_at = failed[0], time.monotonic()
        impatient = failure and stop.number is None and time.monotonic() - failed_at >= patience
        if None not in codes or impatient or stop.is_over():
            return failure
        time.sleep(_POLL_SECONDS)


def _end(ranks: list[subprocess.Popen[bytes]], grace: float) -> None:
    """Ask the ranks that still run to end, and kill them after a while."""
    _terminate(ranks)
    deadline = time.monotonic() + grace
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def _terminate(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signal.SIGTERM)
