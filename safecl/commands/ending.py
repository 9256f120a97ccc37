"""How a verb ends: exit codes, and errors told as messages instead of tracebacks.

0 done, 1 failed while running, 2 wrong config or usage, 3 safety gate failed or undecided, 75 stopped by a signal (EX_TEMPFAIL).
"""

from __future__ import annotations

import contextlib
import enum
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from safecl import launcher
from safecl.config import ConfigError


class ExitCode(enum.IntEnum):
    """What the shell gets."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    GATE = 3
    STOPPED = 75


class Stopped(BaseException):
    """A signal asked this process to end. Not an Exception, so that no `except Exception` on the way swallows it."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


class Ending:
    """Where a failing verb writes its traceback, and whether it prints it too."""

    run_folder: Path | None = None
    show_traceback: bool = False


stderr = Console(stderr=True, highlight=False, soft_wrap=True)

# A launcher ends all ranks as soon as one fails. A rank that waits this long before it speaks is heard only when rank 0 had nothing to say.
SECONDS_FOR_RANK_0 = 3.0

_HINTS = {
    "OutOfMemoryError": "less memory: a smaller train.tokens_per_microbatch, a higher deepspeed.stage, or deepspeed.offload.optimizer=cpu",
    "MemoryError": "less host memory: fewer ranks on this machine, or a smaller train.tokens_per_microbatch",
}


@contextlib.contextmanager
def told_as_messages(verb: str) -> Iterator[None]:
    """Runs a verb's body; every way it can end becomes an exit code and, where something is wrong, a message."""
    before = _on_sigterm(_stop)
    try:
        yield
    except ConfigError as error:
        _say("error", str(error))
        raise typer.Exit(ExitCode.USAGE) from None
    except (KeyboardInterrupt, Stopped) as stop:
        name = stop.name if isinstance(stop, Stopped) else "Ctrl-C"
        _say("stopped", f"{name} ended `safecl {verb}`; files that were finished are kept, and the same command starts it again")
        raise typer.Exit(ExitCode.STOPPED) from None
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except Exception as error:
        _say("failed", _describe(verb, error))
        raise typer.Exit(ExitCode.FAILED) from None
    finally:
        _on_sigterm(before)


def _stop(number: int, _frame: object) -> None:
    raise Stopped(signal.Signals(number).name)


def _on_sigterm(handler: Any) -> Any:
    """Sets the handler and returns the one before."""
    with contextlib.suppress(ValueError):  # outside the main thread signals cannot be handled, nor do they arrive there
        return signal.signal(signal.SIGTERM, handler)


def _say(kind: str, message: str) -> None:
    if rank := launcher.rank():
        if kind == "stopped":  # rank 0 was stopped as well
            return
        _on_sigterm(signal.SIG_DFL)
        time.sleep(SECONDS_FOR_RANK_0)
        kind = f"{kind} on rank {rank}"
    style = "yellow" if kind == "stopped" else "bold red"
    stderr.print(Text(f"safecl: {kind}: ", style=style).append(Text(message, style="default not bold")))


def _describe(verb: str, error: Exception) -> str:
    first_line = (str(error).strip() or "no message").splitlines()[0]
    lines = [f"`safecl {verb}` ended with {type(error).__name__}: {first_line}"]
    if hint := _HINTS.get(type(error).__name__):
        lines.append(f"What helps: {hint}.")
    if Ending.show_traceback:
        return "\n".join([traceback.format_exc(), *lines])
    return "\n".join([*lines, f"The traceback is in {_write_traceback()}; `--traceback` prints it here."])


def _write_traceback() -> Path:
    name = f"error-rank{launcher.rank()}.txt"
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{traceback.format_exc()}"
    if Ending.run_folder is not None:
        with contextlib.suppress(OSError):
            Ending.run_folder.mkdir(parents=True, exist_ok=True)
            (Ending.run_folder / name).write_text(text, encoding="utf-8")
            return Ending.run_folder / name
    path = Path(tempfile.mkdtemp(prefix="safecl-")) / name
    path.write_text(text, encoding="utf-8")
    return path
