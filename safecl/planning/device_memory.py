"""What lives where, in bytes, worked out from a model's structure and a config. `safecl check` prints it;
docs/memory.md is made by it.

Which tensors each ZeRO stage keeps and makes for a while is in safecl.planning.zero_memory; activations are counted by
running the model on tensors without memory (safecl.planning.activations). What is alive at the same time is added up:
all that stays, and of what passes by, that of the fullest moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from safecl.config import RunConfig
from safecl.engine.zero.pieces import CHUNK
from safecl.engine.zero.placement import Placement, role_of
from safecl.engine.zero.state_placement import needs_reference, placement_of, streams_theta_0
from safecl.planning.items import FP32, RANKS_PER_NODE, Item, Where, share_of, weight_bytes
from safecl.planning.model_shape import ModelShape


@dataclass(frozen=True)
class MemoryPlan:
    """What a run takes, on each of `world_size` ranks."""

    world_size: int
    ranks_per_node: int
    items: list[Item] = field(default_factory=list)

    @property
    def device(self) -> int:
        """Bytes on the device of a rank in its fullest moment."""
        return sum(item.nbytes for item in self.at_peak("device"))

    @property
    def host(self) -> int:
        """Bytes in the host memory of a node in its fullest moment."""
        return sum(self._on_a_node(item) for item in self.at_peak("host"))

    @property
    def shared_host(self) -> int:
        """Bytes in the host memory of a node where that is the device as well: ranks without a GPU."""
        return sum(self._on_a_node(item) for item in self.at_peak("device", "host"))

    def at_peak(self, *where: Where) -> list[Item]:
        """All that stays there, and what passes by in the moment in which that is most."""
        there = [item for item in self.items if item.where in where]
        passing = {
            moment: [item for item in there if item.moment == moment] for moment in ("backward", "reduce", "step")
        }
        fullest = max(passing.values(), key=lambda items: sum(map(self._on_a_node, items)))
        return [item for item in there if item.moment == "always"] + fullest

    def bytes_of(self, what: str) -> int:
        """Of all items of that name that are there in the fullest moment of their place."""
        return sum(item.nbytes for where in ("device", "host") for item in self.at_peak(where) if item.what == what)

    def _on_a_node(self, item: Item) -> int:
        return item.nbytes * (1 if item.per_node else self.ranks_per_node)


def plan_memory(
    shape: ModelShape, config: RunConfig, world_size: int, ranks_per_node: int | None = None, *, device: str = "cuda",
    teachers: Sequence[ModelShape] = (),
) -> MemoryPlan:  # fmt: skip
    """Memory of a run of this config on so many ranks, in its first task, from the first step on; without evaluation,
    and without what is mapped from files (rows, stored outputs).

    `device`: cuda or cpu, where the head works in other tiles. `teachers`: further models that are asked in every step.
    """
    from safecl.planning.zero_memory import zero_items

    per_node = min(world_size, ranks_per_node or RANKS_PER_NODE)
    plan = MemoryPlan(world_size, per_node)
    items = [
        *zero_items(shape, config, world_size, device),
        *_method_state(shape, config, world_size, device),
        *_reference(shape, config, device),
        *_teachers(config, teachers, device),
        *_checkpoints(shape, config, world_size),
        *_activations(shape, config, device),
    ]
    plan.items.extend(item for item in items if item.nbytes)
    return plan


def _method_state(shape: ModelShape, config: RunConfig, world_size: int, device: str) -> Iterator[Item]:
    """Anchor, Fisher information, average and what else the methods keep; through device buffers where it is
    offloaded."""
    share = shape.trained if config.deepspeed.stage == 0 else share_of(shape.trained, world_size)
    beside: Where = "host" if config.deepspeed.offload.optimizer == "cpu" else "device"
    placement, through = placement_of(config), 0
    for kind in state_kinds(config):
        size, away = _element_bytes(kind, config, placement), placement.of(kind) == "cpu"
        if not (away and role_of(kind) == "reference" and needs_reference(config)):
            yield Item(kind.lstrip("_").replace("_", " "), "host" if away else beside, share * size)
        through += size if away and beside == "device" else 0
    if device == "cuda":
        yield Item("chunks of offloaded state", "device", 2 * min(CHUNK, share) * through)


def state_kinds(config: RunConfig) -> list[str]:
    return list(dict.fromkeys(kind for settings in config.methods.values() for kind in settings.state_kinds))


def _element_bytes(kind: str, config: RunConfig, placement: Placement) -> int:
    """theta_0 has the run's dtype; what a first task with `role: align` has made of it is kept in fp32."""
    anchor = FP32 if config.tasks[0].role == "align" else weight_bytes(config)
    return {"fisher": placement.fisher_dtype.itemsize, "reference": anchor}.get(role_of(kind), FP32)


def _reference(shape: ModelShape, config: RunConfig, device: str) -> Iterator[Item]:
    """theta_0 once per node. A teacher's layers pass through two device buffers."""
    size = weight_bytes(config)
    if needs_reference(config) or streams_theta_0(config):
        yield Item("reference weights", "host", shape.weights * size, per_node=True)
    if streams_theta_0(config):
        yield Item("teacher", "device", _teacher_buffers(shape, config, device))


def _teachers(config: RunConfig, teachers: Sequence[ModelShape], device: str) -> Iterator[Item]:
    for shape in teachers:
        yield Item("teacher's weights", "host", shape.weights * weight_bytes(config), per_node=True)
        yield Item("teacher", "device", _teacher_buffers(shape, config, device))


def _teacher_buffers(shape: ModelShape, config: RunConfig, device: str) -> int:
    """On the CPU a streamed teacher's weights are read where they are."""
    streamed = 2 * shape.largest_layer if device == "cuda" else 0
    return (shape.weights if config.teacher == "resident" else streamed) * weight_bytes(config)


def _checkpoints(shape: ModelShape, config: RunConfig, world_size: int) -> Iterator[Item]:
    """A save copies the rank's state to host memory and writes it while training goes on; the copy's memory is used
    again."""
    if config.checkpoint.every == "never":
        return
    placement, base = placement_of(config), config.tasks[0].role != "align" and config.model.lora is None
    kinds = [
        kind for kind in state_kinds(config) if not kind.startswith("_") and not (base and role_of(kind) == "reference")
    ]
    per_weight = 3 * FP32 + sum(_element_bytes(kind, config, placement) for kind in kinds)
    yield Item("copy for the checkpoint", "host", share_of(shape.trained, world_size) * per_weight)


def _activations(shape: ModelShape, config: RunConfig, device: str) -> Iterator[Item]:
    from safecl.engine.model.dtypes import CONFIG_DTYPES
    from safecl.kernels.head.chunks import workspace_bytes

    online = config.model.lora is not None and bool(config.online_teachers)
    head = workspace_bytes(
        config.train.tokens_per_microbatch,
        shape.vocab,
        shape.hidden,
        CONFIG_DTYPES[config.model.dtype],
        torch.device(device),
        teacher=online,
    )
    yield Item("activations", "device", shape.activations, "backward")
    yield Item("logits", "device", head, "backward")


# -------------------------------------------------------------------------------------------------------------- showing


# --------------------------------------------------------------------------------------------------------------- tables
