"""The time that continual learning adds to a step of the engine: ZeRO-2 with an offloaded optimizer, on a CPU.

    python -m benchmarks.engine.step                 runs rounds for at most --seconds
    python -m benchmarks.engine.step                 again: adds rounds to benchmarks/results/engine-step-cpu.json
    python -m benchmarks.engine.step --fresh         discards earlier rounds
    python -m benchmarks.engine.step --device cuda --model 7b      one step of a large model on a GPU: large_step.py
    python -m benchmarks.engine.step --model 7b --fake             the same without data, on any machine

Two DeepSpeed engines in one process, with the same model, configuration and tokens, alternate:

    plain    DeepSpeedCPUAdam, no continual learning; the rival
    safecl   ShardAdamW with an EWC penalty (anchor and Fisher in bf16) and an fp32 EMA of the weights

It times `engine.step()` and the whole step (forward, backward, step). Errors show that both do the same work: the
penalty is zero at the first step, so both must reach the same weights (relative to the distance moved), and the EMA
must be that of fp64. Rounds of different settings are never mixed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ROOT

os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".torch_ext"))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from benchmarks.harness import machine

LR, CLIP, DECAY, STRENGTH = 1e-3, 1.0, 0.99, 0.1  # steps and averages large enough to be compared in fp32
ADAM = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
LIMITS = {"engine.step()": 1.6, "whole step": 1.10}


@dataclass
class Side:
    """One engine: `prepare` is called before each step, `masters` are its flat fp32 weights."""

    engine: object
    prepare: Callable[[], None]
    masters: list[torch.Tensor]
    optimizer: object = None


def build_model(layers: int) -> torch.nn.Module:
    """Return a Llama in bf16, of about 100 M parameters for 12 layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=12
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True, use_cache=False)).bfloat16()


def deepspeed_engine(model: torch.nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> object:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": clip,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": False,
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
        },
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def plain_side(layers: int) -> Side:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    model = build_model(layers)
    engine = deepspeed_engine(model, DeepSpeedCPUAdam(model.parameters(), lr=LR, adamw_mode=True, **ADAM), CLIP)
    return Side(engine, lambda: None, engine.optimizer.single_partition_of_fp32_groups)


def safecl_side(layers: int) -> Side:
    from safecl import ShardAdamW, ShardMap, UpdatePlan
    from safecl.methods.terms import Penalty

    model = build_model(layers)
    optimizer = ShardAdamW(model.parameters(), **ADAM)
    engine = deepspeed_engine(model, optimizer, 0.0)
    shards = ShardMap(engine)
    optimizer.bind(shards)
    optimizer.copy_weights_to("anchor", torch.bfloat16)
    optimizer.copy_weights_to("ema")
    for fisher in optimizer.new_state("fisher", torch.bfloat16):
        fisher.copy_(torch.rand(fisher.shape, generator=torch.Generator().manual_seed(1)))
    plan = UpdatePlan(
        lr=LR, clip_norm=CLIP, ema_decay=DECAY, penalties=[Penalty(strength=STRENGTH, anchor="anchor", fisher="fisher")]
    )

    def prepare() -> None:
        optimizer.action = optimizer.update(plan)

    return Side(engine, prepare, shards.flats, optimizer)


def one_step(side: Side, tokens: torch.Tensor) -> dict[str, float]:
    """Return the seconds of one step: forward and backward, engine.step()."""
    began = time.perf_counter()
    side.engine.backward(side.engine(input_ids=tokens, labels=tokens).loss)
    side.prepare()
    middle = time.perf_counter()
    side.engine.step()
    return {"forward, backward": middle - began, "engine.step()": time.perf_counter() - middle}


def first_step_errors(sides: dict[str, Side], tokens: torch.Tensor) -> dict[str, float]:
    """Return errors relative to the distance moved: weights of one side against the other's, the EMA against fp64."""
    start = [flat.detach().clone() for flat in sides["safecl"].masters]
    for side in sides.values():
        one_step(side, tokens)
    plain, ours = (torch.cat([flat.detach().view(-1) for flat in side.masters]).double() for side in sides.values())
    start = torch.cat([flat.view(-1) for flat in start]).double()
    ema = torch.cat([t.view(-1) for t in sides["safecl"].optimizer.tensors("ema")]).double()
    moved = (1 - DECAY) * (ours - start)
    return {
        "weights": float((ours - plain).norm() / (plain - start).norm()),
        "ema": float((ema - start - moved).norm() / moved.norm()),
    }


def known_rounds(path: Path, setting: dict) -> list[dict]:
    if not path.is_file():
        return []
    known = json.loads(path.read_text())
    return known["rounds"] if known.get("setting") == setting else []


def summary(rounds: list[dict]) -> dict:
    """Return each side's median in ms, and their ratio with its limit."""
    found = {}
    for what, limit in LIMITS.items():
        times = {
            side: [r[side][what] if what in r[side] else sum(r[side].values()) for r in rounds]
            for side in ("plain", "safecl")
        }
        medians = {side: statistics.median(values) for side, values in times.items()}
        ratio = medians["safecl"] / medians["plain"]
        found[what] = {f"{side} ms": round(1e3 * value, 1) for side, value in medians.items()}
        found[what] |= {"ratio": round(ratio, 3), "at_most": limit, "met": ratio <= limit}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, help="fewer layers; the 12 of the small model make 110 M parameters")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="rounds wanted in all")
    parser.add_argument("--seconds", type=float, default=150.0, help="at most this long for the rounds of one part")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "engine-step-cpu.json")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=["110m", "tiny", "7b", "13b", "70b"], default="110m")
    parser.add_argument("--fake", action="store_true", help="tensors without data, to the last allocation")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a large model")
    parser.add_argument("--micro-batches", type=int, default=2, help="of each step of a large model")
    parser.add_argument("--stage", type=int, choices=[2, 3], default=2, help="of a large model")
    parser.add_argument("--offload", choices=["none", "state", "all"], default="state", help="of a large model")
    parser.add_argument("--ranks", type=int, default=1, help="of a large model with --fake; one of them is counted")
    parser.add_argument("--sides", nargs="+", choices=["plain", "safecl"], default=["plain", "safecl"])
    options = parser.parse_args()
    if options.model != "110m":
        run_large(options)
        return
    options.layers = options.layers or 12
    torch.set_num_threads(options.threads)
    os.environ["SAFECL_NUM_THREADS"] = str(options.threads)
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29731",
    }.items():
        os.environ.setdefault(name, value)
    measure(options)


def run_large(options: argparse.Namespace) -> None:
    from benchmarks.engine import large_step

    if options.tokens == 256:  # the default of the small model
        options.tokens = 128 if options.model == "tiny" else 8192
    if options.out.name == "engine-step-cpu.json":
        kind = "fake" if options.fake else options.device
        options.out = options.out.with_name(f"engine-step-{options.model}-{kind}.json")
    large_step.run(options)


def measure(options: argparse.Namespace) -> None:
    sides = {"plain": plain_side(options.layers), "safecl": safecl_side(options.layers)}
    tokens = torch.randint(0, 32000, (1, options.tokens), generator=torch.Generator().manual_seed(2))
    numel = sum(flat.numel() for flat in sides["safecl"].masters)
    setting = {
        "zero": 2,
        "offload": "optimizer",
        "ranks": 1,
        "threads": options.threads,
        "tokens": options.tokens,
        "parameters": numel,
    }
    report = {"machine": machine(torch.device("cpu")), "setting": setting, "errors": first_step_errors(sides, tokens)}
    rounds = [] if options.fresh else known_rounds(options.out, setting)
    deadline, order = time.monotonic() + options.seconds, list(sides)
    while len(rounds) < options.rounds and time.monotonic() < deadline:
        rounds.append({name: one_step(sides[name], tokens) for name in order})
        order.reverse()  # so that neither side always comes first
        report |= {"summary": summary(rounds), "rounds": rounds}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")  # in every round, so that an abort loses none
    print(f"{len(rounds)} of {options.rounds} rounds in {options.out}; errors of the first step: {report['errors']}")
    for what, row in summary(rounds).items():
        times = f"{row['plain ms']} ms plain, {row['safecl ms']} ms with EWC and EMA"
        print(f"{what}: {times}: {row['ratio']}x (at most {row['at_most']}x)")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
