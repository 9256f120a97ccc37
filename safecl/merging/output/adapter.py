"""Writes the result as a LoRA adapter of the base: the truncated singular value decomposition of each weight's change.

    W - W_base = U S V^T  ~  B A,    B = U_r S_r^(1/2),    A = S_r^(1/2) V_r^T

The best approximation of rank r in the Frobenius norm (Eckart and Young, 1936). The decomposition is exact for small
matrices; for large ones it is Halko's randomised one (arXiv 0909.4061) with 16 more directions and 4 power iterations,
which is exact where the change has a rank of at most r + 16. alpha = r, so peft's scaling is 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from safecl.engine.model.dtypes import DTYPE_NAMES, tensor_bytes
from safecl.merging.base import Unmergeable, Weights
from safecl.merging.models.lora import ADAPTER_WEIGHTS, PREFIX
from safecl.storage.durable import write_file
from safecl.storage.model_folder import ADAPTER
from safecl.storage.safetensors_file import header_bytes

OVERSAMPLED, POWER_ITERATIONS = 16, 4
_EXACT_UP_TO = 1024
"""Size of the smaller side up to which the decomposition is exact."""


@dataclass(frozen=True)
class WrittenAdapter:
    """The number of tensors, the file's bytes, and the share of the change that the rank leaves out,
    ||W - W_base - B A|| / ||W - W_base|| over all weights."""

    num_tensors: int
    num_bytes: int
    left_out: float


def write_adapter(
    folder: Path,
    base: Weights,
    base_path: str,
    merged: Callable[[str], torch.Tensor],
    rank: int,
    dtype: torch.dtype,
    progress: Callable[[int], None],
) -> WrittenAdapter:
    """Write adapter_model.safetensors and adapter_config.json.

    merged: returns a tensor of the result, fp32. Raises Unmergeable where something changes that an adapter of linear
    layers cannot hold.
    """
    factors: dict[str, torch.Tensor] = {}
    squares, missed = 0.0, 0.0
    for name, shape in base.shapes.items():
        change = merged(name).sub_(base.read(name))
        progress(change.numel())
        if not bool(change.any()):
            continue
        if len(shape) != 2 or not name.endswith(".weight") or _is_embedding(name):
            raise Unmergeable(
                f"{name}: the merge changes it, and a LoRA adapter holds changes of linear layers only; leave "
                "adapter_rank out to write whole weights"
            )
        a, b = _factors(change, min(rank, *shape), dtype)
        squares += float(change.double().square_().sum())
        missed += float(change.sub_(b.float() @ a.float()).double().square_().sum())
        module = PREFIX + name.removesuffix(".weight")
        factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    if not factors:
        raise Unmergeable("the merge changes no weight of the base, so there is no adapter to write")
    num_bytes = _write(folder, factors, base_path, rank)
    return WrittenAdapter(len(factors), num_bytes, (missed / squares) ** 0.5 if squares else 0.0)


def _is_embedding(name: str) -> bool:
    return name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight"))


def _factors(change: torch.Tensor, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [rank, in] and B [out, rank]."""
    if min(change.shape) <= _EXACT_UP_TO:
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(change, min(rank + OVERSAMPLED, *change.shape), niter=POWER_ITERATIONS)
        vh = v.T
    root = s[:rank].sqrt()
    return (root[:, None] * vh[:rank]).to(dtype), (u[:, :rank] * root).to(dtype)


def _write(folder: Path, factors: Mapping[str, torch.Tensor], base_path: str, rank: int) -> int:
    entries = {name: (DTYPE_NAMES[value.dtype], tuple(value.shape)) for name, value in factors.items()}
    parts = [tensor_bytes(value.contiguous().view(-1)) for value in factors.values()]
    size = write_file(folder / ADAPTER_WEIGHTS, [header_bytes(entries, {"format": "pt"}), *parts]).size
    ranks = {
        name.removeprefix(PREFIX).removesuffix(".lora_A.weight"): value.shape[0]
        for name, value in factors.items()
        if name.endswith(".lora_A.weight")
    }
    smaller = {module: own for module, own in ranks.items() if own != rank}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_path,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(ranks),
    }
    write_file(folder / ADAPTER, [(json.dumps(settings, indent=2) + "\n").encode()])
    return size
