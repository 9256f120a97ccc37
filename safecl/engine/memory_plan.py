"""What lives where, in bytes, worked out from a model's structure and a config. `safecl check` prints it; docs/memory.md is made by it.

    python -m safecl.engine.memory_plan        # the tables of docs/memory.md

Which tensors each ZeRO stage keeps and makes for a while is in safecl.engine.zero_memory; activations are counted by running the model on
tensors without memory (safecl.engine.activations). What is alive at the same time is added up: all that stays, and of what passes by, that
of the fullest moment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn

from safecl.config import LoraConfig, RunConfig
from safecl.engine.placement import CHUNK, Placement, role_of
from safecl.engine.training import needs_reference, placement_of, streams_theta_0

FP32 = 4
RANKS_PER_NODE = 8

Where = Literal["device", "host"]
Moment = Literal["always", "backward", "reduce", "step"]
"""When something is there: all the time, while activations are, when gradients are reduced, in the optimizer's step."""


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides how much memory it takes; numbers of weights, and bytes of activations."""

    weights: int
    trained: int
    largest: int
    """The largest trained parameter."""
    largest_layer: int
    hidden: int
    vocab: int
    activations: int = 0
    """Bytes at the peak of a micro-batch, the head's logits left out."""

    @classmethod
    def of(cls, model: nn.Module, config: RunConfig) -> ModelShape:
        """Of a model whose parameters may be on the meta device; with LoRA the adapters are what is trained."""
        from safecl.engine.activations import activation_bytes

        alone = cls.without_activations(model, config.model.lora)
        return replace(alone, activations=activation_bytes(model.config, config.model, _rows(config), masked=_is_masked(config)))

    @classmethod
    def without_activations(cls, model: nn.Module, lora: LoraConfig | None = None) -> ModelShape:
        weights = sum(p.numel() for p in model.parameters())
        layers = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=lambda m: sum(p.numel() for p in m.parameters()))
        settings = model.config.get_text_config()
        adapters = [lora.r * count for sizes in _adapted(model, lora) for count in sizes] if lora is not None else []
        return cls(
            weights=weights,
            trained=weights if lora is None else sum(adapters),
            largest=max(adapters) if adapters else max(p.numel() for p in model.parameters()),
            largest_layer=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
            hidden=settings.hidden_size,
            vocab=settings.vocab_size,
        )  # fmt: skip


def _rows(config: RunConfig) -> tuple[int, int]:
    """[rows, tokens] of a full micro-batch of the longest rows."""
    tokens = config.train.tokens_per_microbatch
    length = tokens if config.train.packing == "packed" else min(config.train.max_length, tokens)
    return -(-tokens // length), length


def _is_masked(config: RunConfig) -> bool:
    """Packed documents are kept apart by a mask, but for flash attention, which knows where they begin."""
    from safecl.engine.model import choose_attention

    return config.train.packing == "packed" and choose_attention(config.model.attention)[0] != "flash_attention_2"


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
    moment: Moment = "always"
    per_node: bool = False


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
        passing = {moment: [item for item in there if item.moment == moment] for moment in ("backward", "reduce", "step")}
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
    """Memory of a run of this config on so many ranks, in its first task, from the first step on; without evaluation, and without what
    is mapped from files (rows, stored outputs).

    `device`: cuda or cpu, where the head works in other tiles. `teachers`: further models that are asked in every step.
    """
    from safecl.engine.zero_memory import zero_items

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


def share_of(count: int, world_size: int) -> int:
    """Elements of a rank's shard."""
    return -(-count // world_size)


def weight_bytes(config: RunConfig) -> int:
    return 2 if config.model.dtype == "bf16" else FP32


def _method_state(shape: ModelShape, config: RunConfig, world_size: int, device: str) -> Iterator[Item]:
    """Anchor, Fisher information, average and what else the methods keep; through device buffers where it is offloaded."""
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
    """A save copies the rank's state to host memory and writes it while training goes on; the copy's memory is used again."""
    if config.checkpoint.every == "never":
        return
    placement, base = placement_of(config), config.tasks[0].role != "align" and config.model.lora is None
    kinds = [kind for kind in state_kinds(config) if not kind.startswith("_") and not (base and role_of(kind) == "reference")]
    per_weight = 3 * FP32 + sum(_element_bytes(kind, config, placement) for kind in kinds)
    yield Item("copy for the checkpoint", "host", share_of(shape.trained, world_size) * per_weight)


def _activations(shape: ModelShape, config: RunConfig, device: str) -> Iterator[Item]:
    from safecl.engine.model import DTYPES
    from safecl.kernels.head_driver import workspace_bytes

    online = config.model.lora is not None and bool(config.online_teachers)
    head = workspace_bytes(
        config.train.tokens_per_microbatch, shape.vocab, shape.hidden, DTYPES[config.model.dtype], torch.device(device), teacher=online
    )
    yield Item("activations", "device", shape.activations, "backward")
    yield Item("logits", "device", head, "backward")


# -------------------------------------------------------------------------------------------------------------------- showing


def format_bytes(count: int) -> str:
    """1234567890 -> "1.2 GB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


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

    host = plan.host if _has_gpu() else plan.shared_host
    if _has_gpu() and plan.device > (there := torch.cuda.get_device_properties(0).total_memory):
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


def shape_of_size(name: str, config: RunConfig) -> ModelShape:
    import transformers

    from safecl.engine.loading import parameters_on_meta

    with parameters_on_meta():
        return ModelShape.of(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES[name])), config)


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
    "logits",
)


_ON_THE_HOST = ("reference weights", "copy for the checkpoint")


def markdown() -> str:
    """The tables of docs/memory.md."""
    shapes = {name: shape_of_size(name, _example("none")) for name in SIZES}
    parts = []
    for optimizer, title in (("none", "Everything on the GPUs but theta_0"), ("cpu", "`offload: {optimizer: cpu, parameters: cpu}`")):
        config = _example(optimizer)
        rows = [_row(name, shape, config, ranks) for name, shape in shapes.items() for ranks in RANKS]
        head = ["model", "GPUs", *_COLUMNS, "**a GPU**", *_ON_THE_HOST, "**host, a node**"]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *rows]
        parts.append(f"{title}; GB, of each GPU or (in italics) of host memory for it:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _row(name: str, shape: ModelShape, config: RunConfig, ranks: int) -> str:
    plan = plan_memory(shape, config, ranks)
    where = {item.what: item.where for place in ("device", "host") for item in plan.at_peak(place)}
    cells = [_gigabytes(plan.bytes_of(what), where.get(what) == "host") for what in _COLUMNS]
    on_the_host = [_gigabytes(plan.bytes_of(what)) for what in _ON_THE_HOST]
    return (
        "| " + " | ".join([name, str(ranks), *cells, f"**{_gigabytes(plan.device)}**", *on_the_host, f"**{_gigabytes(plan.host)}**"]) + " |"
    )


def _gigabytes(count: int, italic: bool = False) -> str:
    text = f"{count / 1e9:,.1f}" if count >= 5e7 else f"{count / 1e9:.2f}" if count else "-"
    return f"*{text}*" if italic and count else text


if __name__ == "__main__":
    print(markdown())
