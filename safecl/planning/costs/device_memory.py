"""The bytes that a run takes on devices and in host memory, computed from a model's structure and a config.

`safecl check` prints them, and the tables of docs/memory.md come from here. zero_memory.py lists the tensors of each
ZeRO stage, activations.py counts activations, and this module adds the rest. The total is the peak: the items that
always exist, and those of the moment in which they take most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from safecl.config import RunConfig, parse_bytes
from safecl.engine.checkpoint.staging import staging_bytes
from safecl.engine.model.dtypes import CONFIG_DTYPES
from safecl.engine.model.features import layer_numbers
from safecl.engine.zero.pieces import CHUNK
from safecl.engine.zero.placement import StatePlacement, role_of
from safecl.engine.zero.state_placement import needs_reference, placement_of, streams_theta_0
from safecl.kernels.head.chunks import workspace_bytes
from safecl.planning.costs.items import FP32, Item, Moment, Where, share_of, weight_bytes
from safecl.planning.costs.model_shape import ModelShape
from safecl.planning.costs.zero_memory import gathered_weights, loading_bytes, zero_items

RANKS_PER_NODE = 8
"""Ranks of a node where nothing else says how many they are."""
KEPT_SHARE = 1.0
"""What a heap that keeps freed blocks holds besides the activations, as a share of them: later blocks do not fit all
gaps. Measured with 135 M weights: 0.55 in two steps (benchmarks/planning/run_memory.py), 0.9 in 60 of other sizes."""


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a run, on each of `world_size` ranks."""

    world_size: int
    ranks_per_node: int
    items: list[Item] = field(default_factory=list)
    loading: int = 0
    """Peak bytes on the device of a rank while the weights are loaded."""
    evaluation: Literal["whole", "streamed"] | None = None
    """The weights of stage 3 while answers are generated; see deepspeed.evaluation. None where none are gathered."""

    @property
    def device(self) -> int:
        """Peak bytes on the device of a rank, from the start of the run to its steps."""
        return max(self.loading, sum(item.nbytes for item in self.at_peak("device")))

    @property
    def host(self) -> int:
        """Peak bytes in the host memory of a node."""
        return sum(self._on_a_node(item) for item in self.at_peak("host"))

    @property
    def shared_host(self) -> int:
        """Peak bytes in the host memory of a node without GPUs, where host memory is the device as well."""
        return sum(self._on_a_node(item) for item in self.at_peak("device", "host"))

    def at_peak(self, *where: Where) -> list[Item]:
        """Return the items that are in these places at the peak."""
        there = [item for item in self.items if item.where in where]
        moments: tuple[Moment, ...] = ("backward", "reduce", "step", "evaluation")
        passing = [[item for item in there if item.moment == moment] for moment in moments]
        fullest = max(passing, key=lambda items: sum(map(self._on_a_node, items)))
        return [item for item in there if item.moment == "always"] + fullest

    def bytes_of(self, what: str) -> int:
        """Return the peak bytes of the items named `what`, device plus host."""
        places: tuple[Where, ...] = ("device", "host")
        return sum(item.nbytes for where in places for item in self.at_peak(where) if item.what == what)

    def _on_a_node(self, item: Item) -> int:
        return item.nbytes * (1 if item.per_node else self.ranks_per_node)


def plan_memory(
    shape: ModelShape,
    config: RunConfig,
    world_size: int,
    ranks_per_node: int | None = None,
    *,
    device: str = "cuda",
    teachers: Sequence[ModelShape] = (),
    program: int = 0,
    room: int | None = None,
    keeps_freed: bool = False,
) -> MemoryPlan:
    """Return the memory of a run on `world_size` ranks, in its first task.

    Mapped files (rows, stored outputs) are not counted. A Fisher estimate is not counted either: its fp32 sum of
    squares takes half of what AdamW's moments take, which do not exist before a task's first step.

    device: "cuda" or "cpu"; the head uses other tiles on each. teachers: further models that compute outputs in every
    step. program: bytes that a process has before it loads a model. room: bytes that a rank has on its device; None:
    an evaluation of stage 3 is planned as if all weights did not fit at once. keeps_freed: freed host memory is kept
    for the next pass (safecl.distributed.host_memory).
    """
    per_node = min(world_size, ranks_per_node or RANKS_PER_NODE)
    plan = MemoryPlan(world_size, per_node, loading=loading_bytes(shape, config, world_size))
    items = [
        *zero_items(shape, config, world_size, device),
        *_method_state(shape, config, world_size, device),
        *_reference(shape, config, device),
        *_teachers(config, teachers, device),
        *_checkpoints(shape, config, world_size),
        *_activations(shape, config, device),
        *_compared_layers(shape, config),
        Item("program and libraries", "host", program),
        Item("evaluation", "device", shape.evaluation, "evaluation"),
        Item("freed blocks kept", "host", round(keeps_freed * KEPT_SHARE * shape.activations), "backward"),
    ]
    plan.items.extend(item for item in items if item.nbytes)
    return _with_gathered_weights(plan, shape, config, device, room)


def _with_gathered_weights(
    plan: MemoryPlan, shape: ModelShape, config: RunConfig, device: str, room: int | None
) -> MemoryPlan:
    """Add the weights that stage 3 gathers to generate: all of them, or those of a layer and the next ones."""
    is_served = config.safety is not None and config.safety.backend == "vllm"
    if not (shape.generates and config.deepspeed.stage == 3 and plan.world_size > 1) or is_served:
        return plan
    size, chosen = weight_bytes(config), config.deepspeed.evaluation
    if chosen == "auto":
        places: tuple[Where, ...] = ("device",) if device == "cuda" else ("device", "host")
        held = sum(item.nbytes for item in plan.items if item.moment == "always" and item.where in places)
        from safecl.engine.passes.live_model import SHARE_FOR_WEIGHTS  # imports DeepSpeed's engine

        fits = room is not None and shape.weights * size <= SHARE_FOR_WEIGHTS * (room - held)
        chosen = "whole" if fits else "streamed"
    gathered = shape.weights if chosen == "whole" else gathered_weights(shape)
    item = Item("gathered weights", "device", gathered * size, "evaluation")
    return replace(plan, items=[*plan.items, item], evaluation=chosen)


def _method_state(shape: ModelShape, config: RunConfig, world_size: int, device: str) -> Iterator[Item]:
    """Yield the methods' state per weight, and the device buffers that offloaded state passes through."""
    share = shape.trained if config.deepspeed.stage == 0 else share_of(shape.trained, world_size)
    with_masters: Where = "host" if config.deepspeed.offload.optimizer == "cpu" else "device"
    placement = placement_of(config)
    for kind in state_kinds(config):
        size, away = _element_bytes(kind, config, placement), placement.of(kind) == "cpu"
        if not (away and role_of(kind) == "reference" and needs_reference(config)):
            yield Item(kind.lstrip("_").replace("_", " "), "host" if away else with_masters, share * size)
    if any(merge.pick for settings in config.methods.values() if (merge := settings.merge_at_the_end) is not None):
        yield Item("weights before the merge", "host", share * FP32, "evaluation")
    yield Item("singular vectors", "device", share_of(shape.singular_vectors, world_size))
    yield Item("directions of the alignment", "device", shape.alignment_directions)
    if device == "cuda":
        yield Item("chunks of offloaded state", "device", 2 * min(CHUNK, share) * streamed_bytes(config))


def streamed_bytes(config: RunConfig) -> int:
    """Bytes per weight of state that passes from host memory through the device in every step."""
    if config.deepspeed.offload.optimizer == "cpu":
        return 0
    placement = placement_of(config)
    kinds = [kind for kind in state_kinds(config) if placement.of(kind) == "cpu"]
    return sum(_element_bytes(kind, config, placement) for kind in kinds)


def aside_bytes(config: RunConfig) -> int:
    """Bytes per weight of an average among them that does so while the passes compute, not in the update
    (safecl.engine.zero.update.AveragePlace)."""
    offload, methods = config.deepspeed.offload, config.methods.values()
    aside = any(settings.decay_for(1) is not None and settings.mask_fisher is None for settings in methods)
    return FP32 if aside and offload.ema == "cpu" and offload.optimizer == "none" else 0


def state_kinds(config: RunConfig) -> list[str]:
    """Return the kinds of state of all methods, each once."""
    return list(dict.fromkeys(kind for settings in config.methods.values() for kind in settings.state_kinds))


def _element_bytes(kind: str, config: RunConfig, placement: StatePlacement) -> int:
    """Return the bytes per weight of a kind of state. An anchor at theta_0 has the run's dtype, one at a model that the
    first task has aligned is fp32."""
    role = role_of(kind)
    if role == "fisher":
        return placement.fisher_dtype.itemsize
    return weight_bytes(config) if role == "reference" and config.tasks[0].role != "align" else FP32


def _reference(shape: ModelShape, config: RunConfig, device: str) -> Iterator[Item]:
    """Yield theta_0, once per node, and the device buffers that it passes through where it is the teacher."""
    size = weight_bytes(config)
    if needs_reference(config) or streams_theta_0(config):
        yield Item("reference weights", "host", shape.weights * size, per_node=True)
    if streams_theta_0(config):
        yield Item("teacher", "device", _teacher_buffers(shape, config, device))


def _teachers(config: RunConfig, teachers: Sequence[ModelShape], device: str) -> Iterator[Item]:
    """Yield the weights of further teachers, once per node, and their device buffers."""
    for shape in teachers:
        yield Item("teacher's weights", "host", shape.weights * weight_bytes(config), per_node=True)
        yield Item("teacher", "device", _teacher_buffers(shape, config, device))


def _teacher_buffers(shape: ModelShape, config: RunConfig, device: str) -> int:
    """Return the bytes of the two buffers that a streamed teacher's layers pass through; on the CPU its weights are
    read in place."""
    streamed = 2 * shape.largest_layer if device == "cuda" else 0
    return (shape.weights if config.teacher == "resident" else streamed) * weight_bytes(config)


def _checkpoints(shape: ModelShape, config: RunConfig, world_size: int) -> Iterator[Item]:
    """Yield the host memory through which a rank's state is written: that of the whole state, or `checkpoint.staging`
    where the state is larger; and where a failed gate rolls back, the state that passed."""
    rolls_back = config.safety is not None and config.safety.on_fail == "rollback"
    if config.checkpoint.every == "never" and not rolls_back:
        return
    placement, base = placement_of(config), config.tasks[0].role != "align" and config.model.lora is None
    kinds = [
        kind for kind in state_kinds(config) if not kind.startswith("_") and not (base and role_of(kind) == "reference")
    ]
    per_weight = 3 * FP32 + sum(_element_bytes(kind, config, placement) for kind in kinds)
    state, limit = share_of(shape.trained, world_size) * per_weight, parse_bytes(config.checkpoint.staging)
    if config.checkpoint.every != "never":
        yield Item("copy for the checkpoint", "host", staging_bytes(state, limit))
    if rolls_back:
        own = shape.trained if config.deepspeed.stage == 0 else share_of(shape.trained, world_size)
        yield Item("last state that passed", "host", own * per_weight + staging_bytes(state, limit))


def _compared_layers(shape: ModelShape, config: RunConfig) -> Iterator[Item]:
    """Yield the hidden states of several layers that a teacher gives, and their differences to the model's in fp32."""
    tokens = config.train.tokens_per_microbatch if shape.tokens is None else shape.tokens
    for settings in config.methods.values():
        values = len(layer_numbers(settings.compared_layers, shape.layers)) * tokens * shape.hidden
        yield Item("compared layers", "device", values * (2 * weight_bytes(config) + 3 * FP32), "backward")


def _activations(shape: ModelShape, config: RunConfig, device: str) -> Iterator[Item]:
    online = config.model.lora is not None and bool(config.online_teachers)
    head = workspace_bytes(
        config.train.tokens_per_microbatch if shape.tokens is None else shape.tokens,
        shape.vocab,
        shape.hidden,
        CONFIG_DTYPES[config.model.dtype],
        torch.device(device),
        teacher=online,
    )
    yield Item("activations", "device", shape.activations, "backward")
    yield Item("gradients of hidden states", "device", shape.moved_hidden, "backward")
    yield Item("logits", "device", head, "backward")
