"""The files by which a rank and the agent that started it (`safecl launch`) know of each other. Imports no torch.

$SAFECL_RANK_FILES  folder of the agent on this machine. RANK.pid holds the rank's process id, RANK.code its exit code.
                    Launchers end with 1 whatever the code of a rank is; the agent reads it here.
$SAFECL_RANK_LOGS   folder for rank-RRRRR.log, which gets all output of a rank. Rank 0 writes to the console as well.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from pathlib import Path

from safecl.distributed.signals import SIGNALS

FILES, LOGS = "SAFECL_RANK_FILES", "SAFECL_RANK_LOGS"
_BLOCK = 65536

_console: int | None = None
"""The standard error of the launcher, where the output of this rank goes to a log; None where it does not."""


def begin(arguments: list[str]) -> None:
    """Take note of this process for its agent, and send its output to the rank's log. Does nothing without an agent.

    Call it before anything starts a thread. arguments: of the command line, for the head of the log.
    """
    rank = os.environ.get("RANK")
    if rank is None:
        return
    if os.environ.get(FILES):
        # The agent blocks these signals for the launcher, which would kill ranks that are saving; a rank obeys them.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        _write(rank, "pid", os.getpid())
    if folder := os.environ.get(LOGS):
        with contextlib.suppress(OSError):  # preflight reports a run folder that cannot be written
            _send_to_log(Path(folder), int(rank), arguments)


def write_code(code: object) -> None:
    """Keep the exit code of this rank for its agent. code: of a SystemExit; None and False are 0, text is 1."""
    if (rank := os.environ.get("RANK")) is not None and os.environ.get(FILES):
        _write(rank, "code", int(code) if isinstance(code, int) else int(code is not None))


def leave(code: int) -> None:
    """End this process at once with an exit code that its agent learns."""
    write_code(code)
    os._exit(code)


def tell(text: str) -> None:
    """Write a message for people to the console, where the output of this rank goes to a log only."""
    if _console is not None:
        with contextlib.suppress(OSError):
            os.write(_console, text.encode())


def _write(rank: str, kind: str, number: int) -> None:
    folder = Path(os.environ[FILES])
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{rank}.{kind}.partial"
        partial.write_text(f"{number}\n")
        partial.replace(folder / f"{rank}.{kind}")


# ----------------------------------------------------------------------------------------------------------------- logs


def log_name(rank: int) -> str:
    """The name of a rank's log."""
    return f"rank-{rank:05d}.log"


def _send_to_log(folder: Path, rank: int, arguments: list[str]) -> None:
    global _console
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / log_name(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    head = f"--- rank {rank} on {socket.gethostname()}, {time.strftime('%Y-%m-%d %H:%M:%S')}: safecl"
    os.write(log, f"{head} {' '.join(arguments)}\n".encode())
    if rank == 0:
        _copy_to_log(log)
    else:
        _console = os.dup(2)
        os.dup2(log, 1)
        os.dup2(log, 2)
    os.close(log)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a stream that a test has replaced
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _copy_to_log(log: int) -> None:
    """Put a process between this one's output and the console that copies it to the log. It lives as long as anybody
    can write to it, so the last words of a rank that is killed are kept."""
    pipes = [os.pipe(), os.pipe()]
    if os.fork() == 0:
        for _, writer in pipes:
            os.close(writer)
        _copy({pipes[0][0]: 1, pipes[1][0]: 2}, log)
        os._exit(0)
    for number, (reader, writer) in enumerate(pipes, start=1):
        os.close(reader)
        os.dup2(writer, number)
        os.close(writer)


def _copy(consoles: dict[int, int], log: int) -> None:
    """Copy what comes from each pipe to its console and to the log, until all writers are gone."""
    os.setsid()
    for number in (*SIGNALS, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    with selectors.DefaultSelector() as waiting:
        for reader in consoles:
            waiting.register(reader, selectors.EVENT_READ)
        while waiting.get_map():
            for key, _ in waiting.select():
                block = os.read(key.fd, _BLOCK)
                if not block:
                    waiting.unregister(key.fd)
                for place in (consoles[key.fd], log):
                    with contextlib.suppress(OSError):  # a console that is closed, or a full disk
                        os.write(place, block)
