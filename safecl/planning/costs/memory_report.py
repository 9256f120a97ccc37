"""The memory plan as lines of text for `safecl check`, with advice where it does not fit on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from safecl.config import RunConfig
from safecl.distributed import devices
from safecl.planning.costs.device_memory import MemoryPlan, plan_memory
from safecl.planning.costs.items import Where
from safecl.planning.costs.model_shape import ModelShape
from safecl.planning.costs.nearest import nearest_that_fits
from safecl.storage.sizes import available_memory, format_bytes


def memory_lines(
    shape_on: Callable[[int], ModelShape],
    config: RunConfig,
    teachers: Sequence[ModelShape] = (),
    *,
    program: int = 0,
) -> list[tuple[str, str]]:
    """Return (label, value) lines: the memory on `ranks_here` ranks, then on 8 and on 64.

    shape_on: the model's shape on that many ranks. teachers: further models that compute outputs in every step.
    program: see plan_memory.
    """
    here, local, device = ranks_here(), local_ranks_here(), "cuda" if devices.on_gpu() else "cpu"

    def planned(ranks: int, ranks_per_node: int | None = None, changed: RunConfig = config) -> MemoryPlan:
        shape = _cut_micro_batch(shape_on(ranks), config, changed)
        return plan_memory(shape, changed, ranks, ranks_per_node, device=device, teachers=teachers, program=program)

    plan = planned(here, local)
    places: tuple[Where, ...] = ("device", "host")
    lines = [("takes", f"{_totals(plan)}, on {here} rank{'s' if here > 1 else ''}")]
    for where in places:
        items = sorted(plan.at_peak(where), key=lambda item: -item.nbytes)
        if items:
            lines.append((f"  {where}", ", ".join(f"{item.what} {format_bytes(item.nbytes)}" for item in items)))
    lines += [(f"  on {ranks} ranks", _totals(planned(ranks))) for ranks in (8, 64) if ranks > here]
    if (note := _shortage(plan)) is not None:
        lines.append(("  too little", note))
        if changes := nearest_that_fits(config, lambda changed: _shortage(planned(here, local, changed)) is None):
            lines.append(("  would fit", changes))
    return lines


def _cut_micro_batch(shape: ModelShape, config: RunConfig, changed: RunConfig) -> ModelShape:
    """Return the shape with the smaller micro-batches of a changed config, whose activations shrink with them."""
    tokens = shape.tokens if shape.tokens is not None else config.train.tokens_per_microbatch
    left = min(tokens, changed.train.tokens_per_microbatch)
    return replace(shape, activations=round(left / tokens * shape.activations), tokens=left)


def ranks_here() -> int:
    """Return the number of ranks that the launcher has started; without a launcher, one per GPU."""
    launched = int(os.environ.get("WORLD_SIZE") or 1)
    return launched if launched > 1 else max(1, torch.cuda.device_count()) if devices.on_gpu() else 1


def local_ranks_here() -> int:
    """Return the number of ranks on this node: by the launcher, or else its number of GPUs."""
    if launched := int(os.environ.get("LOCAL_WORLD_SIZE") or 0):
        return launched
    return min(ranks_here(), max(1, torch.cuda.device_count())) if devices.on_gpu() else ranks_here()


def _totals(plan: MemoryPlan) -> str:
    host = f", {format_bytes(plan.host)} of host memory on each node" if plan.host else ""
    return f"about {format_bytes(plan.device)} on each device{host}"


def _shortage(plan: MemoryPlan) -> str | None:
    """Return a message on what does not fit on this machine; None where everything fits. Without a GPU, host memory
    holds everything."""
    has_gpu = devices.on_gpu()
    host = plan.host if has_gpu else plan.shared_host
    if has_gpu and plan.device > (there := torch.cuda.get_device_properties(0).total_memory):
        return (
            f"a device has {format_bytes(there)}; "
            "use a higher deepspeed.stage, more ranks, offload, or smaller micro-batches"
        )
    free = available_memory()
    if free is not None and host > free:
        return f"{format_bytes(host)} of host memory are needed and {format_bytes(free)} are available here"
    return None
