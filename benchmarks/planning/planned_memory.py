"""The memory plan against the engine itself, for models of 7B, 13B and 70B on 1, 8 and 64 ranks.

    python -m benchmarks.planning.planned_memory                       # all missing settings; four minutes of one core
    python -m benchmarks.planning.planned_memory --models 7b --fresh   # one model again

For each setting the engine of one rank is built in ZeRO-3 and makes three steps, with EWC, EMA and DER, on tensors that
have shapes and no data (benchmarks/engine/without_data.py), in a process group of that many ranks that sends nothing.
Every tensor is counted from its allocation to its end, on the device and in host memory together. All decoder layers
take the same, so the model is built with a few of its layers and with more, and the line through both peaks gives the
rest; `--all-layers` builds all of them (one to four minutes each). The plan is that of `safecl check` for this rank,
without gloo's own copies. Writes benchmarks/results/planned-memory.json and a table of docs/memory.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from multiprocessing.connection import Connection
from typing import Any

from benchmarks import ROOT
from benchmarks.engine import large_step
from benchmarks.engine.without_data import without_data
from benchmarks.harness import renew_page, write_json

RESULT = ROOT / "benchmarks" / "results" / "planned-memory.json"
LAYERS = {"7b": (8, 11), "13b": (4, 6), "70b": (2, 4)}
"""Layers with which a model is built: more than stage 3 keeps gathered at once."""
RANKS = (1, 8, 64)
OFFLOADS = {"none": "on the GPUs", "all": "optimizer and weights in host memory"}
KEYS = [f"{model} {ranks} {offload}" for offload in OFFLOADS for model in LAYERS for ranks in RANKS]
"""All settings."""
STEPS = 3
"""Steps of one micro-batch: DeepSpeed gathers ahead from the third pass on."""
BOUND = (0.9, 1.02)
"""Smallest and largest peak over its plan."""


def setting(model: str, ranks: int, offload: str, layers: int | None = None) -> argparse.Namespace:
    """Return the options of benchmarks/engine/step.py."""
    return argparse.Namespace(
        model=model, ranks=ranks, offload=offload, layers=layers, stage=3, steps=STEPS, micro_batches=1, tokens=8192,
        fake=True, device="cpu",
    )  # fmt: skip


def peak_of(options: argparse.Namespace) -> int:
    """Return the peak bytes of this setting, built in a process of its own."""
    context = multiprocessing.get_context("fork")  # what is imported here need not be imported again
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_construct, args=(options, sender))
    process.start()
    sender.close()
    peak: int = receiver.recv()
    process.join()
    return peak


def _construct(options: argparse.Namespace, pipe: Connection) -> None:
    from safecl.distributed import collectives

    large_step.become_a_rank(options.ranks)
    with without_data(options.ranks):
        collectives.init_distributed()
        pipe.send(large_step.count_bytes(large_step.safecl_side, options)["peak_bytes"])


def constructed(model: str, ranks: int, offload: str, *, all_layers: bool = False) -> int:
    """Return the peak bytes of a rank with all layers."""
    if all_layers:
        return peak_of(setting(model, ranks, offload))
    few, more = LAYERS[model]
    peaks = [peak_of(setting(model, ranks, offload, layers)) for layers in (few, more)]
    count = large_step.SHAPES[model]["num_hidden_layers"]
    return peaks[0] + (peaks[1] - peaks[0]) * (count - few) // (more - few)


def shape_of(model: str) -> Any:
    """Return the sizes that the plan needs, which do not depend on the ranks."""
    from safecl.planning.costs.model_shape import ModelShape
    from safecl.planning.costs.planned_model import PlannedModel

    options = setting(model, 1, "none")
    return ModelShape.of(PlannedModel.of(large_step.structure(options)), large_step.config_of(options))


def table(found: dict[str, dict]) -> str:
    """Return the table of docs/memory.md."""
    lines = ["| model | GPUs | state | planned, GB a rank | constructed | constructed / planned |", "|" + "---|" * 6]
    for key, row in found.items():
        model, ranks, offload = key.split()
        planned, peak = f"{row['planned'] / 1e9:,.1f}", f"{row['peak'] / 1e9:,.1f}"
        lines.append(f"| {model.upper()} | {ranks} | {OFFLOADS[offload]} | {planned} | {peak} | {row['ratio']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--ranks", nargs="+", type=int, choices=RANKS, default=RANKS)
    parser.add_argument("--fresh", action="store_true", help="construct again what is known")
    parser.add_argument("--all-layers", action="store_true", help="build the models with all of their layers")
    options = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    import deepspeed  # noqa: F401  # before the forks
    import transformers.models.llama.modeling_llama  # noqa: F401

    known = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    shapes: dict[str, Any] = {}
    for key in KEYS:
        model, ranks, offload = key.split()
        if model not in options.models or int(ranks) not in options.ranks or (key in known and not options.fresh):
            continue
        shape = shapes[model] = shapes.get(model) or shape_of(model)
        planned = large_step.planned_bytes(setting(model, int(ranks), offload), shape)
        peak = constructed(model, int(ranks), offload, all_layers=options.all_layers)
        known[key] = {"peak": peak, "planned": planned, "ratio": round(peak / planned, 3)}
        print(key, known[key], flush=True)
        write_json(RESULT, {key: known[key] for key in KEYS if key in known})
    renew_page(ROOT / "docs" / "memory.md", {"constructed": table(known)})


if __name__ == "__main__":
    main()
