"""Where a run keeps its state, and whether the reference weights stay."""

from __future__ import annotations

import torch

from safecl.config import RunConfig
from safecl.engine.zero.placement import Placement, role_of


def placement_of(config: RunConfig) -> Placement:
    """Fisher information follows the dtype of the run: its own error is several percent, that of bf16 0.2 %."""
    offload = config.deepspeed.offload
    return Placement(
        offload.reference,
        offload.fisher,
        offload.ema,
        torch.bfloat16 if config.model.dtype == "bf16" else torch.float32,
    )


def needs_reference(config: RunConfig) -> bool:
    """True where the reference store stays open when the first task begins: anchors or a streamed teacher read it. With
    LoRA neither does, and a first task with `role: align` makes another model to pull to."""
    if config.model.lora is not None or config.tasks[0].role == "align":
        return False
    anchors = any(role_of(kind) == "reference" for settings in config.methods.values() for kind in settings.state_kinds)
    return streams_theta_0(config) or (anchors and config.deepspeed.offload.reference == "cpu")


def streams_theta_0(config: RunConfig) -> bool:
    """True where a teacher of the first task that methods act on is the aligned model, streamed from host memory."""
    return config.model.lora is None and not {"aligned", "previous"}.isdisjoint(config.online_teachers.values())
