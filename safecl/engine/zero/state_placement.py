"""The places of a run's state by its config, and whether the run keeps the reference weights."""

from __future__ import annotations

import torch

from safecl.config import RunConfig
from safecl.engine.zero.placement import StatePlacement, role_of


def placement_of(config: RunConfig) -> StatePlacement:
    """Return the placement that the config sets.

    Fisher information has the dtype of the run: the estimate's own error is several percent, that of bf16 0.2 %.
    """
    offload = config.deepspeed.offload
    return StatePlacement(
        offload.reference,
        offload.fisher,
        offload.ema,
        torch.bfloat16 if config.model.dtype == "bf16" else torch.float32,
    )


def needs_reference(config: RunConfig) -> bool:
    """True where anchors or a streamed teacher read the reference store when the first task begins, so it stays open.

    With LoRA neither reads it. A first task with `role: align` makes another model, to which anchors then pull.
    """
    if config.model.lora is not None or config.tasks[0].role == "align":
        return False
    anchors = any(role_of(kind) == "reference" for settings in config.methods.values() for kind in settings.state_kinds)
    return streams_theta_0(config) or (anchors and config.deepspeed.offload.reference == "cpu")


def streams_theta_0(config: RunConfig) -> bool:
    """True where theta_0, streamed from host memory, is a teacher of the first task that methods act on."""
    return config.model.lora is None and not {"aligned", "previous"}.isdisjoint(config.online_teachers.values())
