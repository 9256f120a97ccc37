"""Memory of the reference weights: shared by ranks, at the start of a run, and during a run against its plan.

    python -m benchmarks.engine.reference                         # all figures of the CPU; GBs of memory and of /tmp
    python -m benchmarks.engine.reference --only sharing
    python -m benchmarks.engine.reference --only offload --device cuda

sharing    ranks read and lock every byte of one store: the sum of their proportional set sizes; roof: one copy
loading    all ranks start ZeRO-3 from a checkpoint: the peak beyond what training keeps, in models; rival: every rank
           loads the model
planned    two steps of EWC and EMA in every stage, with and without offload and checkpointing: the peak relative to the
           plan that `safecl check` prints
offload    updates, and steps of products and an update, with anchor, Fisher and EMA in host memory: the added time;
           roof: the same with all of them on the device (GPU)

No numbers are compared, so there is no error column. Writes benchmarks/results/reference.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks import ROOT
from benchmarks.harness import machine, seconds_of, write_json
from tests.pool import RankPool

RESULT = ROOT / "benchmarks" / "results" / "reference.json"
LIMITS = {65_536: 0.15, 262_144: 0.04}
"""Largest share of a step, by its tokens, that state in host memory should add."""


def save_model(folder: str, megabytes: int, layers: int = 8, vocabulary: int = 1024) -> int:
    """Save a bf16 Llama of about `megabytes`, and return the bytes of its weights."""
    import transformers

    hidden = 64 * max(1, round((megabytes * 1e6 / 2 / (layers * 12)) ** 0.5 / 64))
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    return sum(p.nbytes for p in model.parameters())


# ------------------------------------------------------------------------------------------------------------ measuring


def proportional_bytes(pid: int | str = "self") -> int:
    """Return the proportional set size of a process: its own pages and its part of shared pages."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return 1024 * int(line.split()[1])
    return 0


class Peak:
    """The largest sum of proportional set sizes of some processes while the block runs, read every 20 ms."""

    def __init__(self, pids: list[int]):
        self.pids, self.bytes = pids, 0
        self._stop = threading.Event()

    def __enter__(self) -> Peak:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.bytes = max(self.bytes, sum(map(proportional_bytes, self.pids)))


def on_ranks(world_size: int, work: Callable[[RankPool, list[int]], dict]) -> dict:
    pool = RankPool(world_size, timeout=1800.0)  # long, because the machine may be shared
    try:
        return work(pool, [process.pid for process in pool.processes])
    finally:
        pool.close()


_kept: dict = {}


def open_and_lock(path: str) -> dict:
    """Open the store, read every byte and lock it in memory."""
    from safecl import ReferenceStore

    _kept.clear()
    before = trim()
    store = _kept["store"] = ReferenceStore.open(path, dtype=torch.bfloat16)
    total = sum(int(store.tensor(name).view(-1).view(torch.int16).max()) for name in store.names())
    libc = ctypes.CDLL(None, use_errno=True)
    start = min(store.tensor(name).data_ptr() for name in store.names())
    locked = libc.mlock(ctypes.c_void_p(start), ctypes.c_size_t(store.nbytes)) == 0
    return {"before": before, "largest": total, "locked": locked, "nbytes": store.nbytes}


def sharing(world_size: int = 4, megabytes: int = 400) -> dict:
    def work(pool: RankPool, pids: list[int]) -> dict:
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as small:
            save_model(small, 1)
            pool.run(open_and_lock, path=small)  # imports, and the structure of a model
            pool.run(warm_up)
            save_model(folder, megabytes)
            ranks = pool.run(open_and_lock, path=folder)
            after = pool.run(trim)
        one = ranks[0]["nbytes"]
        grown = sum(after) - sum(rank["before"] for rank in ranks)
        return {
            "ranks": world_size, "store_bytes": one, "locked": all(rank["locked"] for rank in ranks),
            "grown_bytes": grown, "copies": round(grown / one, 4), "limit": 1.1,
        }  # fmt: skip

    return on_ranks(world_size, work)


# -------------------------------------------------------------------------------------------------------------- loading


def configure(path: str, stage: int, methods: dict | None = None):
    from tests.engine.scenes import run_config

    model = {"path": path, "dtype": "bf16", "gradient_checkpointing": True}
    offload = {"reference": "cpu"}
    return run_config(model=model, methods=methods or {}, deepspeed={"stage": stage, "offload": offload})


def warm_up() -> None:
    """Do the imports and first allocations, which belong to no model."""
    import deepspeed  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import safecl.training.trainer  # noqa: F401

    trim()


def trim() -> int:
    """Return free memory to the system, and return the bytes still in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return proportional_bytes()


def start_engine(path: str, stage: int) -> None:
    from safecl.distributed import collectives
    from safecl.engine.model.language_model import LanguageModel
    from safecl.engine.passes.micro_batches import MicroBatchLayout
    from safecl.engine.passes.training_engine import TrainingEngine
    from safecl.engine.reference.loading import load_model

    config = configure(path, stage)
    loaded, store = load_model(config.model)
    layout = MicroBatchLayout(collectives.world_size(), 64, True)
    _kept["engine"] = TrainingEngine(LanguageModel(loaded), config, layout, store, keep_store=False)


def start_engine_as_usual(path: str, stage: int) -> None:
    """Start as scripts usually do: every rank loads the whole model, then DeepSpeed shards it."""
    import transformers

    from safecl.distributed import collectives
    from safecl.engine.model.language_model import LanguageModel
    from safecl.engine.passes.micro_batches import MicroBatchLayout
    from safecl.engine.passes.training_engine import TrainingEngine

    loaded = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(torch.bfloat16)
    config = configure(path, stage)
    _kept["engine"] = TrainingEngine(
        LanguageModel(loaded), config, MicroBatchLayout(collectives.world_size(), 64, True)
    )


def loading(world_size: int = 2, megabytes: int = 1500, stage: int = 3) -> dict:
    found: dict = {"ranks": world_size, "stage": stage, "limit": 1.3}
    with tempfile.TemporaryDirectory() as folder:
        found["model_bytes"] = save_model(folder, megabytes)
        for name, start in (("safecl", start_engine), ("every rank loads the model", start_engine_as_usual)):

            def work(pool: RankPool, pids: list[int], start=start) -> dict:
                pool.run(warm_up)
                before = sum(pool.run(trim))
                with Peak(pids) as peak:
                    pool.run(start, path=folder, stage=stage)
                kept = sum(pool.run(trim)) - before
                beyond = peak.bytes - before - kept
                return {
                    "kept_bytes": kept,
                    "peak_bytes": peak.bytes - before,
                    "beyond_kept_in_models": round(beyond / found["model_bytes"], 3),
                }

            found[name] = on_ranks(world_size, work)
    return found


# -------------------------------------------------------------------------------------------------------------- planned


ROWS, LENGTH = 2, 256  # of a micro-batch


def train_two_steps(path: str, stage: int, offload: str, checkpointing: bool, dtype: str = "bf16") -> dict:
    """Train two steps with EWC and EMA; return the plan for all ranks together, and its items."""
    from safecl.distributed import collectives
    from safecl.engine.reference.loading import load_model
    from safecl.planning.costs.device_memory import plan_memory
    from safecl.planning.costs.model_shape import ModelShape
    from safecl.planning.costs.planned_model import PlannedModel
    from tests.engine import scenes

    world_size = collectives.world_size()
    config = scenes.run_config(
        model={"path": path, "dtype": dtype, "gradient_checkpointing": checkpointing},
        methods={"ewc": {"sign_batches": 1, "rows_per_batch": 4}, "ema": {"decay": 0.9}},
        deepspeed={"stage": stage, "offload": {"optimizer": offload, "parameters": offload if stage == 3 else "none"}},
        train={
            "tokens_per_microbatch": ROWS * LENGTH,
            "tokens_per_batch": 2 * world_size * ROWS * LENGTH,
            "max_length": LENGTH,
            "packing": "padded",
        },
        checkpoint={"every": "never"},
    )
    loaded, store = load_model(config.model)
    shape = ModelShape.of(PlannedModel.of(loaded), config)
    run, task = scenes.build_run(
        config, loaded, store, scenes.random_dataset(40, seed=1, min_length=LENGTH, max_length=LENGTH)
    )
    scenes.begin(run, task)
    for _ in range(2):
        run.train_step(task)
    _kept["run"] = run
    plan = plan_memory(shape, config, world_size, device="cpu")
    items: dict[str, int] = {}
    for item in plan.at_peak("device", "host"):
        items[item.what] = items.get(item.what, 0) + item.nbytes
    return {"weights": shape.weights, "planned": plan.shared_host, "items": items}


def planned(world_size: int = 2, megabytes: int = 100) -> dict:
    """Measure all ranks together in host memory, which is also the device here."""
    # Freed memory returns to the system at once, so that only memory in use is measured.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "2"}
    found = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as small:
        save_model(folder, megabytes, layers=4, vocabulary=8192)
        save_model(small, 1, layers=1)
        for stage, offload in [(0, "none"), *((stage, place) for stage in (1, 2, 3) for place in ("none", "cpu"))]:
            for checkpointing in (False, True):
                setting = dict(stage=stage, offload=offload, checkpointing=checkpointing)
                found.append(
                    setting
                    | on_ranks(
                        world_size, lambda pool, pids, setting=setting: one_plan(pool, pids, folder, small, setting)
                    )
                )
                print(found[-1], flush=True)
    ratios = [one["peak_of_planned"] for one in found]
    return {
        "ranks": world_size,
        "tokens_per_microbatch": ROWS * LENGTH,
        "lowest": min(ratios),
        "highest": max(ratios),
        "runs": found,
    }


def one_plan(pool: RankPool, pids: list[int], folder: str, small: str, setting: dict) -> dict:
    pool.run(warm_up)
    pool.run(train_two_steps, path=small, **setting)  # memory that every first run takes
    before = sum(pool.run(forget))
    with Peak(pids) as peak:
        plan = pool.run(train_two_steps, path=folder, **setting)[0]
    taken = peak.bytes - before
    return {
        "weights": plan["weights"], "planned_bytes": plan["planned"], "peak_bytes": taken,
        "peak_of_planned": round(taken / plan["planned"], 3), "planned_of_a_rank": plan["items"],
    }  # fmt: skip


def forget() -> int:
    """Release the last run, and return the bytes still in use."""
    _kept.clear()
    return trim()


# -------------------------------------------------------------------------------------------------------------- offload


class _OneShard:
    """A shard map of a single parameter, for an optimizer without DeepSpeed."""

    def __init__(self, flat: torch.Tensor):
        from safecl.engine.zero.shards import Fragment

        self.flats, self.fragments = [flat], [Fragment("weight", 0, flat.numel(), 0, 0)]
        self.shapes, self.numel, self.replicated = {"weight": (flat.numel(),)}, flat.numel(), True

    def grad_norm(self) -> torch.Tensor:
        return torch.ones((), device=self.flats[0].device)

    def reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def all_agree(self, flag: bool) -> bool:
        return flag


def optimizer_of(device: torch.device, numel: int, place: str):
    """Return (optimizer, one update); anchor, Fisher and EMA are with the shard (`none`) or on the host (`cpu`)."""
    from safecl.engine.zero.optimizer import ShardAdamW
    from safecl.engine.zero.placement import StatePlacement
    from safecl.engine.zero.update import UpdatePlan
    from safecl.methods.terms import Penalty

    torch.manual_seed(0)
    flat = torch.randn(numel, device=device)
    optimizer = ShardAdamW([flat])
    optimizer.placement = StatePlacement(place, place, place, torch.bfloat16)
    optimizer.bind(_OneShard(flat))
    optimizer.copy_weights_to("anchor", torch.bfloat16)
    optimizer.copy_weights_to("ema")
    for shard in optimizer.shards():
        shard.keep("fisher", torch.rand(numel, device=device))
    flat.grad = torch.randn(numel, device=device)
    plan = UpdatePlan(lr=1e-4, clip_norm=1.0, penalties=[Penalty(0.1, fisher="fisher")], ema_decay=0.99)

    def run() -> None:
        optimizer.action = optimizer.update(plan)
        optimizer.step()

    return optimizer, run


def offload(device: torch.device, numel: int, tokens: Sequence[int], repeats: int = 10) -> dict:
    """Time updates alone, and steps: products that take as long as the passes over so many tokens, and an update.

    With checkpointing the passes take at least 8 FLOP per weight and token.
    """
    side = 8192 if device.type == "cuda" else 256  # a product that fills the device
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    matmul = statistics.median(seconds_of(lambda: a @ b, device) for _ in range(repeats))
    seconds, steps = {}, {}
    for place in ("none", "cpu"):
        optimizer, update = optimizer_of(device, numel, place)
        update()
        seconds[place] = statistics.median(seconds_of(update, device) for _ in range(repeats))
        steps[place] = {count: seconds_of_a_step(update, a, b, 8 * numel * count, device) for count in tokens}
        del optimizer, update
        gc.collect()
    rate = 2 * side**3 / matmul
    return {
        "weights": numel,
        "seconds_beside": seconds["none"],
        "seconds_offloaded": seconds["cpu"],
        "matmul_flops_per_s": rate,
        "seconds_of_a_step": steps,
        "added_share_of_a_step_at_tokens": {
            str(count): round(steps["cpu"][count] / steps["none"][count] - 1, 4) for count in tokens
        },
        "predicted_share": {count: round(predicted_share(rate, count), 4) for count in tokens if device.type == "cuda"},
        "limits": {str(count): LIMITS[count] for count in tokens if count in LIMITS},
    }


def seconds_of_a_step(
    update: Callable[[], None], a: torch.Tensor, b: torch.Tensor, flops: float, device: torch.device, count: int = 3
) -> float:
    """Mean seconds of `count` steps in a row: what a step leaves to be done beside the next one is in them."""
    products = max(1, round(flops / (2 * a.shape[0] ** 3)))

    def steps() -> None:
        for _ in range(count):
            for _ in range(products):
                a @ b
            update()

    return seconds_of(steps, device) / count


def predicted_share(rate: float, tokens: int) -> float:
    """Return what anchor, Fisher and EMA in host memory add to a step of so many tokens on an H200, by the model of
    safecl/planning/costs/step_time.py and products of this rate in FLOP per second."""
    from safecl.config import RunConfig
    from safecl.planning.costs.step_time import DEVICES, update_seconds

    seconds = {}
    passes = 8 * 10**9 * tokens / rate
    for place in ("none", "cpu"):
        config = RunConfig.model_validate({
            "model": {"path": "unused"}, "tasks": [{"name": "task", "train": "unused"}], "output": "unused",
            "methods": {"ewc": {}, "ema": {}}, "memory": {"source": "unused"},
            "deepspeed": {"offload": {"reference": place, "fisher": place, "ema": place}},
        })  # fmt: skip
        seconds[place] = passes + update_seconds(config, DEVICES["H200"], 10**9, passes)
    return seconds["cpu"] / seconds["none"] - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["sharing", "loading", "planned", "offload"], action="append")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", type=int, default=10**9, help="of the shard in `offload`")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(LIMITS), help="of a step in `offload`")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    device = torch.device(options.device)
    works = {"sharing": sharing, "loading": loading, "planned": planned}
    if device.type == "cuda":
        works = {"offload": lambda: offload(device, options.weights, options.tokens)}
    elif "offload" in (options.only or ()):
        works["offload"] = lambda: offload(device, options.weights, options.tokens)
    command = " ".join(["python -m", __spec__.name, *sys.argv[1:]])
    result: dict = {"machine": machine(device), "command": command}
    for name, work in works.items():
        if options.only is None or name in options.only:
            began = time.perf_counter()
            result[name] = work() | {"seconds": round(time.perf_counter() - began, 1)}
            print(name, result[name], flush=True)
    write_json(options.out, result)


if __name__ == "__main__":
    main()
