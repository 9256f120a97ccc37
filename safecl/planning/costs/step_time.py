"""The time of a training step, by arithmetic: floating-point operations, bytes in memory, bytes between ranks.

    step     = passes + exchange + update
    passes   = [6 P T + 12 L h s T / 2] (8 P T with recomputation) / (ranks x rate of the device), T tokens in a step
    exchange = bytes of the stage x (n - 1) / n / rate of the slowest link + hops x latency; weights in host memory come
               to the device twice in each micro-batch, a share on each rank
    update   = bytes per weight of the optimizer's pass x share of the rank / rate of its memory; where state is in host
               memory, at least its bytes over the link; an average there takes the link while the passes compute, and
               counts only as far as it takes longer than they do

P: weights, L: layers, h: hidden size, s: tokens of a row. Nothing else overlaps: safecl sets overlap_comm: false, and
gradients are exchanged in fp32. Bytes that a rank sends and receives in a step, for Psi trained weights, m
micro-batches, w bytes a weight (2 in bf16):

    stage 0   8 Psi                        gradients, all-reduce
    stage 1   8 Psi + w Psi                the same; weights after the update
    stage 2   8 Psi m + w Psi              gradients after each micro-batch
    stage 3   m (4 Psi + 2 w P)            gradients, reduce-scatter; weights gathered for forward and backward

Source of the volumes: ZeRO (Rajbhandari et al., arXiv 1910.02054), section 7, with the dtypes and the micro-batches
that safecl uses. DeepSpeed 0.19 all-reduces the buckets of stages 1 and 2 where the paper scatters them
(use_multi_rank_bucket_allreduce), which doubles their gradients; `python -m benchmarks.planning.scaling --measure`
counts it. The rates of `DEVICES` are data sheets times the share that others have measured.
`benchmarks/planning/scaling.py` puts the model beside all that was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from safecl.config import RunConfig
from safecl.planning.costs.device_memory import aside_bytes, state_kinds, streamed_bytes
from safecl.planning.costs.items import FP32, share_of, weight_bytes
from safecl.planning.costs.model_shape import ModelShape

GIGA = 1e9


@dataclass(frozen=True)
class Device:
    """Rates of a device and its links, in units per second and rank. flops: dense products in bf16 that a training step
    reaches; memory, inside, between, host, host_memory: bytes per second of device memory, of links inside a node,
    between nodes, to host memory, and of host memory."""

    name: str
    flops: float
    memory: float
    inside: float
    between: float
    host: float
    host_memory: float
    latency: float = 10e-6
    """Seconds of one hop of a collective call."""


DEVICES = {
    # 46 % of 989 TFLOP/s: what llm-foundry reports for 7B on 8 H100. Links at 80 % of their data sheets.
    "H100": Device("H100 80 GB", 0.46 * 989e12, 0.8 * 3350e9, 0.8 * 450e9, 0.8 * 50e9, 0.8 * 64e9, 0.8 * 38e9),
    "H200": Device("H200", 0.46 * 989e12, 0.8 * 4800e9, 0.8 * 450e9, 0.8 * 50e9, 0.8 * 64e9, 0.8 * 38e9),
    "A100": Device("A100 80 GB", 0.46 * 312e12, 0.8 * 2039e9, 0.8 * 300e9, 0.8 * 25e9, 0.8 * 32e9, 0.8 * 25e9),
}


@dataclass(frozen=True)
class StepTime:
    """Seconds of the parts of a step, and the bytes behind them, per rank."""

    passes: float
    methods: float
    """Further passes of methods: teachers that are asked in every step, gradients of their own."""
    exchange: float
    update: float
    sent: float
    """Bytes that a rank sends and receives."""
    tokens: float
    """Tokens of the step, replay included."""

    @property
    def seconds(self) -> float:
        return self.passes + self.methods + self.exchange + self.update


@dataclass(frozen=True)
class Cluster:
    """Ranks and the devices that they run on."""

    device: Device
    ranks: int
    per_node: int = 8

    @property
    def link(self) -> float:
        """Bytes per second of the slowest link of a ring over all ranks."""
        return self.device.inside if self.ranks <= self.per_node else min(self.device.inside, self.device.between)


def step_time(shape: ModelShape, config: RunConfig, cluster: Cluster, tokens_per_batch: int) -> StepTime:
    """Return the time of a step of `tokens_per_batch` task tokens. Replay adds its share."""
    ratio = config.memory.largest_replay_ratio if config.memory is not None and _replays(config) else 0.0
    tokens = tokens_per_batch * (1 + ratio)
    batches = num_micro_batches(tokens, config, cluster.ranks)
    device = cluster.device
    forward = forward_flops(shape, config) * tokens / cluster.ranks / device.flops
    passes = forward * (4 if config.model.gradient_checkpointing else 3)
    sent = exchanged_bytes(shape, config, batches)
    calls = _calls(shape, config, batches)
    ring = (cluster.ranks - 1) / cluster.ranks
    latency = calls * math.log2(cluster.ranks) * device.latency if cluster.ranks > 1 else 0.0
    return StepTime(
        passes=passes,
        methods=_method_passes(shape, config, cluster, forward, passes, ratio)
        + _head_forwards(shape, config) * tokens / cluster.ranks / device.flops,
        exchange=sent * ring / cluster.link + latency + _fetched_bytes(shape, config, cluster, batches) / device.host,
        update=_update(shape, config, cluster, passes),
        sent=sent * ring,
        tokens=tokens,
    )


def forward_flops(shape: ModelShape, config: RunConfig) -> float:
    """Floating-point operations of a forward pass per token: two per weight that is multiplied, and causal
    attention."""
    multiplied = shape.weights - (0 if shape.tied else shape.vocab * shape.hidden)  # the embedding is only looked up
    length = config.train.max_length if config.train.packing != "padded" else config.train.max_length / 2
    return 2.0 * multiplied + 4.0 * shape.layers * shape.hidden * length / 2


def num_micro_batches(tokens: float, config: RunConfig, ranks: int) -> int:
    """Micro-batches of a rank in a step."""
    return max(1, math.ceil(tokens / ranks / config.train.tokens_per_microbatch))


def exchanged_bytes(shape: ModelShape, config: RunConfig, batches: int) -> float:
    """Bytes that a rank sends in a step, for many ranks. See the table at the top."""
    stage, trained, size = config.deepspeed.stage, shape.trained, weight_bytes(config)
    gathers = any(settings.kept_singular_share is not None for settings in config.methods.values())
    return _exchanged_by_zero(stage, trained, size, shape, batches) + (2.0 * FP32 * trained if gathers else 0.0)


def _exchanged_by_zero(stage: int, trained: int, size: int, shape: ModelShape, batches: int) -> float:
    if stage == 0:
        return 2.0 * FP32 * trained
    if stage in (1, 2):
        reductions = batches if stage == 2 else 1
        return float(reductions * 2 * FP32 * trained + size * trained)
    return float(batches * (FP32 * trained + 2 * size * shape.weights))


def _fetched_bytes(shape: ModelShape, config: RunConfig, cluster: Cluster, batches: int) -> float:
    """Bytes of weights that a rank reads from host memory in a step: its share, for the forward and the backward pass
    of each micro-batch."""
    if config.deepspeed.offload.parameters != "cpu":
        return 0.0
    return 2.0 * batches * weight_bytes(config) * share_of(shape.weights, cluster.ranks)


def _calls(shape: ModelShape, config: RunConfig, batches: int) -> int:
    """Collective calls of a step: three for each layer in stage 3, one for each bucket of 5e8 elements elsewhere."""
    if config.deepspeed.stage == 3:
        return 3 * shape.layers * batches
    return 2 + math.ceil(shape.trained / 5e8) * (batches if config.deepspeed.stage == 2 else 1)


def _replays(config: RunConfig) -> bool:
    return any(settings.needs_memory for settings in config.methods.values())


def _method_passes(
    shape: ModelShape, config: RunConfig, cluster: Cluster, forward: float, passes: float, ratio: float
) -> float:
    """A teacher that is asked in every step makes a forward pass, and its weights pass from host memory to each device.
    A method with gradients of its own makes passes over replayed rows or the task's."""
    teachers = len(set(config.online_teachers.values()))
    replayed, methods = ratio / (1 + ratio), config.methods.values()
    own = sum(settings.gradient_passes for settings in methods) * passes * replayed
    own += sum(settings.forward_passes for settings in methods) * forward * replayed
    own += sum(settings.task_gradient_passes for settings in methods) * passes * (1 - replayed)
    return teachers * teacher_seconds(shape, config, cluster.device, forward) + own


def teacher_seconds(shape: ModelShape, config: RunConfig, device: Device, forward: float) -> float:
    """Seconds of a teacher's forward pass, which takes `forward` where its weights are there already."""
    streamed = shape.weights * weight_bytes(config) / device.host if config.teacher == "streamed" else 0.0
    return max(forward, streamed)


def _head_forwards(shape: ModelShape, config: RunConfig) -> float:
    """Floating-point operations per token of the output head's forwards that methods add."""
    return sum(settings.head_forwards for settings in config.methods.values()) * 2.0 * shape.vocab * shape.hidden


def _update(shape: ModelShape, config: RunConfig, cluster: Cluster, passes: float) -> float:
    share = shape.trained if config.deepspeed.stage == 0 else share_of(shape.trained, cluster.ranks)
    return update_seconds(config, cluster.device, share, passes)


def update_seconds(config: RunConfig, device: Device, weights: int, passes: float) -> float:
    """Seconds that the update of so many weights on a rank adds to passes of so many seconds.

    With an offloaded optimizer it runs on the CPU, between a copy of the gradients to host memory and one of the
    weights back. Else state in host memory comes in over the link beside the optimizer's pass, or, for an average,
    beside the passes; what goes back overlaps, since the link has two directions.
    """
    per_weight = bytes_per_weight(config)
    if config.deepspeed.offload.optimizer == "cpu":
        return weights * (per_weight / device.host_memory + (FP32 + weight_bytes(config)) / device.host)
    aside = aside_bytes(config)
    inside = weights * max(per_weight / device.memory, (streamed_bytes(config) - aside) / device.host)
    return inside + max(0.0, weights * aside / device.host - passes)


def bytes_per_weight(config: RunConfig) -> float:
    """Bytes that the optimizer's pass moves for each weight.

    AdamW reads gradient, weight and two moments in fp32 and writes three of them, and a copy in the run's dtype. The
    methods' state comes on top.
    """
    moved = 4.0 + 2 * 12 + weight_bytes(config)
    for kind in state_kinds(config):
        moved += 2 * FP32 if kind.endswith("ema") else weight_bytes(config)  # an average is written as well
    return moved
