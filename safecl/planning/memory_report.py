"""The memory plan as lines of text, and what to do where it does not fit."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from safecl.config import RunConfig
from safecl.planning.device_memory import MemoryPlan, plan_memory
from safecl.planning.model_shape import ModelShape
from safecl.storage.sizes import format_bytes


def memory_lines(shape: ModelShape, config: RunConfig, teachers: Sequence[ModelShape] = ()) -> list[tuple[str, str]]:
    """(what, value) lines for `safecl check`: on the ranks that are here, then on 8 and on 64."""
    here, device = ranks_here(), "cuda" if _has_gpu() else "cpu"
    planned = lambda ranks, on_node=None: plan_memory(shape, config, ranks, on_node, device=device, teachers=teachers)  # noqa: E731
    plan = planned(here, local_ranks_here())
    lines = [("takes", f"{_totals(plan)}, on {here} rank{'s' if here > 1 else ''}")]
    for where in ("device", "host"):
        items = sorted(plan.at_peak(where), key=lambda item: -item.nbytes)
        if items:
            lines.append((f"  {where}", ", ".join(f"{item.what} {format_bytes(item.nbytes)}" for item in items)))
    lines += [(f"  on {ranks} ranks", _totals(planned(ranks))) for ranks in (8, 64) if ranks > here]
    if (note := _shortage(plan)) is not None:
        lines.append(("  too little", note))
    return lines


def ranks_here() -> int:
    """Ranks of the launcher that started this, else one per GPU."""
    return (
        int(os.environ.get("WORLD_SIZE") or 1)
        if int(os.environ.get("WORLD_SIZE") or 1) > 1
        else max(1, torch.cuda.device_count())
    )


def local_ranks_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 0) or min(
        ranks_here(), max(1, torch.cuda.device_count()) if _has_gpu() else 10**6
    )


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _totals(plan: MemoryPlan) -> str:
    host = f", {format_bytes(plan.host)} of host memory on each node" if plan.host else ""
    return f"about {format_bytes(plan.device)} on each device{host}"


def _shortage(plan: MemoryPlan) -> str | None:
    """What does not fit on this machine; without a GPU the host holds everything."""
    from safecl.engine.reference.shared_memory import available_memory

    host = plan.host if _has_gpu() else plan.shared_host
    if _has_gpu() and plan.device > (there := torch.cuda.get_device_properties(0).total_memory):
        return f"a device has {format_bytes(there)}; use a higher deepspeed.stage, more ranks, offload, or smaller micro-batches"
    free = available_memory()
    if free is not None and host > free:
        return f"{format_bytes(host)} of host memory are needed and {format_bytes(free)} are available here"
    return None
