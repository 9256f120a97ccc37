"""How a verb ends: exit codes, and errors told as messages instead of tracebacks.

0 done, 1 failed while running, 2 wrong config or usage, 3 safety gate failed or undecided, 75 stopped by a signal
(EX_TEMPFAIL).
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from safecl.config import ConfigError
from safecl.distributed import environment


class ExitCode(enum.IntEnum):
    """What the shell gets."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    GATE = 3
    STOPPED = 75


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end. Not an Exception, so that no `except Exception` on the way swallows it."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


class Ending:
    """What decides how a verb ends early: where its traceback goes, and whether a signal was the cause."""

    verb: str = ""
    run_folder: Path | None = None
    show_traceback: bool = False
    stopped: Stopped | None = None
    stopped_at: float = 0.0
    said: bool = False
    undisturbed: bool = False


stderr = Console(stderr=True, highlight=False, soft_wrap=True)

# A launcher ends all ranks as soon as one fails. A rank that waits this long before it speaks is heard only when rank 0
# had nothing to say.
SECONDS_FOR_RANK_0 = 3.0
SECONDS_BEFORE_A_SECOND_SIGNAL_COUNTS = 1.0
SECONDS_TO_END = 5.0

_HINTS = {
    "OutOfMemoryError": "less memory: a smaller train.tokens_per_microbatch, a higher deepspeed.stage, or deepspeed.offload.optimizer=cpu",
    "MemoryError": "less host memory: fewer ranks on this machine, or a smaller train.tokens_per_microbatch",
}

_FORESEEN = ("TrainingFailed", "ExportFailed")
"""By name, because their modules import torch. Their messages say all; a traceback would tell nobody more."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextlib.contextmanager
def told_as_messages(verb: str) -> Iterator[None]:
    """Runs a verb's body; every way it can end becomes an exit code and, where something is wrong, a message."""
    Ending.verb, Ending.stopped, Ending.said, Ending.undisturbed = verb, None, False, False
    before = {number: _on_signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        with errors_told(verb):
            yield
    except KeyboardInterrupt as stop:
        _say_stopped(stop.name if isinstance(stop, Stopped) else "Ctrl-C")
        raise SystemExit(ExitCode.STOPPED) from None
    finally:
        for number, handler in before.items():
            if not (Ending.undisturbed and number == signal.SIGTERM):
                _on_signal(number, handler)


@contextlib.contextmanager
def errors_told(verb: str) -> Iterator[None]:
    """Turns errors into a message and SystemExit; lets signals pass."""
    try:
        yield
    except BrokenPipeError:
        raise
    except Exception as error:
        if (
            Ending.stopped is not None
        ):  # libraries turn a signal inside an import or a callback into an error of their own
            raise Ending.stopped from None
        if isinstance(error, typer.Exit):
            raise
        is_usage = isinstance(error, ConfigError)
        _say("error" if is_usage else "failed", str(error) if is_usage else _describe(verb, error))
        raise SystemExit(ExitCode.USAGE if is_usage else ExitCode.FAILED) from None


def end_undisturbed() -> None:
    """Lets a verb that is done end with its own exit code, though a launcher sends SIGTERM to all ranks as soon as the
    first has ended."""
    _on_signal(signal.SIGTERM, signal.SIG_IGN)
    Ending.undisturbed = True


def _stop(number: int, _frame: object) -> None:
    """A launcher passes on what the terminal has sent to every process already; only a signal after a while is a second
    wish to end."""
    if Ending.stopped is not None:
        if time.monotonic() - Ending.stopped_at > SECONDS_BEFORE_A_SECOND_SIGNAL_COUNTS:
            os._exit(ExitCode.STOPPED)
        return
    Ending.stopped = Stopped("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
    Ending.stopped_at = time.monotonic()
    for_sure = threading.Timer(SECONDS_TO_END, _end_for_sure)
    for_sure.daemon = True
    for_sure.start()
    raise Ending.stopped


def _end_for_sure() -> None:
    """A library may have swallowed the exception, or the main thread waits in a collective for a rank that has
    ended."""
    _say_stopped(Ending.stopped.name)
    os._exit(ExitCode.STOPPED)


def _say_stopped(name: str) -> None:
    if environment.rank() == 0 and not Ending.said:
        Ending.said = True
        _say(
            "stopped",
            f"{name} ended `safecl {Ending.verb}`; files that were finished are kept, and the same command starts it again",
        )


def _on_signal(number: int, handler: Any) -> Any:
    """Sets the handler and returns the one before."""
    with contextlib.suppress(ValueError):  # outside the main thread signals cannot be handled, nor do they arrive there
        return signal.signal(number, handler)


def _say(kind: str, message: str) -> None:
    if rank := environment.rank():
        _on_signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SECONDS_FOR_RANK_0)
        kind = f"{kind} on rank {rank}"
    style = "yellow" if kind == "stopped" else "bold red"
    stderr.print(Text(f"safecl: {kind}: ", style=style).append(Text(message, style="default not bold")))


def _describe(verb: str, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return f"{error.filename or 'the disk'}: {error.strerror}; where that is mended, the same command goes on"
    if type(error).__name__ in _FORESEEN and not Ending.show_traceback:
        return str(error)
    first_line = (str(error).strip() or "no message").splitlines()[0]
    lines = [f"`safecl {verb}` ended with {type(error).__name__}: {first_line}"]
    if hint := _HINTS.get(type(error).__name__):
        lines.append(f"What helps: {hint}.")
    if Ending.show_traceback:
        return "\n".join([traceback.format_exc(), *lines])
    return "\n".join([*lines, f"The traceback is in {_write_traceback()}; `--traceback` prints it here."])


def _write_traceback() -> Path:
    name = f"error-rank{environment.rank()}.txt"
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{traceback.format_exc()}"
    if Ending.run_folder is not None:
        with contextlib.suppress(OSError):
            Ending.run_folder.mkdir(parents=True, exist_ok=True)
            (Ending.run_folder / name).write_text(text, encoding="utf-8")
            return Ending.run_folder / name
    path = Path(tempfile.mkdtemp(prefix="safecl-")) / name
    path.write_text(text, encoding="utf-8")
    return path
