"""The end of a verb: exit codes, and messages instead of tracebacks.

0 done, 1 failed while running, 2 wrong config or usage, 3 a safety gate that was not passed, an upload that the scan
refused, or a sweep without a run within its limits, 75 stopped by a signal (EX_TEMPFAIL).
"""

from __future__ import annotations

import atexit
import contextlib
import enum
import errno
import os
import re
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import typer

from safecl.config import ConfigError
from safecl.config.secrets import hide_secrets
from safecl.config.texts import visible
from safecl.distributed import environment, rank_files
from safecl.distributed.signals import StopSignals, name_of, set_handler
from safecl.storage.sizes import format_bytes, memory_text
from safecl.terminal import Terminal, plain


class ExitCode(enum.IntEnum):
    """The exit codes of safecl's commands."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    GATE = 3
    STOPPED = 75


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end. It is not an Exception, so that no `except Exception` swallows it."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


@dataclass
class Tracebacks:
    """The place for the traceback of an unexpected error: a file in `folder` (None: in a temporary folder), or the
    message."""

    folder: Path | None = None
    in_message: bool = False
    needs: Callable[[], str] | None = None
    """What the run needs of memory, in words."""


tracebacks = Tracebacks()
stderr = Terminal(stderr=True)

# A launcher ends all ranks as soon as one fails. The other ranks wait this long before they report an error, so they
# report only where rank 0 had nothing to report.
SECONDS_FOR_RANK_0 = 3.0
SECONDS_TO_END = 5.0

_HINTS = {
    "OutOfMemoryError": "less memory: a smaller train.tokens_per_microbatch, a higher deepspeed.stage, or "
    "deepspeed.offload.optimizer=cpu",
    "MemoryError": "less host memory: fewer ranks on this machine, a smaller train.tokens_per_microbatch, or a higher "
    "limit",
}

_FORESEEN = ("TrainingFailed", "ExportFailed", "RanksMissing", "ServerFailed")
"""Errors whose messages need no traceback; by name, because their modules import torch."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_NO_FILES = (errno.EMFILE, errno.ENFILE)
_NO_MEMORY = re.compile("can't allocate memory|not enough memory|can't start new thread|std::bad_alloc|Cannot allocate")


# -------------------------------------------------------------------------------------------------------------- endings


@contextlib.contextmanager
def endings_as_exit_codes(verb: str) -> Iterator[None]:
    """Run a verb's body; every way it can end becomes an exit code and, where something is wrong, a message."""
    stop = _Stop(verb)
    with StopSignals(stop.raise_stopped, lambda _: rank_files.leave(ExitCode.STOPPED)):
        try:
            with errors_as_messages(verb), stop.errors_taken_back():
                yield
        except KeyboardInterrupt as error:
            stop.report(error.name if isinstance(error, Stopped) else "Ctrl-C")
            raise SystemExit(ExitCode.STOPPED) from None


@contextlib.contextmanager
def errors_as_messages(verb: str) -> Iterator[None]:
    """Turn errors into a message and SystemExit; signals pass."""
    try:
        yield
    except (BrokenPipeError, typer.Exit):
        raise
    except Exception as error:
        is_usage = isinstance(error, ConfigError) or getattr(error, "errno", None) == errno.ENAMETOOLONG
        code = ExitCode.USAGE if is_usage else ExitCode.FAILED
        rank_files.write_code(code)  # a launcher may end this rank while it waits for the report of rank 0
        _report("error" if is_usage else "failed", str(error) if is_usage else _describe(verb, error))
        raise SystemExit(code) from None


def end_undisturbed() -> None:
    """Let a verb that is done end with its own exit code: a launcher sends SIGTERM to all ranks as soon as the first
    has ended."""
    set_handler(signal.SIGTERM, signal.SIG_IGN)


def end_process(code: object) -> None:
    """End this process at once after its last line: threads are waited for and what is registered for the end runs, but
    the interpreter does not take the loaded libraries apart, which costs a second of CPU time with torch.

    Returns, for an ordinary end, where the process is one of several ranks, or the code is no number.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1 or not (code is None or isinstance(code, int)):
        return
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(int(code or 0))


class _Stop:
    """The end of a verb by a signal."""

    def __init__(self, verb: str):
        self.verb = verb
        self.error: Stopped | None = None
        self._is_reported = False

    def raise_stopped(self, number: int) -> None:
        self.error = Stopped(name_of(number))
        timer = threading.Timer(SECONDS_TO_END, self._end_for_sure, (self.error.name,))
        timer.daemon = True
        timer.start()
        raise self.error

    @contextlib.contextmanager
    def errors_taken_back(self) -> Iterator[None]:
        """Raise `Stopped` again where a library has turned it into an error of its own, in an import or a callback."""
        try:
            yield
        except BrokenPipeError:
            raise
        except Exception:
            if self.error is not None:
                raise self.error from None
            raise

    def _end_for_sure(self, name: str) -> None:
        """End the process where a library has swallowed the exception, or the main thread waits in a collective call
        for a rank that has ended."""
        self.report(name)
        rank_files.leave(ExitCode.STOPPED)

    def report(self, name: str) -> None:
        if environment.rank() == 0 and not self._is_reported:
            self._is_reported = True
            kept = "files that were finished are kept, and the same command starts it again"
            _report("stopped", f"{name} ended `safecl {self.verb}`; {kept}")


# ------------------------------------------------------------------------------------------------------------- messages


def _report(kind: str, message: str) -> None:
    if rank := environment.rank():
        set_handler(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SECONDS_FOR_RANK_0)
        kind = f"{kind} on rank {rank}"
        rank_files.tell(f"safecl: {kind}: {visible(message)}\n")
    style = "yellow" if kind == "stopped" else "bold red"
    stderr.print(plain(f"safecl: {kind}: ", style).append_text(plain(message, "default not bold")))


def _describe(verb: str, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return f"{error.filename or 'the disk'}: {error.strerror}; once that is fixed, the same command resumes"
    if (isinstance(error, OSError) and error.errno in _NO_FILES) or "EMFILE" in str(error):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"too many open files: {soft} are allowed (ulimit -n, at most {hard}); 1024 are enough for most runs"
    if isinstance(error, FileNotFoundError) and tracebacks.folder is not None and not tracebacks.folder.exists():
        return f"{tracebacks.folder}: the run folder has vanished, with all that was saved in it"
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        return _describe_memory(error)
    if type(error).__name__ in _FORESEEN and not tracebacks.in_message:
        return str(error)
    first_line = (str(error).strip() or "no message").splitlines()[0]
    lines = [f"`safecl {verb}` ended with {type(error).__name__}: {first_line}"]
    if type(error).__name__ == "OutOfMemoryError":
        lines += _device_memory()
    if hint := _HINTS.get(type(error).__name__):
        lines.append(f"What helps: {hint}.")
    if tracebacks.in_message:
        return "\n".join([traceback.format_exc(), *lines])
    return "\n".join([*lines, f"The traceback is in {_write_traceback()}; `--traceback` prints it here."])


def _device_memory() -> list[str]:
    """Say what is free on this rank's device, and what the run was predicted to take."""
    lines = []
    with contextlib.suppress(Exception):
        free, total = sys.modules["torch"].cuda.mem_get_info()
        lines.append(f"{format_bytes(free)} of the device's {format_bytes(total)} are free.")
    with contextlib.suppress(Exception):
        lines += [f"Predicted: {tracebacks.needs()}."] if tracebacks.needs is not None else []
    return lines


def _describe_memory(error: Exception) -> str:
    """Say what is needed and what there is. The process may have no memory left even for that."""
    needed, text = "", "host memory is used up"
    with contextlib.suppress(Exception):
        needed = f"; {tracebacks.needs()}" if tracebacks.needs is not None else ""
    with contextlib.suppress(Exception):
        text = f"host memory is used up ({str(error).strip().splitlines()[0][:120] or type(error).__name__})"
    with contextlib.suppress(Exception):
        text = f"{text}: {memory_text()}{needed}"
    return f"{text}. What helps: {_HINTS['MemoryError']}"


def _write_traceback() -> Path | str:
    name = f"error-rank{environment.rank()}.txt"
    text = hide_secrets(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{traceback.format_exc()}")
    if tracebacks.folder is not None:
        with contextlib.suppress(OSError):
            tracebacks.folder.mkdir(parents=True, exist_ok=True)
            return _write_private(tracebacks.folder / name, text)
    try:
        return _write_private(Path(tempfile.mkdtemp(prefix="safecl-")) / name, text)
    except OSError as error:
        return f"no file (there is no place for one: {error.strerror or error})"


def _write_private(path: Path, text: str) -> Path:
    """Write a file that others cannot read: a traceback may quote what a run works with."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    return path
