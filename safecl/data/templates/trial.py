"""Tries a tokenizer and its chat template in a child process, which may neither run nor grow without limit.

A template is a program and a normaliser can multiply text. Both come with a model, and neither Python nor a signal
interrupts them in the middle of C or Rust code. The child is a fork: it starts at once and shares the loaded tokenizer.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import time
from collections.abc import Callable

SECONDS = 6
MOST_BYTES = 2 * 2**30
"""Memory that the child may take in addition."""
_LONGEST_MESSAGE = 2000


class TooLong(RuntimeError):
    """The work took too long or too much memory."""


def try_in_a_child(work: Callable[[], object]) -> None:
    """Do the work in a fork, and return when it has ended well.

    Raises TooLong, or RuntimeError with the message of the work's own error. On a system without fork it does nothing.
    """
    if not hasattr(os, "fork"):
        return
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _work_and_exit(work, reader, writer)
    os.close(writer)
    try:
        message = _wait(reader)
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if message is None:
        raise TooLong(f"it takes too long: more than {SECONDS} s or {MOST_BYTES // 2**30} GB for a short text")
    if message != "well":
        raise RuntimeError(message)


def _limit(what: int, most: int) -> None:
    """Lower a limit of this process; a lower one stays."""
    _, hard = resource.getrlimit(what)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (most, hard))


def _wait(reader: int) -> str | None:
    """Return what the child has said; None where it was killed, or is at work still."""
    said, deadline = b"", time.monotonic() + SECONDS
    while (rest := deadline - time.monotonic()) > 0 and select.select([reader], [], [], rest)[0]:
        if not (part := os.read(reader, _LONGEST_MESSAGE)):
            break
        said += part
    return said.decode(errors="replace") if said else None


def _work_and_exit(work: Callable[[], object], reader: int, writer: int) -> None:
    message = ""
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.close(reader)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _limit(resource.RLIMIT_AS, used + MOST_BYTES)
        _limit(resource.RLIMIT_CPU, SECONDS)
        _limit(resource.RLIMIT_CORE, 0)
        work()
        message = "well"
    except MemoryError:
        pass
    except BaseException as error:  # nothing of the child may go on in the parent's code
        message = (str(error) or type(error).__name__)[:_LONGEST_MESSAGE]
    finally:
        with contextlib.suppress(BaseException):
            os.write(writer, message.encode(errors="replace"))
        os._exit(0)
