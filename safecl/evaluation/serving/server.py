"""A vLLM server of one model folder: its process, from the start until it has ended.

vLLM is not imported: `vllm serve FOLDER` runs as a process of its own, and answers over HTTP on one port.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safecl.config import ConfigError, VllmConfig
from safecl.distributed import environment, progress
from safecl.storage.model_folder import adapter_base, is_adapter

VLLM_LOG = Path("logs") / "vllm.log"
"""The file of the run folder that holds what the server prints."""
NAME = "model"
"""The name under which the server answers for the folder."""
SECONDS_TO_END = 20.0
_PR_SET_PDEATHSIG = 1


class ServerFailed(RuntimeError):
    """The server did not start, or an answer of it cannot be used."""


@dataclass(frozen=True)
class Address:
    """The address of a server, and the key that its requests carry."""

    url: str
    key: str


def vllm_program() -> str:
    """Return the path of `vllm`, beside this Python or on the PATH. Raises ConfigError where there is none."""
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.is_file() else shutil.which("vllm")
    if found is None:
        raise ConfigError("safety.backend: vllm needs the program `vllm`; pip install vllm, or set backend: model")
    return found


@contextlib.contextmanager
def serving(folder: str | Path, settings: VllmConfig, log: Path, host: str = "127.0.0.1") -> Iterator[Address]:
    """Serve a model folder while the `with` block runs. Raises ServerFailed where the server does not start.

    log: file for what the server prints. host: the address that it listens on.
    """
    address = Address(f"http://{host}:{environment.free_port()}", secrets.token_hex(16))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            _command(folder, settings, address),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(address.key),
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
    try:
        _wait_until_ready(process, address, settings.start_timeout, log)
        yield address
    finally:
        _end(process)


def _command(folder: str | Path, settings: VllmConfig, address: Address) -> list[str]:
    host, port = address.url.removeprefix("http://").rsplit(":", 1)
    command = [vllm_program(), "serve", *_model(folder), "--host", host, "--port", port]
    given = {argument.partition("=")[0] for argument in settings.arguments}
    if "--gpu-memory-utilization" not in given and (share := _free_share()) is not None:
        command += ["--gpu-memory-utilization", f"{share:.2f}"]
    return command + settings.arguments


def _model(folder: str | Path) -> list[str]:
    """Return the arguments that name the model: a folder, or an adapter on its base."""
    if not is_adapter(str(folder)):
        return [str(folder), "--served-model-name", NAME]
    rank = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    lora = ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{NAME}={folder}"]
    return [adapter_base(str(folder)), *lora]


def _free_share() -> float | None:
    """Return nine tenths of the share of this GPU's memory that is free; None without a GPU."""
    from safecl.distributed import devices

    if not devices.on_gpu():
        return None
    import torch

    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return 0.9 * free / total


def _environment(key: str) -> dict[str, str]:
    """Return the environment of the server: this one's, without what launchers say of ranks. The key is not on the
    command line, which every user of the machine can read."""
    return environment.without_launcher() | {"VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1"}


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_until_ready(process: subprocess.Popen[bytes], address: Address, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerFailed(f"vllm ended with {process.returncode}: {_last_line(log)}; {log} has all that it said")
        with contextlib.suppress(OSError, urllib.error.URLError):
            with urllib.request.urlopen(f"{address.url}/health", timeout=5):
                return
        progress.beat()
        time.sleep(0.2)
    raise ServerFailed(
        f"vllm was not ready after {seconds:.0f} s; {log} has what it said, and safety.vllm.start_timeout gives it more"
    )


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and the processes that it has started."""
    for number, seconds in ((signal.SIGTERM, SECONDS_TO_END), (signal.SIGKILL, SECONDS_TO_END)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        _wait(lambda: process.poll() is not None, seconds)
        if process.poll() is not None and not _group_lives(process.pid):
            return


def _group_lives(group: int) -> bool:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, 0)
        return True
    return False


def _wait(until: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not until():
        progress.beat()
        time.sleep(0.05)
