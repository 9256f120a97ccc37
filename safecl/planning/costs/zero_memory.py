"""The tensors of DeepSpeed 0.19 for weights, gradients and AdamW in each ZeRO stage, lasting and temporary ones.

They were read in its source, and compared with measurements (benchmarks/engine/reference.py). A bucket that holds the
whole model is reduced after the backward pass, when activations are gone; smaller buckets are reduced during the pass.
"""

from __future__ import annotations

from collections.abc import Iterator

from safecl.config import RunConfig
from safecl.engine.zero.deepspeed_config import BUCKET
from safecl.engine.zero.shards import LIVE, PREFETCHED
from safecl.planning.costs.items import FP32, Item, Moment, Where, share_of, weight_bytes
from safecl.planning.costs.model_shape import ModelShape

COPIES_OF_GLOO = "copies of gloo"


def zero_items(shape: ModelShape, config: RunConfig, world_size: int, device: str) -> Iterator[Item]:
    """Yield all items of a stage. device: "cuda" or "cpu"; on the CPU, gloo makes copies of its own."""
    stage = config.deepspeed.stage
    gradients = {0: _unsharded_gradients, 1: _stage_1_gradients, 2: _stage_2_gradients, 3: _stage_3_gradients}[stage]
    yield from _weights(shape, config, world_size)
    yield from gradients(shape, config, world_size)
    yield from _optimizer(shape, config, world_size)
    yield from _second_bucket(shape, config)
    if device == "cpu" and world_size > 1:
        yield from _copies_of_gloo(shape, config, world_size)


def loading_bytes(shape: ModelShape, config: RunConfig, world_size: int) -> int:
    """Return the bytes on a device while weights are loaded.

    Stage 3 cuts up one parameter after the other: the device holds its part of the model (none where parameters are in
    host memory) and one whole parameter. The other stages put the whole model on the device, then a flat copy.
    """
    size = weight_bytes(config)
    if config.deepspeed.stage < 3:
        return (shape.weights + (shape.trained if config.deepspeed.stage else 0)) * size
    own = 0 if config.deepspeed.offload.parameters == "cpu" else share_of(shape.weights, world_size)
    return (own + max(shape.largest, shape.vocab * shape.hidden)) * size


def _second_bucket(shape: ModelShape, config: RunConfig) -> Iterator[Item]:
    """Yield the bucket that is reduced while the backward pass fills the other."""
    if config.deepspeed.overlap_comm and config.deepspeed.stage > 0:
        size = FP32 if config.deepspeed.stage == 3 else weight_bytes(config)
        yield Item("communication buckets", "device", min(BUCKET, shape.trained) * size, "backward")


def _copies_of_gloo(shape: ModelShape, config: RunConfig, world_size: int) -> Iterator[Item]:
    """Yield extra gloo copies: twice an all-gathered tensor, and this rank's part of a reduce-scatter."""
    if config.deepspeed.stage in (1, 2):
        yield Item(COPIES_OF_GLOO, "device", 2 * shape.trained * weight_bytes(config), "step")
    elif config.deepspeed.stage == 3:
        yield Item(COPIES_OF_GLOO, "device", share_of(min(BUCKET, shape.trained), world_size) * FP32, "reduce")


def _weights(shape: ModelShape, config: RunConfig, world_size: int) -> Iterator[Item]:
    """Yield the live weights. Stage 3 shards them, and gathers some temporarily."""
    size = weight_bytes(config)
    if config.deepspeed.stage < 3:
        yield Item("weights", "device", shape.weights * size)
        return
    where: Where = "host" if config.deepspeed.offload.parameters == "cpu" else "device"
    yield Item("weights", where, share_of(shape.weights, world_size) * size)
    if world_size > 1 or where == "host":
        gathered = gathered_weights(shape) * size
        yield Item("gathered weights", "device", gathered, "backward")
        yield Item("gathered weights", "device", gathered, "reduce")


def gathered_weights(shape: ModelShape) -> int:
    """Return the largest number of weights that stage 3 holds gathered in a pass."""
    return min(shape.weights, max(LIVE, 2 * shape.largest_layer) + PREFETCHED)


def _optimizer(shape: ModelShape, config: RunConfig, world_size: int) -> Iterator[Item]:
    """Yield master weights and moments. Stages 1 and 2 copy offloaded weights back through a buffer."""
    stage, offload, size = config.deepspeed.stage, config.deepspeed.offload, weight_bytes(config)
    where: Where = "host" if offload.optimizer == "cpu" else "device"
    share = shape.trained if stage == 0 else share_of(shape.trained, world_size)
    are_the_weights = size == FP32 and (
        stage == 0 or (stage == 3 and offload.optimizer == offload.parameters == "none")
    )
    if not are_the_weights:
        yield Item("master weights", where, share * FP32)
    yield Item("moments", where, 2 * share * FP32)
    if where == "host" and stage in (1, 2):
        yield Item("weights copied back", "host", share * size)
        for place in ("host", "device"):
            yield Item("the largest gradient", place, shape.largest * size)


def _unsharded_gradients(shape: ModelShape, config: RunConfig, world_size: int) -> Iterator[Item]:
    """Yield the gradients of stage 0. In bf16 runs safecl adds them up in fp32 and gives DeepSpeed a bf16 copy;
    DeepSpeed makes an fp32 copy of that for the step."""
    yield Item("gradients", "device", shape.trained * FP32)
    if weight_bytes(config) == FP32:
        yield Item("communication buckets", "device", min(BUCKET, shape.trained) * FP32, "reduce")
        return
    for moment in ("backward", "reduce"):
        yield Item("gradients in bf16", "device", shape.trained * 2, moment)
    yield Item("gradients in bf16", "device", shape.trained * (2 + FP32), "step")


def _stage_1_gradients(shape: ModelShape, config: RunConfig, world_size: int) -> Iterator[Item]:
    """Yield the gradients of stage 1, which are whole on every rank until they are reduced."""
    bucket, share = min(BUCKET, shape.trained), share_of(shape.trained, world_size)
    if config.deepspeed.offload.optimizer == "cpu":
        yield Item("gradients", "host", share * FP32)
    elif weight_bytes(config) == 2:  # DeepSpeed's BF16_Optimizer
        yield Item("gradients", "device", shape.trained * FP32)
        yield Item("gradients in bf16", "device", shape.trained * 2)
        yield Item("communication buckets", "device", bucket * FP32, "reduce")
        return
    else:
        yield Item("gradients", "device", 2 * share * FP32, "step")
    yield Item("whole gradients", "device", shape.trained * FP32, "backward")
    yield Item("communication buckets", "device", (shape.trained + bucket) * FP32, "reduce")


def _stage_2_gradients(shape: ModelShape, config: RunConfig, world_size: int) -> Iterator[Item]:
    """Yield the gradients of stage 2. A bucket in the dtype of the weights is reduced as a flat copy, in bf16 runs
    through another copy in fp32."""
    size, share, bucket = weight_bytes(config), share_of(shape.trained, world_size), min(BUCKET, shape.trained)
    offloaded, in_bf16 = config.deepspeed.offload.optimizer == "cpu", weight_bytes(config) == 2
    if offloaded:
        yield Item("gradients", "host", share * FP32)
    if in_bf16 or not offloaded:
        yield Item("gradients" if not offloaded else "gradients in transit", "device", share * FP32)
    else:
        yield Item("gradients in transit", "host", share * FP32)
    if not in_bf16 and not offloaded:
        for moment in ("backward", "reduce", "step"):
            yield Item("gradients of a micro-batch", "device", share * FP32, moment)
    yield Item("communication buckets", "device", bucket * size, "backward")
    copies = bucket * (size + (FP32 if in_bf16 else 0))
    if shape.trained > BUCKET:
        yield Item("communication buckets", "device", copies, "backward")
    yield Item("communication buckets", "device", bucket * size + copies, "reduce")


def _stage_3_gradients(shape: ModelShape, config: RunConfig, world_size: int) -> Iterator[Item]:
    """Yield the gradients of stage 3: an fp32 bucket that stays, and a copy sorted by rank when it is reduced."""
    bucket, share = min(BUCKET, shape.trained) * FP32, share_of(shape.trained, world_size)
    offloaded = config.deepspeed.offload.optimizer == "cpu"
    where: Where = "host" if offloaded else "device"
    yield Item("gradients", where, share * FP32 * (2 if offloaded else 1))
    yield Item("communication buckets", "device", bucket)
    moments: tuple[Moment, ...] = ("backward", "reduce") if shape.trained > BUCKET else ("reduce",)
    for moment in moments:
        yield Item("communication buckets", "device", bucket, moment)
