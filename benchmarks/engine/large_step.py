"""One step of a large model in the engine, against plain DeepSpeed: `step.py --model 7b` runs it.

    python -m benchmarks.engine.step --device cuda --model 7b          on a GPU
    python -m benchmarks.engine.step --model 7b --fake                 anywhere: the same code without data

The model has random bf16 weights in the shape of Llama 2 7B, and ZeRO-2. Reference, Fisher and EMA are in host memory.
Two sides take turns in one process, since two of them do not fit a GPU:

    plain    DeepSpeed with its own Adam, cross-entropy on all tokens; the rival
    safecl   EWC (anchor from the reference store, bf16 Fisher), EMA (fp32), and DER on a tenth of the tokens from
             stored top-64 outputs

Both see the same number of tokens in micro-batches of the same size, with gradient checkpointing. Floors: the FLOPs of
the model at the GPU's peak, and the bytes of the offloaded state over the link. MFU counts 6 FLOPs per weight and
token; the recomputation of checkpointing is not counted. With --fake, tensors have shapes and no data, all of them are
counted from the first allocation to the last, and the peak is compared with the plan of `safecl check`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.engine.step_clock import Watch
from benchmarks.engine.without_data import fake_store, prepared_without_data, without_data
from benchmarks.harness import machine, write_json

SHAPES: dict[str, dict[str, int]] = {
    "tiny": dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, vocab_size=1000),
    "7b": dict(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    ),
    "13b": dict(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, vocab_size=32000
    ),
    "70b": dict(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=32000,
    ),
}
OFFLOADS: dict[str, dict[str, str]] = {
    "none": {"reference": "cpu"},
    "state": {"reference": "cpu", "fisher": "cpu", "ema": "cpu"},
    "all": {"reference": "cpu", "optimizer": "cpu", "parameters": "cpu"},
}
"""State in host memory: the reference weights alone; Fisher and average, too; or optimizer and weights (stage 3)."""
ROW, K = 512, 64
REPLAYED = 0.1
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}
LINK = 50e9
LR, STRENGTH, DECAY = 2e-5, 0.1, 0.999


def run(options: argparse.Namespace) -> dict:
    """Time both sides and return the report."""
    become_a_rank(options.ranks)
    # Both sides nearly fill a GPU: what is free must not be in pieces.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ["DS_ACCELERATOR"] = "cpu" if options.fake else options.device
    with without_data(options.ranks) if options.fake else contextlib.nullcontext():
        from safecl.distributed import collectives, devices

        collectives.init_distributed()
        report: dict[str, Any] = {"machine": machine(devices.device()), "setting": setting_of(options), "sides": {}}
        for name, build in {"plain": plain_side, "safecl": safecl_side}.items():
            if name in options.sides:
                report["sides"][name] = measured_or_too_large(build, options)
                if not options.fake:
                    report["summary"] = summary(report, options)
                write_json(options.out, report)  # after each side, so that an abort loses none
    torch.distributed.destroy_process_group()
    if options.fake:  # outside of the block, where models have sizes of their own
        report["summary"] = summary(report, options)
        write_json(options.out, report)
    print_report(report)
    return report


def become_a_rank(ranks: int) -> None:
    """Set what a launcher sets, where none has: this process is the first of so many."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29732")


def setting_of(options: argparse.Namespace) -> dict:
    return {
        "model": options.model,
        "layers": shape_of(options)["num_hidden_layers"],
        "zero": options.stage,
        "ranks": options.ranks,
        "offload": ", ".join(OFFLOADS[options.offload]),
        "average": "beside the next passes" if "ema" in OFFLOADS[options.offload] else "in the update",
        "tokens_per_microbatch": options.tokens,
        "micro_batches": options.micro_batches,
        "fake": options.fake,
    }


# ---------------------------------------------------------------------------------------------------------------- sides


def config_of(options: argparse.Namespace) -> Any:
    from safecl.config import RunConfig

    tree = {
        "model": {"path": options.model, "dtype": "bf16", "gradient_checkpointing": True},
        "tasks": [{"name": "task", "train": "unused"}],
        "methods": {"ewc": {"strength": STRENGTH}, "ema": {"decay": DECAY}, "der": {}},
        "memory": {"source": "unused", "replay_ratio": REPLAYED, "teacher": {"k": K}},
        "deepspeed": {"stage": options.stage, "offload": OFFLOADS[options.offload]},
        "train": {"tokens_per_microbatch": options.tokens, "max_length": min(ROW, options.tokens), "packing": "padded"},
        "checkpoint": {"every": "never"},
        "output": "unused",
    }
    return RunConfig.model_validate(tree)


def shape_of(options: argparse.Namespace) -> dict[str, int]:
    """The sizes of the model, with fewer layers where the options say so."""
    shape = SHAPES[options.model]
    return shape if options.layers is None else shape | {"num_hidden_layers": options.layers}


def structure(options: argparse.Namespace) -> Any:
    """The model without weights."""
    import transformers

    from safecl.engine.model.structure import parameters_on_meta

    settings = transformers.LlamaConfig(**shape_of(options), max_position_embeddings=4096, pad_token_id=None)
    with parameters_on_meta():
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    model.config.use_cache = False
    return model


def random_store(model: Any) -> Any:
    """A reference store of random weights: one block of normal values, repeated with a shift per parameter."""
    from safecl.engine.reference.store import ReferenceStore

    block = (0.02 * torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))).bfloat16()

    def fill(name: str, values: torch.Tensor) -> None:
        if "norm" in name:
            values.fill_(1.0)
            return
        shift = hash(name) % block.numel()
        for start in range(-shift, values.numel(), block.numel()):
            low, high = max(start, 0), min(start + block.numel(), values.numel())
            values[low:high] = block[low - start : high - start]

    return ReferenceStore.filled(model, fill)


def safecl_side(options: argparse.Namespace) -> tuple[Any, Callable[[], None], dict]:
    """(DeepSpeed's engine, one step, facts)."""
    from safecl.engine.model.language_model import LanguageModel
    from safecl.engine.model.structure import prepare_for_training
    from safecl.engine.passes.attention import start_attention
    from safecl.engine.passes.micro_batches import MicroBatchLayout
    from safecl.engine.passes.training_engine import TrainingEngine
    from safecl.engine.reference.loading import take_weights
    from safecl.engine.zero.update import UpdatePlan
    from safecl.methods.terms import Penalty

    config, model = config_of(options), structure(options)
    store = fake_store(model) if options.fake else random_store(model)
    take_weights(model, store)
    layout = MicroBatchLayout(options.ranks, options.tokens, packed=False)
    engine = TrainingEngine(LanguageModel(prepare_for_training(model, config.model)), config, layout, store)
    start_attention(engine, config.model, packing="padded", note=print)
    optimizer = engine.optimizer
    optimizer.take_base("anchor", torch.bfloat16)
    for fisher in optimizer.new_state("fisher", torch.bfloat16):
        fisher.fill_(1.0)
    optimizer.copy_weights_to("ema")
    penalty = Penalty(strength=STRENGTH, anchor="anchor", fisher="fisher")
    plan = UpdatePlan(lr=LR, clip_norm=1.0, ema_decay=DECAY, penalties=[penalty])
    rows = step_rows(options)
    batches = prepared_without_data(engine, rows) if options.fake else None

    def step() -> None:
        losses = engine.gradient_pass(rows, then=engine.update(plan), batches=batches)
        if not options.fake:
            losses.totals()

    return engine.deepspeed, step, {"attention": config.model.attention, "weights": engine.shards.numel}


def step_rows(options: argparse.Namespace) -> list[Any]:
    """Rows of random tokens that fill the micro-batches; a tenth of them are replayed with stored outputs."""
    from safecl.data import Row
    from safecl.engine.passes.step_rows import Distillation, StepRow
    from safecl.replay import TeacherOutputs

    rng, vocab = np.random.default_rng(0), SHAPES[options.model]["vocab_size"]
    length = min(ROW, options.tokens)
    count = options.ranks * options.micro_batches * (options.tokens // length)
    replayed = max(1, round(REPLAYED * count))
    mask = np.arange(length) > 0
    log_probs = np.log(np.full((length - 1, K), 0.9 / K)).astype(np.float16)
    tails = np.full(length - 1, np.log(0.1), np.float32)
    rows = []
    for number in range(count):
        row = Row(number, rng.integers(3, vocab, length).astype(np.int32), mask)
        is_replayed = number < replayed
        indices = np.resize(distinct(rng, vocab), (length - 1, K)).astype(np.int32) if is_replayed else None
        outputs = TeacherOutputs(log_probs, indices, tails) if is_replayed else None
        weight = 1.0 / ((length - 1) * (replayed if is_replayed else count - replayed))
        distance = (Distillation("forward_kl", weight),) if is_replayed else ()
        rows.append(
            StepRow(
                "replay" if is_replayed else "task",
                length,
                length - 1,
                lambda row=row, outputs=outputs: (row, outputs),
                ce_weight=0.0 if is_replayed else weight,
                distillations=distance,
            )
        )
    return rows


def distinct(rng: np.random.Generator, vocab: int) -> np.ndarray:
    """64 distinct tokens for each of 16 positions; positions repeat them."""
    return np.stack([rng.choice(vocab, K, replace=False) for _ in range(16)])


def plain_side(options: argparse.Namespace) -> tuple[Any, Callable[[], None], dict]:
    """(DeepSpeed's engine, one step, facts)."""
    import deepspeed

    from safecl.distributed import devices
    from safecl.engine.model.structure import prepare_for_training
    from safecl.engine.reference.loading import take_weights

    config, model = config_of(options), structure(options)
    store = fake_store(model) if options.fake else random_store(model)
    take_weights(model, store)
    prepare_for_training(model, config.model)
    for p in model.parameters():
        p.data = p.data.to(devices.device()) if not options.fake else p.data.clone()
    store.close()
    adam, name = own_adam(options)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": options.micro_batches,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "torch_adam": not adam}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    vocab, length = SHAPES[options.model]["vocab_size"], min(ROW, options.tokens)
    batches = [
        torch.randint(3, vocab, (options.tokens // length, length)).to(engine.device)
        for _ in range(options.micro_batches)
    ]

    def step() -> None:
        for batch in batches:
            engine.backward(engine(input_ids=batch, labels=batch).loss)
            engine.step()

    return engine, step, {"optimizer": name, "weights": sum(p.numel() for p in model.parameters())}


def own_adam(options: argparse.Namespace) -> tuple[bool, str]:
    """Whether DeepSpeed's FusedAdam can be built here, and the name of the optimizer."""
    if options.fake or options.device == "cpu":
        return False, "torch.optim.AdamW"
    try:
        from deepspeed.ops.op_builder import FusedAdamBuilder

        FusedAdamBuilder().load(verbose=False)
    except Exception as error:  # no nvcc, no compiler, a broken cache: each has an error of its own
        return False, f"torch.optim.AdamW (FusedAdam cannot be built: {str(error).splitlines()[0][:80]})"
    return True, "FusedAdam"


# ------------------------------------------------------------------------------------------------------------ measuring


def measured_or_too_large(build: Callable[..., Any], options: argparse.Namespace) -> dict:
    """Measure a side; where it does not fit the GPU, say so and go on."""
    try:
        return measure(build, options)
    except torch.OutOfMemoryError as error:
        problem = str(error).splitlines()[0][:160]
    print(f"does not fit: {problem}")
    gc.collect()  # the traceback is gone, and with it the side
    torch.cuda.empty_cache()
    return {"problem": problem}


def measure(build: Callable[..., tuple[Any, Callable[[], None], dict]], options: argparse.Namespace) -> dict:
    """Build a side, make a first step, time the others, and forget the side.

    The timed steps follow each other without a wait, as in training: what a step leaves to be done beside the next one
    is hidden there.
    """
    from safecl.kernels import page_locked

    if options.fake:
        return count_bytes(build, options)
    cuda = options.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    engine, step, facts = build(options)
    facts["seconds_to_build"] = round(time.perf_counter() - began, 1)
    step()
    watch = Watch(engine, cuda)
    for _ in range(options.steps):
        watch.begin_step()
        step()
    facts["steps"] = [{name: round(value, 4) for name, value in one.items()} for one in watch.seconds()]
    facts["peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else None
    facts["page_locked_bytes"] = page_locked.locked_bytes()
    engine.destroy()
    del engine, step, watch
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return facts


def count_bytes(build: Callable[..., tuple[Any, Callable[[], None], dict]], options: argparse.Namespace) -> dict:
    """Build a side and make its steps, and count every tensor."""
    from safecl.planning.costs.activations import LiveBytes

    began = time.perf_counter()
    with LiveBytes() as live:
        engine, step, facts = build(options)
        facts["bytes_when_built"] = live.now
        facts["peak_of_building"] = live.peak
        for _ in range(options.steps):
            step()
        assert live.now > facts["bytes_when_built"], "no step was applied: the moments are not there"
        facts |= {"peak_bytes": live.peak, "bytes_at_the_end": live.now}
        engine.destroy()
        del engine, step
        gc.collect()
    facts["seconds"] = round(time.perf_counter() - began, 1)
    return facts


# -------------------------------------------------------------------------------------------------------------- summary


def plan_of(options: argparse.Namespace, shape: Any = None) -> Any:
    """The memory plan of a rank on safecl's side. shape: the model's, if it is known."""
    from safecl.planning.costs.device_memory import plan_memory
    from safecl.planning.costs.model_shape import ModelShape
    from safecl.planning.costs.planned_model import PlannedModel

    config = config_of(options)
    shape = shape or ModelShape.of(PlannedModel.of(structure(options)), config)
    return plan_memory(shape, config, options.ranks, 1, device="cpu" if options.fake else "cuda")


def planned_bytes(options: argparse.Namespace, shape: Any = None) -> int:
    """The plan's peak of a rank on safecl's side: on its device; with --fake, where all is in one memory and nothing is
    sent, on device and host together, without the copies of a process group. shape: the model's, if it is known."""
    from safecl.planning.costs.zero_memory import COPIES_OF_GLOO

    plan = plan_of(options, shape)
    if not options.fake:
        return plan.device
    items = [item for item in plan.items if item.what != COPIES_OF_GLOO]
    return dataclasses.replace(plan, items=items).shared_host


def summary(report: dict, options: argparse.Namespace) -> dict:
    """Rates, the share of the peak, the floors, and the peak beside the plan."""
    sides, found = report["sides"], dict[str, Any]()
    if "safecl" in sides and sides["safecl"].get("peak_bytes"):
        planned = planned_bytes(options)
        peak = sides["safecl"]["peak_bytes"]
        found["memory"] = {"peak": peak, "planned": planned, "ratio": round(peak / planned, 3)}
        found["memory"]["met"] = 0.9 <= peak / planned <= 1.1
    if "page_locked_bytes" in sides.get("safecl", {}):
        found["page_locked"] = page_locked_beside_the_plan(sides["safecl"]["page_locked_bytes"], options)
    if options.fake:
        return found
    tokens = options.tokens * options.micro_batches
    peak_flops = next((value for name, value in PEAK_FLOPS.items() if name in report["machine"].get("gpu", "")), None)
    for name, side in sides.items():
        if "problem" in side:
            found[name] = side
            continue
        phases = {key: statistics.median(one[key] for one in side["steps"]) for key in side["steps"][0]}
        rate = tokens / phases["whole step"]
        row = {"tokens_per_second": round(rate), "seconds": {key: round(value, 3) for key, value in phases.items()}}
        if peak_flops:
            row["mfu"] = round(6 * side["weights"] * rate / peak_flops, 3)
            row["floor_seconds"] = round(8 * side["weights"] * tokens / peak_flops, 3)
        if name == "safecl":  # anchor and Fisher in bf16 come in; what the average takes overlaps
            row["offload_floor_seconds"] = round((2 + 2) * side["weights"] / LINK, 3)
        found[name] = row
    if all("seconds" in found.get(name, {}) for name in ("plain", "safecl")):
        ratio = found["safecl"]["seconds"]["whole step"] / found["plain"]["seconds"]["whole step"]
        found["ratio"] = round(ratio, 3)
    return found


def page_locked_beside_the_plan(locked: int, options: argparse.Namespace) -> dict:
    """The state in host memory, which a GPU's run locks exactly, up to whole pages for each tensor."""
    items = plan_of(options).items if options.device == "cuda" else []
    planned = sum(item.nbytes for item in items if item.where == "host" and item.what in ("fisher", "ema"))
    return {"locked": locked, "planned": planned, "met": abs(locked - planned) <= 2**20}


def print_report(report: dict) -> None:
    for name, values in report["summary"].items():
        print(f"{name}: {values}")
