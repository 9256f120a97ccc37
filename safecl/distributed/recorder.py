"""The collective calls of this process, read from torch's flight recorder and process groups."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_BACKGROUND: set[str] = set()
"""Names of groups that a thread uses beside the training's collectives."""


@dataclass(frozen=True)
class LastCollective:
    """The last collective call of the main thread: its name where it is known, and its number over all groups."""

    name: str = ""
    number: int = 0
    waits: bool = False

    def __str__(self) -> str:
        if not self.number:
            return ""
        return f"{self.name}, number {self.number}" if self.name else f"number {self.number}"


def switch_on() -> None:
    """Let torch record collective calls, before the first process group is made. A user's own setting stays."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "200")


def groups() -> Iterator[dist.ProcessGroup]:
    """Yield the process groups of the main thread."""
    if dist.is_initialized():
        for group in list(distributed_c10d._world.pg_map):
            if group.group_name not in _BACKGROUND:
                yield group


def background_group() -> dist.ProcessGroup:
    """Make a gloo group of all ranks for a thread. A collective call."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo")
    _BACKGROUND.add(group.group_name)
    return group


def set_timeout(group: dist.ProcessGroup, seconds: float) -> None:
    """Let the calls of a group that begin from now on fail after this time."""
    distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


@contextlib.contextmanager
def default_timeout(seconds: float) -> Iterator[None]:
    """Let the calls of groups that others make in the `with` block fail after this time, where they name none.

    torch's own default is 10 minutes with NCCL and 30 with gloo, whatever the other groups have.
    """
    torchs = distributed_c10d._get_default_timeout
    distributed_c10d._get_default_timeout = lambda backend: timedelta(seconds=seconds)
    try:
        yield
    finally:
        distributed_c10d._get_default_timeout = torchs


def last_collective(*, only_running: bool) -> LastCollective:
    """Return the last collective call. only_running: name it only where it is not finished, which is cheaper."""
    number = sum(_number_of(group) for group in groups())
    calls = [call for call in _calls(only_running) if call["process_group"][0] not in _BACKGROUND]
    if not calls:
        return LastCollective("", number)
    last = max(calls, key=lambda call: int(call["record_id"]))
    return LastCollective(str(last["profiling_name"]).partition(":")[2], number, not last["retired"])


def _number_of(group: Any) -> int:
    return int(group._get_sequence_number_for_group())


def _calls(only_running: bool) -> list[dict[str, Any]]:
    try:
        return list(json.loads(_dump(True, only_running)).get("entries", []))
    except ValueError:
        return []


def flight_records() -> bytes:
    """Return the last collective calls of all groups, as JSON."""
    return _dump(True, False)


def _dump(collectives: bool, only_active: bool) -> bytes:
    module = torch._C._distributed_c10d
    dump = getattr(module, "_dump_fr_trace_json", None) or getattr(module, "_dump_nccl_trace_json", None)
    found = dump(collectives, only_active) if dump is not None else "{}"
    return found.encode() if isinstance(found, str) else bytes(found)
