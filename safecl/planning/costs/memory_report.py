"""The memory plan as lines of text for `safecl check`, the refusal of a run that does not fit on this machine, and the
decisions whether activations are recomputed and freed memory is kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from safecl.config import ConfigError, RunConfig
from safecl.distributed import collectives, devices, environment
from safecl.planning.costs.device_memory import MemoryPlan, plan_memory
from safecl.planning.costs.items import Where
from safecl.planning.costs.model_shape import ModelShape
from safecl.planning.costs.nearest import nearest_that_fits
from safecl.planning.costs.shapes import shapes_of, teacher_shapes, trained_model
from safecl.planning.plans import RunPlan
from safecl.storage.sizes import available_memory, format_bytes, resident_bytes

_EVALUATION = {
    "whole": "all weights are gathered once for each measurement",
    "streamed": "weights are gathered layer by layer, once for each token of all prompts of a rank together",
}


ACTIVATION_BYTES = 400
"""More than a layer keeps for each element of a token's hidden state, without eager attention. By counting, a Llama
keeps 48 in bf16 and 87 in fp32, a Gemma with its wide layers 155 in fp32."""


MODEL_CODE_BYTES = 195_000_000
"""What transformers' code of models takes in a process that has imported it: 183 to 187 MB by importing and making a
Llama, a GPT-2, a Gemma 3 and a Qwen 3 on the meta device (transformers 5.24), and what reads their files."""


def program_bytes() -> int:
    """Return the bytes that a process of the run has before it loads a model.

    It imports and reads what this process has imported and read so far, and the code of models, which a process that
    remembers the model does not import.
    """
    return resident_bytes() + (0 if "transformers.modeling_utils" in sys.modules else MODEL_CODE_BYTES)


def memory_lines(
    shape_on: Callable[[int], ModelShape],
    config: RunConfig,
    teachers: Sequence[ModelShape] = (),
    *,
    program: int = 0,
    keeps_freed: bool = False,
) -> list[tuple[str, str]]:
    """Return (label, value) lines: the memory on `ranks_here` ranks, then on 8 and on 64, unless it fits easily here.

    shape_on: the model's shape on that many ranks. teachers: further models that compute outputs in every step.
    program, keeps_freed: see plan_memory.
    """
    planned = _Planned(shape_on, config, teachers, program, keeps_freed)
    here, plan = ranks_here(), planned.here()
    places: tuple[Where, ...] = ("device", "host")
    lines = [("takes", f"{_totals(plan)}, on {here} rank{'s' if here > 1 else ''}")]
    for where in places:
        items = sorted(plan.at_peak(where), key=lambda item: -item.nbytes)
        if items:
            lines.append((f"  {where}", ", ".join(f"{item.what} {format_bytes(item.nbytes)}" for item in items)))
    if plan.evaluation is not None:
        lines.append(("  evaluation", _EVALUATION[plan.evaluation]))
    larger = () if _fits(plan, 4) else (8, 64)  # counting the activations of each takes a second
    lines += [(f"  on {ranks} ranks", _totals(planned.on(ranks))) for ranks in larger if ranks > here]
    if (note := _shortage(plan)) is not None:
        lines.append(("  too little", note))
        if changes := planned.nearest_that_fits():
            lines.append(("  would fit", changes))
    return lines


def too_little(
    shape_on: Callable[[int], ModelShape],
    config: RunConfig,
    teachers: Sequence[ModelShape] = (),
    *,
    program: int = 0,
) -> str | None:
    """Return what does not fit on this machine, with the nearest setting that does; None where everything fits.

    program: see plan_memory. What of it this process holds already is not asked for again.
    """
    planned = _Planned(shape_on, config, teachers, program)
    held = min(program, resident_bytes()) * local_ranks_here()
    if (note := _shortage(planned.here(), held)) is None:
        return None
    changes = planned.nearest_that_fits(held)
    nearest = f"; {changes} would fit" if changes else ""
    return f"the run does not fit here: {note}{nearest}; train.allow_little_memory: true tries it all the same"


def settle_memory(plan: RunPlan) -> RunConfig:
    """Decide what the run does with the memory of this machine, the same on every rank. A collective call.

    `model.gradient_checkpointing: auto` becomes true or false in the plan's config, which is returned. Freed host
    memory is kept where no GPU is used and the run leaves half of the memory free.
    """
    told, spare = plan.config.model.gradient_checkpointing, True
    if told != "auto" and devices.on_gpu():
        return plan.config
    if environment.local_rank() == 0:
        spare = leaves_half(plan)
    spare = all(collectives.gather_objects([spare]))
    if told == "auto":
        plan.config = _recomputing(plan.config, not spare)
    plan.keeps_freed_memory = spare and not devices.on_gpu()
    return plan.config


def leaves_half(plan: RunPlan) -> bool:
    """Return whether the run takes at most half of this machine's memory. With `auto`, activations are not recomputed.

    They are counted only where a generous bound does not settle it: counting takes a second.
    """
    config = _recomputing(plan.config, plan.config.model.gradient_checkpointing is True)
    model, teachers, program = trained_model(config), teacher_shapes(config), program_bytes()
    alone = ModelShape.without_activations(model.outline, config.model.lora)
    most = ACTIVATION_BYTES * config.train.tokens_per_microbatch * alone.layers * alone.hidden

    def fits(shape_on: Callable[[int], ModelShape]) -> bool:
        return _fits(_Planned(shape_on, config, teachers, program).here(), 2)

    if not fits(lambda ranks: alone):
        return False
    if config.model.attention != "eager" and fits(lambda ranks: replace(alone, activations=most)):
        return True
    return fits(shapes_of(model, replace(plan, config=config)))


def _recomputing(config: RunConfig, recomputes: bool) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"gradient_checkpointing": recomputes})})


def refuse_what_does_not_fit(plan: RunPlan) -> None:
    """Raise ConfigError on every rank where the run does not fit on one of the machines. A collective call.

    Activations are counted only for a model whose state fills a quarter of the memory; smaller ones leave them room.
    """
    config, note = plan.config, None
    if not config.train.allow_little_memory and environment.local_rank() == 0:
        model, teachers, program = trained_model(config), teacher_shapes(config), program_bytes()
        state = ModelShape.without_activations(model.outline, config.model.lora)
        if not _fits(_Planned(lambda ranks: state, config, teachers, program).here(), 4):
            note = too_little(shapes_of(model, plan), config, teachers, program=program)
    found = [told for told in collectives.gather_objects([note]) if told is not None]
    if found:
        raise ConfigError(found[0])


@dataclass(frozen=True)
class _Planned:
    """Memory plans of a run in different layouts."""

    shape_on: Callable[[int], ModelShape]
    config: RunConfig
    teachers: Sequence[ModelShape]
    program: int
    keeps_freed: bool = False

    def here(self, changed: RunConfig | None = None) -> MemoryPlan:
        return self.on(ranks_here(), local_ranks_here(), changed)

    def on(self, ranks: int, ranks_per_node: int | None = None, changed: RunConfig | None = None) -> MemoryPlan:
        changed = changed or self.config
        shape = _cut_micro_batch(self.shape_on(ranks), self.config, changed)
        device = "cuda" if devices.on_gpu() else "cpu"
        return plan_memory(
            shape,
            changed,
            ranks,
            ranks_per_node,
            device=device,
            teachers=self.teachers,
            program=self.program,
            room=_room_of_a_rank(),
            keeps_freed=self.keeps_freed,
        )

    def nearest_that_fits(self, held: int = 0) -> str | None:
        return nearest_that_fits(self.config, lambda changed: _shortage(self.here(changed), held) is None)


def _cut_micro_batch(shape: ModelShape, config: RunConfig, changed: RunConfig) -> ModelShape:
    """Return the shape with the smaller micro-batches of a changed config, whose activations shrink with them."""
    tokens = shape.tokens if shape.tokens is not None else config.train.tokens_per_microbatch
    left = min(tokens, changed.train.tokens_per_microbatch)
    return replace(shape, activations=round(left / tokens * shape.activations), tokens=left)


def ranks_here() -> int:
    """Return the number of ranks of this job; before one has begun, one per GPU. A run that nobody has launched is a
    job of one rank (environment.join_launcher), however many GPUs there are."""
    if launched := int(os.environ.get("WORLD_SIZE") or 0):
        return launched
    return max(1, torch.cuda.device_count()) if devices.on_gpu() else 1


def local_ranks_here() -> int:
    """Return the number of ranks on this node: by the launcher, or else its number of GPUs."""
    if launched := int(os.environ.get("LOCAL_WORLD_SIZE") or 0):
        return launched
    return min(ranks_here(), max(1, torch.cuda.device_count())) if devices.on_gpu() else ranks_here()


def _room_of_a_rank() -> int | None:
    """Return the bytes of a rank's device, or of its part of host memory where there is no GPU; None if unknown."""
    if devices.on_gpu():
        return int(torch.cuda.get_device_properties(0).total_memory)
    free = available_memory()
    return None if free is None else free // local_ranks_here()


def _totals(plan: MemoryPlan) -> str:
    host = f", {format_bytes(plan.host)} of host memory on each node" if plan.host else ""
    return f"about {format_bytes(plan.device)} on each device{host}"


def _shortage(plan: MemoryPlan, held: int = 0) -> str | None:
    """Return a message on what does not fit on this machine; None where everything fits. Without a GPU, host memory
    holds everything. held: bytes of the plan that processes hold already."""
    has_gpu = devices.on_gpu()
    host = (plan.host if has_gpu else plan.shared_host) - held
    if has_gpu and plan.device > (there := torch.cuda.get_device_properties(0).total_memory):
        return f"a device has {format_bytes(there)}, and {format_bytes(plan.device)} are needed on each"
    free = available_memory()
    if free is not None and host > free:
        return f"{format_bytes(host)} of host memory are needed and {format_bytes(free)} are available"
    return None


def _fits(plan: MemoryPlan, times: int) -> bool:
    """True where this machine has at least so many times the memory that the plan takes."""
    free = available_memory()
    if free is not None and times * (plan.host if devices.on_gpu() else plan.shared_host) > free:
        return False
    return not devices.on_gpu() or times * plan.device <= torch.cuda.get_device_properties(0).total_memory
