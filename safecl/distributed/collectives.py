"""Process groups and collective calls, which also work in one process without a group.

Tensors go through the ranks' own devices (NCCL on GPUs, gloo on CPUs), where a call that takes longer than
START_TIMEOUT fails: a rank is lost. Objects, errors and barriers go through a gloo group of their own, which waits for
PATIENCE: there ranks wait for the work of another, such as tokenising a file or writing a model to slow storage.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from safecl.config import ConfigError
from safecl.distributed import devices, environment, recorder
from safecl.distributed.devices import device
from safecl.distributed.library_warnings import hide_future_warnings
from safecl.distributed.progress import PROGRESS

__all__ = [
    "PATIENCE", "START_TIMEOUT", "all_reduce_sum", "any_rank", "barrier", "device", "gather_objects", "gather_tensors",
    "init_distributed", "on_every_rank", "on_first_rank", "patient_group", "process_group", "rank",
    "timeout_of_collectives", "timeout_of_phase", "world_size",
]  # fmt: skip

T = TypeVar("T")
Errors = tuple[type[Exception], ...]

START_TIMEOUT = timedelta(seconds=300)
"""Longest collective call on tensors, until a run knows how long its steps take."""
PATIENCE = timedelta(hours=6)
"""Longest time that ranks wait for the work of another."""
SECONDS_AFTER_THE_WATCHDOG = 30.0
"""Collective calls fail by themselves this long after the watchdog should have ended the job."""

_patient: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
"""The group of all ranks, and the patient gloo group beside it."""


def init_distributed() -> None:
    """Start DeepSpeed's process group, or use the group that is there already. Raises ConfigError where the launcher's
    variables, the accelerator or this rank's GPU are not usable."""
    environment.join_launcher()
    devices.settle()
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    _quiet()

    # DeepSpeed compiles a shared-memory all-reduce at its first CPU start-up (24 to 85 s, and again whenever another
    # project used the cache with other flags); gloo does the same work.
    __compatible_ops__["deepspeed_shm_comm"] = False
    recorder.switch_on()
    with _missing_ranks_named(), _everybody_there():
        deepspeed.init_distributed(dist_backend=devices.backend(), timeout=_start_timeout(), verbose=False)
    _refuse_shared_gpus()


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Keep a process group without DeepSpeed for the `with` block; a single process needs none, and a group that is
    there already is used."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1 or dist.is_initialized():
        yield
        return
    devices.settle()
    recorder.switch_on()
    with _missing_ranks_named(), _everybody_there():
        dist.init_process_group(devices.backend(), timeout=_start_timeout())
    try:
        _refuse_shared_gpus()
        yield
    finally:
        dist.destroy_process_group()


def _refuse_shared_gpus() -> None:
    """Raise ConfigError on all ranks where two ranks use one GPU, which NCCL would report without saying how it came
    about. A collective call."""
    if not devices.on_gpu() or world_size() == 1:
        return
    owners: dict[str, int] = {}
    for number, gpu in enumerate(gather_objects([devices.name_of_gpu()])):
        if gpu in owners:
            raise ConfigError(
                f"environment: ranks {owners[gpu]} and {number} have the same GPU ({gpu}); start one rank per GPU, "
                "for example torchrun --nproc-per-node=gpu -m safecl train CFG"
            )
        owners[gpu] = number


class RanksMissing(RuntimeError):
    """Not all ranks have joined the process group in time."""


@contextlib.contextmanager
def _missing_ranks_named() -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        first_line = str(error).strip().splitlines()[0]
        raise RanksMissing(
            f"rank {environment.rank()} has not found the others: {first_line}. Each of the "
            f"{os.environ.get('WORLD_SIZE')} ranks must run, and reach {_meeting_place()}"
        ) from error


@contextlib.contextmanager
def _everybody_there() -> Iterator[None]:
    """Wait until all ranks have left their host's name in the store that the process group will use. Raises
    RanksMissing with the ranks that have not; DistError where the store cannot be reached."""
    ranks, own, port = int(os.environ.get("WORLD_SIZE") or 1), environment.rank(), os.environ.get("MASTER_PORT", "")
    if ranks == 1 or dist.is_initialized() or not port.isdecimal() or "MASTER_ADDR" not in os.environ:
        yield
        return
    serves = own == 0 and not environment.launcher_keeps_store()
    # Rank 0's server is shared with the process group, and lives as long as this variable.
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(port), ranks,
        is_master=serves, timeout=_start_timeout(), wait_for_workers=False, multi_tenant=True,
    )  # fmt: skip
    keys = [f"safecl-joined/{rank}" for rank in range(ranks)]
    store.set(keys[own], platform.node())
    try:
        store.wait(keys, _start_timeout())
    except dist.DistError as error:
        raise RanksMissing(_who_is_there(store, keys, error)) from error
    yield


def _who_is_there(store: dist.Store, keys: list[str], error: Exception) -> str:
    """Say which ranks have joined, on which hosts, and which have not."""
    try:
        hosts = {rank: store.get(key).decode() for rank, key in enumerate(keys) if store.check([key])}
    except dist.DistError:  # the store has ended with the process that kept it
        return (
            f"{_meeting_place()} has ended while ranks were missing: {str(error).strip().splitlines()[0]}. Its own "
            "message may name them"
        )
    missing = [str(rank) for rank in range(len(keys)) if rank not in hosts]
    there = "; ".join(
        f"{_ranks([str(rank) for rank, host in hosts.items() if host == name])} on {name}"
        for name in dict.fromkeys(hosts.values())
    )
    return (
        f"{_ranks(missing)} of {len(keys)} {'has' if len(missing) == 1 else 'have'} not joined within "
        f"{_start_timeout().total_seconds():.0f} s; there: {there}. Each must run, and reach {_meeting_place()}"
    )


def _meeting_place() -> str:
    keeper = "torchrun" if environment.launcher_keeps_store() else "rank 0"
    return f"{keeper} at {os.environ.get('MASTER_ADDR')}, port {os.environ.get('MASTER_PORT')}"


def _ranks(numbers: list[str]) -> str:
    return f"rank{'s' * (len(numbers) != 1)} {', '.join(numbers)}"


def _start_timeout() -> timedelta:
    return timedelta(seconds=timeout_of_collectives(START_TIMEOUT.total_seconds()))


def timeout_of_collectives(seconds: float) -> float:
    """Seconds after which a collective call fails: DEEPSPEED_TIMEOUT (in minutes) where it is set, else `seconds`,
    rounded up to whole tens and at most a week."""
    with contextlib.suppress(ValueError):
        return 60.0 * float(os.environ.get("DEEPSPEED_TIMEOUT", ""))
    return min(10.0 * math.ceil(seconds / 10), 7 * 86400.0) if seconds < math.inf else 7 * 86400.0


def timeout_of_phase() -> float:
    """Seconds after which a collective call of the current phase fails."""
    return timeout_of_collectives(PROGRESS.limit() + SECONDS_AFTER_THE_WATCHDOG)


def patient_group() -> dist.ProcessGroup | None:
    """Return the gloo group of all ranks that waits for PATIENCE; None without ranks. The first call is collective."""
    global _patient
    everybody = dist.group.WORLD
    if world_size() == 1 or everybody is None:
        return None
    if _patient is None or _patient[0] is not everybody:
        _patient = everybody, dist.new_group(backend="gloo", timeout=PATIENCE)
    return _patient[1]


def _quiet() -> None:
    """Silence the libraries' start-up messages. Their errors still show."""
    import logging
    import warnings

    from deepspeed.utils.logging import logger
    from transformers.utils import logging as transformers_logging

    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it has no annotations
    hide_future_warnings()
    warnings.filterwarnings(
        "ignore", message=r".*(c10d|all_gather_object|reduce_scatter|all_gather).*", module=r"torch"
    )


# ------------------------------------------------------------------------------------------------------------- tensors


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def any_rank(flag: bool) -> bool:
    """True on every rank where any rank passes True."""
    if world_size() == 1:
        return flag
    value = torch.tensor([int(flag)])
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=patient_group())
    return bool(value.item())


def gather_tensors(values: torch.Tensor) -> torch.Tensor:
    """All ranks' tensors of one shape, stacked: [ranks, ...]."""
    if world_size() == 1:
        return values[None]
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values)
    return torch.stack(parts)


def barrier() -> None:
    """Wait for all ranks, also for one that works for hours."""
    if world_size() > 1:
        dist.barrier(group=patient_group())


# -------------------------------------------------------------------------------------------------- objects and errors


def gather_objects(items: list[T]) -> list[T]:
    """All ranks' lists joined in rank order, on every rank."""
    if world_size() == 1:
        return list(items)
    parts: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, items, group=patient_group())
    return [item for part in parts for item in part]


def on_first_rank(work: Callable[[], T], errors: Errors = (), failure: Callable[[str], Exception] = RuntimeError) -> T:
    """Do `work` on rank 0 and return its value on every rank. A collective call: one gather of objects.

    Where `work` raises one of `errors`, every rank raises `failure` of its message. Other errors are raised on rank 0
    only.
    """
    found: tuple[T | None, str | None] = (None, None)
    if rank() == 0:
        found = _attempt(work, errors)
    return _value_or_raise(*gather_objects([found])[0], failure)


def on_every_rank(work: Callable[[], T], errors: Errors = (), failure: Callable[[str], Exception] = RuntimeError) -> T:
    """Do `work` on every rank and return each rank's own value. A collective call: one gather of objects.

    Where `work` raises one of `errors` on any rank, every rank raises `failure` of the first such rank's message. Other
    errors are raised on their rank only.
    """
    value, problem = _attempt(work, errors)
    problems = [each for each in gather_objects([problem]) if each is not None]
    return _value_or_raise(value, problems[0] if problems else None, failure)


def _attempt(work: Callable[[], T], errors: Errors) -> tuple[T | None, str | None]:
    """(value of the work, None), or (None, message of its error)."""
    try:
        return work(), None
    except errors as error:
        return None, str(error)


def _value_or_raise(value: T | None, problem: str | None, failure: Callable[[str], Exception]) -> T:
    if problem is not None:
        raise failure(problem)
    return cast(T, value)
