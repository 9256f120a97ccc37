"""Process groups (gloo on CPU, NCCL on GPUs) and collective calls that also work in one process without a group."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from safecl.distributed import environment

T = TypeVar("T")
Errors = tuple[type[Exception], ...]


def init_distributed() -> None:
    """Start DeepSpeed's process group, or use the group that is there already."""
    environment.join_launcher()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    _quiet()

    # DeepSpeed compiles a shared-memory all-reduce at its first CPU start-up (24 to 85 s, and again whenever another
    # project used the cache with other flags); gloo does the same work.
    __compatible_ops__["deepspeed_shm_comm"] = False
    _choose_device()
    deepspeed.init_distributed(dist_backend=_backend(), verbose=False)


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Keep a process group without DeepSpeed for the `with` block; a single process needs none, and a group that is
    there already is used."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1 or dist.is_initialized():
        yield
        return
    _choose_device()
    dist.init_process_group(_backend())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _choose_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def _quiet() -> None:
    """Silence the libraries' start-up messages. Their errors still show."""
    import logging
    import warnings

    from deepspeed.utils.logging import logger
    from transformers.utils import logging as transformers_logging

    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it has no annotations
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch|deepspeed|transformers")
    warnings.filterwarnings(
        "ignore", message=r".*(c10d|all_gather_object|reduce_scatter|all_gather).*", module=r"torch"
    )


# ------------------------------------------------------------------------------------------------------------- tensors


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def any_rank(flag: bool) -> bool:
    """True on every rank where any rank passes True."""
    if world_size() == 1:
        return flag
    value = torch.tensor([int(flag)], device=device())
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def gather_tensors(values: torch.Tensor) -> torch.Tensor:
    """All ranks' tensors of one shape, stacked: [ranks, ...]."""
    if world_size() == 1:
        return values[None]
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values)
    return torch.stack(parts)


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


# -------------------------------------------------------------------------------------------------- objects and errors


def gather_objects(items: list[T]) -> list[T]:
    """All ranks' lists joined in rank order, on every rank."""
    if world_size() == 1:
        return list(items)
    parts: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, items)
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
