"""Process groups without surprises: gloo on CPU, NCCL on GPUs, and no just-in-time builds on the way."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from safecl.distributed import environment


def init_distributed() -> None:
    """Creates the process group once; a group that is there already is used."""
    environment.join_launcher()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    _quiet()

    # DeepSpeed compiles a shared-memory all-reduce at its first CPU start-up (24 to 85 s, and again whenever another
    # project used the cache with other flags); gloo does the same work.
    __compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)


def _quiet() -> None:
    """A run says what its user needs; the libraries' start-up chatter stays out of it. Errors still show."""
    import logging
    import warnings

    from deepspeed.utils.logging import logger
    from transformers.utils import logging as transformers_logging

    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch|deepspeed|transformers")
    warnings.filterwarnings(
        "ignore", message=r".*(c10d|all_gather_object|reduce_scatter|all_gather).*", module=r"torch"
    )


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
    """True on every rank where any rank says true."""
    if world_size() == 1:
        return flag
    value = torch.tensor([int(flag)], device=device())
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def gather_objects(items: list) -> list:
    """Concatenation of all ranks' lists, in rank order, on every rank."""
    if world_size() == 1:
        return list(items)
    parts: list[list] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


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
