"""What lives where, in bytes, worked out from a model's structure and a config. `safecl check` prints it; docs/memory.md is made by it.

    python -m safecl.engine.memory_plan        # the tables of docs/memory.md

The arithmetic is DeepSpeed's: which tensors each ZeRO stage keeps, and which it makes for the time of a step. Activations depend on the
architecture and are an estimate.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn

from safecl.config import LoraConfig, RunConfig
from safecl.engine.placement import CHUNK, Placement, role_of
from safecl.engine.training import needs_reference, placement_of, streams_theta_0

FP32 = 4
RANKS_PER_NODE = 8
_BUCKET = 5 * 10**8  # elements of DeepSpeed's reduce and all-gather buckets
_LIVE = 10**9  # elements that stage 3 keeps gathered at most
_PREFETCH = 5 * 10**7  # elements that stage 3 gathers ahead
_HEAD_TILE = 2**30  # bytes of logits that the fused head forms at a time

Where = Literal["device", "host"]


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides how much memory it takes; numbers of weights."""

    weights: int
    trained: int
    largest_layer: int
    num_layers: int
    hidden: int
    intermediate: int
    vocab: int

    @classmethod
    def of(cls, model: nn.Module, lora: LoraConfig | None = None) -> ModelShape:
        """Of a model whose parameters may be on the meta device; with LoRA the adapters are what is trained."""
        weights = sum(p.numel() for p in model.parameters())
        layers = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=lambda m: sum(p.numel() for p in m.parameters()))
        settings = model.config.get_text_config()
        return cls(
            weights=weights,
            trained=weights if lora is None else sum(lora.r * sum(size) for size in _adapted(model, lora)),
            largest_layer=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
            num_layers=len(layers),
            hidden=settings.hidden_size,
            intermediate=getattr(settings, "intermediate_size", None) or 4 * settings.hidden_size,
            vocab=settings.vocab_size,
        )  # fmt: skip


def _adapted(model: nn.Module, lora: LoraConfig) -> Iterator[tuple[int, int]]:
    """(inputs, outputs) of the linear maps that get an adapter."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            if lora.target_modules == "all-linear" or any(_is_target(name, target) for target in lora.target_modules):
                yield module.in_features, module.out_features


def _is_target(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}") or fnmatchcase(name, target)


@dataclass(frozen=True)
class Item:
    """Something that takes memory: on one rank's device, in host memory for one rank, or in host memory once per node."""

    what: str
    where: Where
    nbytes: int
    per_node: bool = False
    estimate: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """All that a run keeps, on each of `world_size` ranks."""

    world_size: int
    ranks_per_node: int
    items: list[Item] = field(default_factory=list)

    @property
    def device(self) -> int:
        """Bytes on the device of a rank."""
        return sum(item.nbytes for item in self.items if item.where == "device")

    @property
    def host(self) -> int:
        """Bytes in the host memory of a node."""
        return sum(item.nbytes * (1 if item.per_node else self.ranks_per_node) for item in self.items if item.where == "host")

    def bytes_of(self, what: str) -> int:
        return sum(item.nbytes for item in self.items if item.what == what)


def plan_memory(shape: ModelShape, config: RunConfig, world_size: int, ranks_per_node: int | None = None) -> MemoryPlan:
    """Memory of a run of this config on so many ranks, in its first task, from the first step on."""
    per_node = min(world_size, ranks_per_node or RANKS_PER_NODE)
    plan = MemoryPlan(world_size, per_node)
    for work in (_weights, _gradients, _optimizer, _method_state, _reference, _activations):
        plan.items.extend(item for item in work(shape, config, world_size) if item.nbytes)
    return plan


def _share(count: int, world_size: int) -> int:
    return -(-count // world_size)


def _weight_bytes(config: RunConfig) -> int:
    return 2 if config.model.dtype == "bf16" else 4


def _weights(shape: ModelShape, config: RunConfig, world_size: int) -> Iterator[Item]:
    stage, size = config.deepspeed.stage, _weight_bytes(config)
    if stage < 3:
        yield Item("weights", "device", shape.weights * size)
        return
    where: Where = "host" if config.deepspeed.offload.parameters == "cpu" else "device"
    yield Item("weights", where, _share(shape.weights, world_size) * size)
    if world_size > 1 or where == "host":
        gathered = min(shape.weights, max(_LIVE, 2 * shape.largest_layer) + _PREFETCH)
        yield Item("gathered weights", "device", gathered * size)


def _gradients(shape: ModelShape, config: RunConfig, world_size: int) -> Iterator[Item]:
    """fp32 sums where the run is bf16, and what DeepSpeed flattens for the time of the step."""
    stage, offloaded, trained = config.deepspeed.stage, config.deepspeed.offload.optimizer == "cpu", shape.trained
    where: Where = "host" if offloaded else "device"
    if stage == 0:
        yield Item("gradients", "device", trained * (FP32 + 2 if config.model.dtype == "bf16" else FP32))
    elif stage == 1 and not offloaded and config.model.dtype == "bf16":
        yield Item("gradients", "device", trained * FP32)
    else:
        yield Item("gradients", where, 2 * _share(trained, world_size) * FP32)
    if stage > 0:
        yield Item("communication buckets", "device", min(_BUCKET, trained) * FP32)


def _optimizer(shape: ModelShape, config: RunConfig, world_size: int) -> Iterator[Item]:
    stage = config.deepspeed.stage
    where: Where = "host" if config.deepspeed.offload.optimizer == "cpu" else "device"
    share = shape.trained if stage == 0 else _share(shape.trained, world_size)
    if stage > 0 or config.model.dtype == "bf16":  # else the weights are the masters
        yield Item("master weights", where, share * FP32)
    yield Item("moments", where, 2 * share * FP32)


def _method_state(shape: ModelShape, config: RunConfig, world_size: int) -> Iterator[Item]:
    """Anchor, Fisher information, average and what else the methods keep; through device buffers where it is offloaded."""
    share = shape.trained if config.deepspeed.stage == 0 else _share(shape.trained, world_size)
    beside: Where = "host" if config.deepspeed.offload.optimizer == "cpu" else "device"
    placement, through = placement_of(config), 0
    for kind in dict.fromkeys(kind for settings in config.methods.values() for kind in settings.state_kinds):
        size, away = _element_bytes(kind, config, placement), placement.of(kind) == "cpu"
        if not (away and role_of(kind) == "reference" and needs_reference(config)):
            yield Item(kind.lstrip("_").replace("_", " "), "host" if away else beside, share * size)
        through += size if away and beside == "device" else 0
    yield Item("chunks of offloaded state", "device", 2 * min(CHUNK, share) * through)


def _element_bytes(kind: str, config: RunConfig, placement: Placement) -> int:
    """theta_0 has the run's dtype; what a first task with `role: align` has made of it is kept in fp32."""
    anchor = FP32 if config.tasks[0].role == "align" else _weight_bytes(config)
    return {"fisher": placement.fisher_dtype.itemsize, "reference": anchor}.get(role_of(kind), FP32)


def _reference(shape: ModelShape, config: RunConfig, world_size: int) -> Iterator[Item]:
    """theta_0 once per node. A teacher's layers pass through two device buffers."""
    size = _weight_bytes(config)
    if needs_reference(config) or streams_theta_0(config):
        yield Item("reference weights", "host", shape.weights * size, per_node=True)
    if streams_theta_0(config):
        resident = config.teacher == "resident"
        yield Item("teacher", "device", (shape.weights if resident else 2 * shape.largest_layer) * size)


def _activations(shape: ModelShape, config: RunConfig, world_size: int) -> Iterator[Item]:
    """Of a dense decoder: one hidden state per layer with gradient checkpointing, and what one layer works with; the head in tiles."""
    tokens, size = config.train.tokens_per_microbatch, _weight_bytes(config)
    layer = tokens * (10 * shape.hidden + 3 * shape.intermediate) * size
    kept = shape.num_layers * tokens * shape.hidden * size
    whole = layer + kept if config.model.gradient_checkpointing else layer * shape.num_layers
    head = min(_HEAD_TILE, tokens * shape.vocab * (FP32 + size)) + (shape.vocab * shape.hidden * FP32 if config.model.lora is None else 0)
    yield Item("activations", "device", whole + head, estimate=True)


# -------------------------------------------------------------------------------------------------------------------- showing


def format_bytes(count: int) -> str:
    """1234567890 -> "1.2 GB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def memory_lines(shape: ModelShape, config: RunConfig) -> list[tuple[str, str]]:
    """(what, value) lines for `safecl check`: on the ranks that are here, then on 8 and on 64."""
    here = ranks_here()
    plan = plan_memory(shape, config, here, local_ranks_here())
    lines = [("takes", f"{_totals(plan)}, on {here} rank{'s' if here > 1 else ''}")]
    for where in ("device", "host"):
        items = sorted((item for item in plan.items if item.where == where), key=lambda item: -item.nbytes)
        shown = [f"{item.what} {'about ' if item.estimate else ''}{format_bytes(item.nbytes)}" for item in items]
        if shown:
            lines.append((f"  {where}", ", ".join(shown)))
    lines += [(f"  on {ranks} ranks", _totals(plan_memory(shape, config, ranks))) for ranks in (8, 64) if ranks > here]
    if (note := _shortage(plan)) is not None:
        lines.append(("  too little", note))
    return lines


def ranks_here() -> int:
    """Ranks of the launcher that started this, else one per GPU."""
    return int(os.environ.get("WORLD_SIZE") or 1) if int(os.environ.get("WORLD_SIZE") or 1) > 1 else max(1, torch.cuda.device_count())


def local_ranks_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 0) or min(ranks_here(), max(1, torch.cuda.device_count()) if _has_gpu() else 10**6)


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _totals(plan: MemoryPlan) -> str:
    host = f", {format_bytes(plan.host)} of host memory on each node" if plan.host else ""
    return f"about {format_bytes(plan.device)} on each device{host}"


def _shortage(plan: MemoryPlan) -> str | None:
    """What does not fit on this machine; without a GPU the host holds everything."""
    from safecl.engine.shared_memory import available_memory

    host, device = plan.host, plan.device
    if not _has_gpu():
        host, device = host + device * plan.ranks_per_node, 0
    elif device > (there := torch.cuda.get_device_properties(0).total_memory):
        return f"a device has {format_bytes(there)}; use a higher deepspeed.stage, more ranks, offload, or smaller micro-batches"
    free = available_memory()
    if free is not None and host > free:
        return f"{format_bytes(host)} of host memory are needed and {format_bytes(free)} are available here"
    return None


# ---------------------------------------------------------------------------------------------------------------------- tables

SIZES = {
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
               vocab_size=128256, tie_word_embeddings=True, head_dim=64),
    "7B": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000),
    "13B": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, vocab_size=32000),
    "70B": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
                vocab_size=32000),
}  # fmt: skip
"""Llama 3.2 1B, Llama 2 7B, 13B and 70B."""
RANKS = (1, 8, 64)


def shape_of_size(name: str) -> ModelShape:
    import transformers

    from safecl.engine.loading import parameters_on_meta

    with parameters_on_meta():
        return ModelShape.of(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES[name])))


def _example(optimizer: str) -> RunConfig:
    place = {"optimizer": optimizer, "parameters": optimizer, "reference": "cpu", "fisher": "none", "ema": "none"}
    return RunConfig.model_validate({
        "model": {"path": "model"}, "tasks": [{"name": "task", "train": "task.jsonl"}], "memory": {"source": "safety.jsonl"},
        "methods": {"ewc": {}, "ema": {}}, "deepspeed": {"stage": 3, "offload": place}, "output": "run",
    })  # fmt: skip


_COLUMNS = (
    "weights",
    "gathered weights",
    "gradients",
    "communication buckets",
    "master weights",
    "moments",
    "fisher",
    "ema",
    "activations",
)


def markdown() -> str:
    """The tables of docs/memory.md."""
    shapes = {name: shape_of_size(name) for name in SIZES}
    parts = []
    for optimizer, title in (("none", "Everything on the GPUs but theta_0"), ("cpu", "`offload: {optimizer: cpu, parameters: cpu}`")):
        config = _example(optimizer)
        rows = [_row(name, shape, config, ranks) for name, shape in shapes.items() for ranks in RANKS]
        head = ["model", "GPUs", *_COLUMNS, "**a GPU**", "reference weights", "**host, a node**"]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *rows]
        parts.append(f"{title}; GB, of each GPU or (in italics) of host memory for it:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _row(name: str, shape: ModelShape, config: RunConfig, ranks: int) -> str:
    plan = plan_memory(shape, config, ranks)
    where = {item.what: item.where for item in plan.items}
    cells = [_gigabytes(plan.bytes_of(what), where.get(what) == "host") for what in _COLUMNS]
    totals = [f"**{_gigabytes(plan.device)}**", _gigabytes(plan.bytes_of("reference weights")), f"**{_gigabytes(plan.host)}**"]
    return "| " + " | ".join([name, str(ranks), *cells, *totals]) + " |"


def _gigabytes(count: int, italic: bool = False) -> str:
    text = f"{count / 1e9:,.1f}" if count >= 5e7 else f"{count / 1e9:.2f}" if count else "-"
    return f"*{text}*" if italic and count else text


if __name__ == "__main__":
    print(markdown())
