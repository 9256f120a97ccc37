"""The cost model of step time and bytes, from 8 to 4,096 GPUs and 7B to 405B, beside every point that was measured.

    python -m benchmarks.planning.scaling              renews the tables of docs/scaling.md and heads of launch/recipes
    python -m benchmarks.planning.scaling --measure    also counts bytes between two hosts in network namespaces (root)

The model is safecl/planning/costs/step_time.py, with the bytes of safecl/planning/costs/device_memory.py. It needs no
GPU and no weights: models are made on the meta device. The roof is the hardware; the rivals are published
throughputs.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmarks import ROOT
from safecl.config import RunConfig, load_config
from safecl.planning.costs.device_memory import plan_memory, streamed_bytes
from safecl.planning.costs.model_shape import ModelShape
from safecl.planning.costs.planned_model import PlannedModel
from safecl.planning.costs.step_report import prediction
from safecl.planning.costs.step_time import (
    DEVICES,
    Cluster,
    bytes_per_weight,
    exchanged_bytes,
    forward_flops,
    step_time,
    teacher_seconds,
)

RECIPES = ROOT / "launch" / "recipes"
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
RANKS = (8, 32, 128, 512, 1024, 4096)
MODELS = {"llama-2-7b": 2, "llama-3-8b": 3, "llama-3-70b": 3, "llama-3-405b": 3}
TOKENS_PER_RANK = 16384
PREDICTED = ("# launched: ", "# step: ")
EWC_EMA = {"er": {}, "ewc": {}, "ema": {}}


@functools.cache
def model_of(name: str):
    """Return a model of the shapes file, on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(json.loads((RECIPES / "shapes.json").read_text())[name])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def config_of(stage: int, methods: dict | None = None, offload: dict | None = None, **train: object) -> RunConfig:
    """Return the config of the tables: replay of a tenth, micro-batches of 8,192 tokens."""
    tree = {
        "model": {"path": "m"},
        "tasks": [{"name": "a", "train": "t"}],
        "memory": {"source": "r", "replay_ratio": 0.1},
        "methods": methods or {},
        "train": {"tokens_per_microbatch": 8192, "max_length": 2048, "packing": "packed", **train},
        "deepspeed": {"stage": stage, "offload": offload or {}},
        "output": "o",
    }
    return RunConfig.model_validate(tree)


@functools.cache
def shape_of(name: str) -> ModelShape:
    """Return the sizes of a model in the runs of the tables, which do not depend on stage and methods."""
    return ModelShape.of(PlannedModel.of(model_of(name)), config_of(3))


# --------------------------------------------------------------------------------------------------------------- tables


def scaling_table() -> str:
    """Weak scaling: 16,384 task tokens a rank and step, replay, EWC and an average."""
    lines = [
        "| model | stage | GPUs | GB a GPU | s a step | exchange | tokens/s a GPU |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, stage in MODELS.items():
        config = config_of(stage, EWC_EMA)
        shape = shape_of(name)
        for ranks in RANKS:
            memory = plan_memory(shape, config, ranks, 8, device="cuda").device / 1e9
            time = step_time(shape, config, Cluster(DEVICES["H100"], ranks), TOKENS_PER_RANK * ranks)
            fits = f"{memory:,.0f}" if memory < 80 else f"{memory:,.0f} (too much)"
            rate = time.tokens / time.seconds / ranks
            lines.append(
                f"| {name} | {stage} | {ranks:,} | {fits} | {time.seconds:.2f} | {time.exchange / time.seconds:.0%} | "
                f"{rate:,.0f} |"
            )
    return "\n".join(lines)


def volume_table() -> str:
    """Bytes that a rank sends in a step of two micro-batches, for 7B and 70B on 64 ranks."""
    lines = ["| stage | 7B | 70B | 7B, one micro-batch |", "|---|---|---|---|"]
    for stage in (0, 1, 2, 3):
        cells = []
        for name, tokens in (("llama-2-7b", 16384), ("llama-3-70b", 16384), ("llama-2-7b", 8192)):
            config = config_of(stage)
            shape = shape_of(name)
            time = step_time(shape, config, Cluster(DEVICES["H100"], 64), tokens * 64)
            cells.append(f"{time.sent / 1e9:,.0f} GB")
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n".join(lines)


METHODS = {
    "plain fine-tuning": {},
    "er": {"er": {}},
    "er, ema": {"er": {}, "ema": {}},
    "er, ewc": {"er": {}, "ewc": {}},
    "er, ewc, ema": EWC_EMA,
    "agem": {"agem": {}},
    "lwf, asked in every step": {"lwf": {"outputs": "online"}},
}


def methods_table() -> str:
    """What continual learning adds to 7B on 8 GPUs and 70B on 64, in stage 3."""
    lines = ["| methods | bytes a weight in the update | 7B, 8 GPUs | 70B, 64 GPUs |", "|---|---|---|---|"]
    plain: dict[str, float] = {}
    for label, methods in METHODS.items():
        config, cells = config_of(3, methods), []
        for name, ranks in (("llama-2-7b", 8), ("llama-3-70b", 64)):
            shape = shape_of(name)
            seconds = step_time(shape, config, Cluster(DEVICES["H100"], ranks), TOKENS_PER_RANK * ranks).seconds
            cells.append(f"{seconds:.2f} s ({seconds / plain.setdefault(name, seconds) - 1:+.0%})")
        lines.append(f"| {label} | {bytes_per_weight(config):.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------- checks


def checks_table() -> str:
    """The model beside what was measured, by safecl here and by others."""
    lines = ["| point | measured | model | model / measured |", "|---|---|---|---|"]
    for what, measured, model, unit in [*published_points(), *gpu_points(), *own_points()]:
        digits = 0 if measured >= 1000 else 2
        values = f"{measured:,.{digits}f} {unit} | {model:,.{digits}f} {unit}"
        lines.append(f"| {what} | {values} | {model / measured:.2f} |")
    return "\n".join(lines)


def published_points() -> list[tuple[str, float, float, str]]:
    """Training throughput of others on 8 H100, without replay. They overlap the exchange, which safecl does not do."""
    points = []
    for what, name, measured in (
        ("llm-foundry, 7B, 8 H100, 2,048 tokens (README)", "llama-2-7b", 10643.0),
        ("torchtitan, 8B, 8 H100, compiled bf16 (README)", "llama-3-8b", 6667.0),
    ):
        config = config_of(3)
        shape = shape_of(name)
        time = step_time(shape, config, Cluster(DEVICES["H100"], 8), 32768 * 8)
        points.append((what, measured, time.tokens / time.seconds / 8, "tokens/s a GPU"))
    return points


def gpu_points() -> list[tuple[str, float, float, str]]:
    """Steps, updates and teachers that were measured on one H200, from the results of the other benchmarks."""
    device, points = DEVICES["H200"], []
    one = Cluster(device, 1, 1)
    step = read_results("engine-step-7b-cuda")
    shape, tokens = shape_of("llama-2-7b"), step["setting"]["micro_batches"] * step["setting"]["tokens_per_microbatch"]
    host = {"reference": "cpu", "fisher": "cpu", "ema": "cpu"}
    for side, methods in (("plain", {}), ("safecl", {"ewc": {}, "ema": {}})):
        config = config_of(2, methods, packing="padded", max_length=512, offload=host)
        config.memory = None  # the tokens of the step hold the replayed ones
        measured = step["summary"][side]["seconds"]
        time = step_time(shape, config, one, tokens)
        predicted = time.seconds
        if methods and "average" not in step["setting"]:  # measured with the average inside the update
            predicted += shape.trained * streamed_bytes(config) / device.host - time.update
        what = {"plain": "plain DeepSpeed", "safecl": "safecl, EWC, EMA and DER, state in host memory"}[side]
        points.append((f"7B, ZeRO-2, one H200, {what}: a step", measured["whole step"], predicted, "s"))
    memory = step["summary"]["memory"]
    points.append(("the same, safecl: device memory", memory["peak"] / 1e9, memory["planned"] / 1e9, "GB"))
    flat = read_results("flat-cuda")["cases"]["step"]
    row = flat["rows"]["fused"]
    seconds = flat["numel"] * bytes_per_weight(config_of(2, {"ewc": {}, "ema": {}})) / device.memory
    points.append(("update of 875 M weights with EWC and EMA on one H200", row["ms"], 1e3 * seconds, "ms"))
    away = read_results("reference-cuda")["offload"]
    update = away["weights"] * streamed_bytes(config_of(2, {"ewc": {}, "ema": {}}, offload=host)) / device.host
    what = f"updates alone of {away['weights'] / 1e6:,.0f} M weights, anchor, Fisher and EMA in host memory"
    points.append((what, 1e3 * away["seconds_offloaded"], 1e3 * update, "ms"))
    lwf = config_of(2, {"lwf": {"outputs": "online"}})
    for one_pass in read_results("teacher-cuda")["passes"]:
        forward = forward_flops(shape, lwf) * one_pass["tokens"] / device.flops
        seconds = teacher_seconds(shape, lwf, device, forward)
        what = f"streamed teacher of 7B on one H200, {one_pass['tokens']:,} tokens"
        points.append((what, one_pass["ms"]["streamed"], 1e3 * seconds, "ms"))
    return points


def own_points() -> list[tuple[str, float, float, str]]:
    """Bytes that each of two hosts sends in a step (--measure), by stage."""
    results, points = read_results("scaling"), []
    setting = results["setting"]
    weights, hosts = setting["weights"], setting["hosts"]
    shape = ModelShape(weights, weights, largest=0, largest_layer=0, hidden=0, vocab=0, layers=4)
    for stage, measured in results["megabytes_a_step"].items():
        config = config_of(int(stage))
        config.model.dtype = setting["dtype"]
        model = exchanged_bytes(shape, config, setting["micro_batches"]) * (hosts - 1) / hosts / 1e6
        points.append((f"two hosts, 1 M weights in fp32, stage {stage}: sent in a step", measured, model, "MB"))
    return points


def read_results(name: str) -> dict:
    return json.loads((RESULTS.parent / f"{name}.json").read_text())


# ---------------------------------------------------------------------------------------------------------------- files


def recipe_head(path: Path) -> str:
    """Return what is predicted for a recipe, as comment lines."""
    config = load_config(path)
    name = next(key for key in json.loads((RECIPES / "shapes.json").read_text()) if path.name.startswith(key))
    tokens = config.train.tokens_per_batch
    assert isinstance(tokens, int), f"{path}: a recipe says how many tokens a step has"
    lines = prediction(ModelShape.of(PlannedModel.of(model_of(name)), config), config, tokens)
    return "\n".join(f"# {label.strip()}: {text}" for label, text in lines)


def recipes() -> list[Path]:
    return sorted(RECIPES.glob("*/*.yaml"))


def with_head(path: Path) -> str:
    """Return the text of a recipe with its predictions below its command."""
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith(PREDICTED)]
    below = next(i for i, line in enumerate(kept) if line.startswith("#     safecl launch")) + 2
    return "\n".join([*kept[:below], recipe_head(path), *kept[below:]]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="count the bytes between two hosts in namespaces")
    if parser.parse_args().measure:
        measure()
    from benchmarks.harness import renew_page

    for path in recipes():
        path.write_text(with_head(path), encoding="utf-8")
        print(f"renewed {path}")
    tables = {
        "volumes": volume_table(),
        "scaling": scaling_table(),
        "methods": methods_table(),
        "checks": checks_table(),
    }
    renew_page(ROOT / "docs" / "scaling.md", tables)


def measure() -> None:
    """Count what two hosts send each other in a step of each stage."""
    from benchmarks.harness import write_json
    from benchmarks.planning.scaling_bytes import bytes_by_stage

    write_json(RESULTS, bytes_by_stage())


if __name__ == "__main__":
    main()
