"""Runs programs that a model has written, each in a process of its own that can only compute (`confined.py`).

No network, no new processes, no writing; limits of memory and time; no environment. Where these cannot be set nothing
is run.
"""

from __future__ import annotations

import functools
import json
import math
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from safecl.config import ConfigError

CONFINED: Final = Path(__file__).with_name("confined.py")
FILE_BYTES: Final = 2**20
PASSED: Final = "passed"


class RunLimits(NamedTuple):
    """CPU seconds and MiB of memory of one program."""

    seconds: float = 10.0
    memory: int = 1024

    @property
    def by_the_clock(self) -> float:
        """Seconds after which a program that waits is ended."""
        return 3 * self.seconds + 5


def run_program(program: str, limits: RunLimits) -> str:
    """Run a program. Returns `passed` where it ran to its end, else what became of it: the name of an error, `time`, or
    `killed`. Raises ConfigError where it cannot be confined."""
    token, (reading, writing) = secrets.token_hex(16), os.pipe()
    numbers = (writing, limits.memory, math.ceil(limits.seconds), FILE_BYTES)
    command = [sys.executable, "-I", "-S", "-B", str(CONFINED), *map(str, numbers)]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
            pass_fds=(writing,),
            start_new_session=True,
        )
        os.close(writing)
        try:
            process.communicate(f"{token}\n{program}".encode("utf-8", "replace"), timeout=limits.by_the_clock)
        except subprocess.TimeoutExpired:
            return "time"
        finally:
            process.kill()
            process.wait()
        with os.fdopen(reading, "rb", closefd=False) as file:
            return _outcome(file.read(), token, process.returncode)
    finally:
        os.close(reading)


def _outcome(said: bytes, token: str, code: int) -> str:
    try:
        found = json.loads(said)
    except ValueError:
        return "time" if code == -24 else "killed"  # SIGXCPU
    if not isinstance(found, Mapping):
        return "killed"
    if "refused" in found:
        raise ConfigError(f"programs cannot be confined here: {found['refused']}")
    return PASSED if found.get("done") == token else str(found.get("error", "killed"))


_TRIAL = "import os, socket\ntry:\n    {}\nexcept {}:\n    pass\nelse:\n    raise RuntimeError"
TRIALS: Final = {
    "open a connection": _TRIAL.format("socket.socket()", "PermissionError"),
    "write a file": _TRIAL.format("open('/tmp/safecl-trial', 'w')", "PermissionError"),
    "remove a file": _TRIAL.format("os.unlink('/tmp/safecl-trial')", "PermissionError"),
    "start a process": _TRIAL.format("os.fork()", "PermissionError"),
    "end another process": _TRIAL.format("os.kill(os.getppid(), 0)", "PermissionError"),
    "take more memory than it may": _TRIAL.format("bytearray(2**40)", "MemoryError"),
}
"""Programs that pass where they are kept from what their name says."""


@functools.cache
def check_sandbox() -> None:
    """Try the limits out. Raises ConfigError that names the one that does not hold."""
    limits = RunLimits()
    why = "the metric pass@1 runs what the model writes, and "
    try:
        for what, program in TRIALS.items():
            if (outcome := run_program(program, limits)) != PASSED:
                raise ConfigError(f"a program could {what} here ({outcome})")
        if (outcome := run_program("assert sum(range(5)) == 10", limits)) != PASSED:
            raise ConfigError(f"no program can be run under the limits here ({outcome})")
    except (ConfigError, OSError) as error:
        raise ConfigError(f"{why}{error}; use another metric") from None
