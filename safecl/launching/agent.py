"""Runs a launcher and its ranks on this machine: passes signals on, restarts after failures, finds out the exit code,
and leaves no process behind. Imports no torch.

A launcher kills its ranks 30 s after a signal, which may be in the middle of a save. So it does not get the signals:
they are blocked for it, and the agent sends them to the ranks, which finish their step and save.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safecl.distributed import rank_files
from safecl.distributed.signals import SIGNALS, StopSignals, name_of
from safecl.exits import ExitCode
from safecl.launching.job import Command
from safecl.launching.pulse import Pulse

_POLL_SECONDS = 0.1
_SECONDS_BEFORE_A_RESTART = 5.0
_SECONDS_TO_END = 10.0
_SECONDS_TO_REPORT = 5.0
_FINAL = (ExitCode.USAGE, ExitCode.GATE)
"""Codes that a rank has explained itself."""
_SECONDS_BETWEEN_LOOKS, _SECONDS_TO_CONNECT = 5.0, 3.0
SECONDS_TO_BE_LOST = 20.0
"""The ranks of a node end when the first node could not be reached for this long."""
_PR_SET_PDEATHSIG = 1


@dataclass
class Agent:
    """Runs `command` until it is done or has failed more than `max_restarts` times.

    files: the folder of the ranks' files. exit_code: the file of the run folder where rank 0 says how the run ended.
    start_timeout, stop_timeout: seconds, see LaunchConfig. first_node: where the nodes have met, for agents of other
    nodes. The ranks end where it cannot be reached any more: they may hang in calls that nobody answers. signs: the
    folder for signs of life of all agents, see pulse.py. ranks: number of ranks on this machine, where it is known.
    say: prints a line for people.
    """

    command: Command
    files: Path
    exit_code: Path
    max_restarts: int = 0
    start_timeout: float = 600.0
    stop_timeout: float = 600.0
    first_node: tuple[str, int] | None = None
    signs: Path | None = None
    ranks: int | None = None
    say: Callable[[str], object] = print
    _stop: str | None = None
    _stop_by: float | None = None
    _launcher: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def run(self) -> int:
        """Return the exit code of the run: 0, 1, 2, 3 or 75."""
        restarts, began = 0, time.monotonic()
        with StopSignals(self._ask_to_stop, self._insist):
            while True:
                code, started = self._attempt()
                if code != ExitCode.FAILED or self._stop is not None:
                    return code
                restarts += started
                waited = time.monotonic() - began
                if (
                    restarts > self.max_restarts
                    or (not started and waited > self.start_timeout)
                    or not self.max_restarts
                ):
                    return code
                left = f"{self.max_restarts - restarts} more restart{'s' * (self.max_restarts - restarts != 1)}"
                self.say(f"safecl launch: the ranks failed; starting them again from the last checkpoint ({left})")
                began = time.monotonic() if started else began
                if self._wait_for_the_others():
                    return int(ExitCode.STOPPED)

    def _wait_for_the_others(self) -> bool:
        """Wait until the agents of other nodes have ended their ranks too; return True where a signal came."""
        end = time.monotonic() + _SECONDS_BEFORE_A_RESTART
        while time.monotonic() < end and self._stop is None:
            time.sleep(_POLL_SECONDS)
        return self._stop is not None

    def _attempt(self) -> tuple[int, bool]:
        """Run the launcher once; return the exit code, and whether a rank of this node has begun."""
        for stale in (*self.files.glob("*.pid"), *self.files.glob("*.code")):
            stale.unlink()
        began = time.time()
        self._launcher, reach, pulse = start(self.command), Reach(self.first_node), Pulse(self.signs)
        pulse.begin()
        try:
            while self._launcher.poll() is None:
                time.sleep(_POLL_SECONDS)
                if self._have_explained():
                    self._let_ranks_report()
                    break
                if (lost := reach.lost_for()) > SECONDS_TO_BE_LOST:
                    self.say(f"safecl launch: the first node ({reach}) cannot be reached for {lost:.0f} s; ending")
                    break
                if self._stop_by is not None and time.monotonic() > self._stop_by:
                    self.say(f"safecl launch: the ranks have not ended {self.stop_timeout:.0f} s after {self._stop}")
                    break
                if (reason := pulse.lost()) is not None:
                    self.say(f"safecl launch: {reason}; ending the ranks of this node")
                    break
        finally:
            self._end()
            code = self._code(began)
            pulse.end(failed=code == ExitCode.FAILED)
        return code, any(self._numbers("pid"))

    def _have_explained(self) -> bool:
        """Whether a rank has said why the run ends, or all ranks have saved after a signal.

        torchrun itself stops the ranks of several nodes where another node joins, and starts them again.
        """
        codes = list(self._numbers("code"))
        ends = self._stop is not None or self.signs is None
        all_stopped = ends and len(codes) == self.ranks and set(codes) == {ExitCode.STOPPED}
        return all_stopped or any(code in _FINAL for code in codes)

    def _let_ranks_report(self) -> None:
        """End the launcher, which would add tracebacks of its own to what a rank has said, or end the others before
        they have said it; then give the ranks time to end."""
        assert self._launcher is not None
        self._launcher.kill()
        end = time.monotonic() + _SECONDS_TO_REPORT
        while any(True for _ in self._ranks()) and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)

    # ---------------------------------------------------------------------------------------------------------- signals

    def _ask_to_stop(self, number: int) -> None:
        self._stop, self._stop_by = name_of(number), time.monotonic() + self.stop_timeout
        os.write(2, f"\nsafecl launch: {self._stop}: the ranks finish their step and save\n".encode())
        if not self._send(number) and self._launcher is not None and self._launcher.poll() is None:
            _signal_group(self._launcher.pid, signal.SIGHUP)  # it still waits for other nodes

    def _insist(self, number: int) -> None:
        """A second Ctrl-C ends the ranks at once; other signals are passed on once more."""
        self._send(number)
        if number == signal.SIGINT:
            self._stop_by = time.monotonic() + _SECONDS_TO_END

    def _send(self, number: int) -> bool:
        """Send a signal to the ranks of this node; return False where none has begun."""
        ranks = list(self._ranks())
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, number)
        return bool(ranks)

    def _ranks(self) -> Iterator[int]:
        """Yield the process ids of the ranks that still run. A process id that another process has now is not one."""
        marker = f"{rank_files.FILES}={self.files}".encode()
        for pid in self._numbers("pid"):
            with contextlib.suppress(OSError):
                if marker in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    yield pid

    def _end(self) -> None:
        """Leave no process behind: neither the launcher nor a rank that the launcher has lost."""
        assert self._launcher is not None
        for pid in self._ranks():
            _signal_group(pid, signal.SIGKILL) if os.getpgid(pid) == pid else os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._launcher.wait(_SECONDS_TO_END if self._launcher.poll() is None else 0)
        _signal_group(self._launcher.pid, signal.SIGKILL)
        self._launcher.wait()

    # -------------------------------------------------------------------------------------------------------- exit code

    def _code(self, began: float) -> int:
        """Return the exit code that the run would have without a launcher.

        A launcher ends with 1 whatever its ranks end with, and sends SIGTERM to the others when one has ended.
        """
        assert self._launcher is not None
        codes, num_ranks = list(self._numbers("code")), len(list(self._numbers("pid")))
        if num_ranks == 0:
            return self._code_elsewhere(began)
        for code in _FINAL:
            if code in codes:
                return int(code)
        if ExitCode.FAILED in codes:
            return int(ExitCode.FAILED)
        if set(codes) == {ExitCode.STOPPED} and (len(codes) == num_ranks or self._stop is not None):
            return int(ExitCode.STOPPED)
        if self._launcher.returncode == 0 and set(codes) == {ExitCode.DONE}:
            return int(ExitCode.DONE)
        return int(ExitCode.STOPPED if self._stop is not None else ExitCode.FAILED)

    def _code_elsewhere(self, began: float) -> int:
        """Return the exit code where no rank of this launch ran on this machine: rank 0 has left it in the run
        folder."""
        if self._stop is not None:
            return int(ExitCode.STOPPED)
        with contextlib.suppress(OSError, ValueError):
            if self.exit_code.stat().st_mtime >= began - 1.0:
                return int(self.exit_code.read_text())
        return int(ExitCode.FAILED)

    def _numbers(self, kind: str) -> Iterator[int]:
        for path in sorted(self.files.glob(f"*.{kind}")):
            with contextlib.suppress(OSError, ValueError):
                yield int(path.read_text())


class Reach:
    """Tells for how long the first node cannot be reached, from the first look that fails after one that did not.

    Time in which nobody looks does not count: this machine was asleep, or too busy.
    """

    def __init__(self, place: tuple[str, int] | None):
        self._place = place
        self._was_reached = False
        self._missed_at: float | None = None
        self._looked_at = 0.0

    def __str__(self) -> str:
        return ":".join(map(str, self._place or ()))

    def lost_for(self) -> float:
        """Look, at most every 5 seconds; return the seconds since it was first missed, 0 where it is there."""
        now = time.monotonic()
        if self._place is None or now - self._looked_at < _SECONDS_BETWEEN_LOOKS:
            return 0.0
        self._looked_at = now
        try:
            socket.create_connection(self._place, timeout=_SECONDS_TO_CONNECT).close()
        except OSError:
            if not self._was_reached:
                return 0.0
            self._missed_at = self._missed_at or now
            return now - self._missed_at
        self._was_reached, self._missed_at = True, None
        return 0.0


def start(command: Command) -> subprocess.Popen[bytes]:
    """Start a launcher in a session of its own, with the signals blocked that ask a process to stop."""
    sys.stdout.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return subprocess.Popen(
            command.argv,
            env={**os.environ, **command.environment},
            start_new_session=True,
            preexec_fn=_end_with_the_agent,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_the_agent() -> None:
    """Let the system send SIGHUP, which torchrun obeys, to the launcher when the agent dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
