"""Starts the command line of a checkout's safecl in one or more processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
CACHE = "cache"
SECONDS = 300.0


@dataclass(frozen=True)
class Ended:
    """The exit code of each rank, and all that they printed."""

    codes: list[int]
    said: str


def run_safecl(
    arguments: Sequence[str],
    folder: Path,
    *,
    ranks: int = 1,
    root: Path = ROOT,
    while_running: Callable[[list[subprocess.Popen]], None] = lambda processes: None,
) -> Ended:
    """Runs `safecl ARGUMENTS` of the checkout `root` inside `folder` and waits for its end.

    Prepared data and artifacts go into the folder as well. `while_running` gets the processes, e.g. to send a signal.
    """
    port = _free_port()
    logs = [folder / f".rank-{rank}.log" for rank in range(ranks)]
    environments = [_environment(root, rank, ranks, port) for rank in range(ranks)]
    processes = [_start(arguments, folder, *one) for one in zip(environments, logs, strict=True)]
    try:
        while_running(processes)
        codes = [process.wait(SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = "".join(log.read_text(encoding="utf-8", errors="replace") for log in logs)
    for log in logs:
        log.unlink()
    return Ended(codes, said)


def _environment(root: Path, rank: int, ranks: int, port: int) -> dict[str, str]:
    """This process's variables, with those that a launcher sets where there are several ranks."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    kept |= {"PYTHONPATH": str(root), "SAFECL_CACHE": CACHE, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    kept |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    kept |= {"PYTHONHASHSEED": "0"}  # some files list a set, e.g. the modules in peft's adapter_config.json
    values = (rank, ranks, rank, ranks, "127.0.0.1", port)
    return kept | dict(zip(LAUNCHER, map(str, values), strict=True)) if ranks > 1 else kept


def _start(arguments: Sequence[str], folder: Path, environment: dict[str, str], log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "safecl", *arguments]
    with log.open("wb") as output:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
