"""The device of a rank. One rule decides device, collectives and page-locked memory: DeepSpeed's accelerator.

DeepSpeed chooses it when it is imported: the environment variable DS_ACCELERATOR (`cuda` or `cpu`), or else a GPU where
torch sees one. So a run on the CPU of a machine with GPUs touches no GPU anywhere.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

import torch

from safecl.config import ConfigError

SUPPORTED = ("cuda", "cpu")


def accelerator(environ: MutableMapping[str, str] = os.environ) -> str:
    """Return `cuda` or `cpu`: DeepSpeed's choice, or the one that it will make when it is imported."""
    deepspeed = sys.modules.get("deepspeed.accelerator")
    if (chosen := getattr(deepspeed, "get_accelerator", None)) is not None:
        return str(chosen().device_name())
    return environ.get("DS_ACCELERATOR") or ("cuda" if torch.cuda.is_available() else "cpu")


def on_gpu() -> bool:
    """True where ranks compute on GPUs."""
    return accelerator() == "cuda" and torch.cuda.is_available()


def backend() -> str:
    """Return the back end of collective calls on the ranks' devices."""
    return "nccl" if on_gpu() else "gloo"


def device() -> torch.device:
    """Return this rank's device."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else torch.device("cpu")


def settle(environ: MutableMapping[str, str] = os.environ) -> None:
    """Fix the accelerator for DeepSpeed and make this rank's GPU the current one. Raises ConfigError for an accelerator
    that safecl does not know or that is not there, and for a rank without a GPU.

    Where a task sees one GPU only (`srun --gpus-per-task=1`), that is its own: LOCAL_RANK, by which DeepSpeed numbers
    devices, becomes 0.
    """
    name = environ.setdefault("DS_ACCELERATOR", accelerator(environ))
    if name not in SUPPORTED:
        raise ConfigError(f"environment: DS_ACCELERATOR={name}: safecl runs on {' and '.join(SUPPORTED)}")
    if name == "cpu":
        return
    if not torch.cuda.is_available():
        raise ConfigError(
            "environment: DS_ACCELERATOR=cuda, but torch sees no GPU; unset it, or set it to cpu, to run on the CPU"
        )
    rank, count = int(environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
    if rank >= count > 1:
        raise ConfigError(
            f"environment: LOCAL_RANK is {rank}, but this process sees {count} GPUs; start at most {count} ranks on "
            "this node, or give each task one GPU of its own (srun --gpus-per-task=1)"
        )
    if count == 1:
        environ["LOCAL_RANK"] = "0"
    torch.cuda.set_device(0 if count == 1 else rank)


def name_of_gpu() -> str:
    """Return a name that no other GPU in the world has."""
    import socket

    index = torch.cuda.current_device()
    unique = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return str(unique) if unique is not None else f"{socket.gethostname()}, GPU {index}"
