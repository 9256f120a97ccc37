"""The tables of docs/memory.md: `python -m safecl.planning.costs.memory_tables` prints them."""

from __future__ import annotations

from typing import Any

from safecl.config import RunConfig
from safecl.engine.model.structure import parameters_on_meta
from safecl.planning.costs.device_memory import plan_memory
from safecl.planning.costs.model_shape import ModelShape
from safecl.planning.costs.planned_model import PlannedModel

SIZES: dict[str, dict[str, Any]] = {
    "1B": dict(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
        head_dim=64,
    ),
    "7B": dict(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    ),
    "13B": dict(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, vocab_size=32000
    ),
    "70B": dict(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=32000,
    ),
}
"""Settings of Llama 3.2 1B, and of Llama 2 7B, 13B and 70B."""

RANKS = (1, 8, 64)

DEVICE_COLUMNS = (
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
HOST_COLUMNS = ("reference weights", "copy for the checkpoint")


def shape_of_size(name: str, config: RunConfig) -> ModelShape:
    """Return the sizes of the model of that name in `SIZES`."""
    import transformers

    settings = transformers.LlamaConfig(**SIZES[name])
    with parameters_on_meta():
        return ModelShape.of(PlannedModel.of(transformers.LlamaForCausalLM(settings)), config)


def _example(optimizer: str) -> RunConfig:
    """Return a config with EWC and EMA. optimizer: "none" or "cpu", where the optimizer and the weights are."""
    place = {"optimizer": optimizer, "parameters": optimizer, "reference": "cpu", "fisher": "none", "ema": "none"}
    return RunConfig.model_validate(
        {
            "model": {"path": "model"},
            "tasks": [{"name": "task", "train": "task.jsonl"}],
            "memory": {"source": "safety.jsonl"},
            "methods": {"ewc": {}, "ema": {}},
            "deepspeed": {"stage": 3, "offload": place},
            "output": "run",
        }
    )


def markdown() -> str:
    """Return the tables of docs/memory.md."""
    shapes = {name: shape_of_size(name, _example("none")) for name in SIZES}
    parts = []
    for optimizer, title in (
        ("none", "Everything on the GPUs but theta_0"),
        ("cpu", "`offload: {optimizer: cpu, parameters: cpu}`"),
    ):
        config = _example(optimizer)
        rows = [_row(name, shape, config, ranks) for name, shape in shapes.items() for ranks in RANKS]
        head = ["model", "GPUs", *DEVICE_COLUMNS, "**a GPU**", *HOST_COLUMNS, "**host, a node**"]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *rows]
        parts.append(f"{title}; GB, of each GPU or (in italics) of host memory for it:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _row(name: str, shape: ModelShape, config: RunConfig, ranks: int) -> str:
    plan = plan_memory(shape, config, ranks)
    on_host = {item.what for item in plan.at_peak("host")}
    cells = [_gigabytes(plan.bytes_of(what), italic=what in on_host) for what in DEVICE_COLUMNS]
    host_cells = [_gigabytes(plan.bytes_of(what)) for what in HOST_COLUMNS]
    totals = [f"**{_gigabytes(count)}**" for count in (plan.device, plan.host)]
    return "| " + " | ".join([name, str(ranks), *cells, totals[0], *host_cells, totals[1]]) + " |"


def _gigabytes(count: int, italic: bool = False) -> str:
    text = f"{count / 1e9:,.1f}" if count >= 5e7 else f"{count / 1e9:.2f}" if count else "-"
    return f"*{text}*" if italic and count else text


if __name__ == "__main__":
    print(markdown())
