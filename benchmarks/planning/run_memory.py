"""Peak memory of `safecl train` on the CPU against the plan that `safecl check` prints for the same config.

    python -m benchmarks.planning.run_memory MODEL                  # its folder, such as SmolLM2-135M-Instruct; 10 min
    python -m benchmarks.planning.run_memory MODEL --only plain

plain       full fine-tuning in bf16
short       the same with steps of 600 tokens, which fill no micro-batch
replay      as plain, with `er`, `der`, `ewc` and `ema` on a memory of 64 rows
evaluation  the same with a safety measurement before and after, of 16 prompts and 16 benign ones
returned    as plain, where freed memory is given back at once, as in runs that take more than half of the memory

The peak is the largest resident set size of one process from its start to its end, as the system reports it
(ru_maxrss); rows and prompts are made up. No numbers are compared, so there is no error column. Writes
benchmarks/results/run_memory.json and a table of docs/memory.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks import ROOT
from benchmarks.harness import machine, renew_page, write_json
from safecl.distributed.host_memory import LARGE_BYTES

RESULT = ROOT / "benchmarks" / "results" / "run_memory.json"
WORDS = "the cat reads a long book about seven rivers and writes down what it has seen on the way home".split()
RUNS = {
    "plain": "plain fine-tuning, steps of 4,096 tokens",
    "short": "plain fine-tuning, steps of 600 tokens",
    "replay": "`er`, `der`, `ewc` and `ema`",
    "evaluation": "the same, measured before and after",
    "returned": "as the first, freed memory given back",
}
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(LARGE_BYTES)}
"""What safecl sets for a run without room to spare."""
REPLAY = {"methods": {"er": {}, "der": {}, "ewc": {"sign_batches": 2, "rows_per_batch": 4}, "ema": {}}}


def _text(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


def write_rows(folder: Path) -> None:
    """Write rows, memory and prompts of about 150, 100 and 20 words."""
    rng = random.Random(0)
    for name, count, words in (("task", 64, 150), ("memory", 64, 100)):
        rows = [{"prompt": _text(rng, 20), "completion": _text(rng, words)} for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("prompts", "benign"):
        prompts = [{"prompt": _text(rng, 20)} for _ in range(16)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))


def config_of(folder: Path, model: str, name: str) -> dict:
    tree = {
        "model": {"path": model, "gradient_checkpointing": False},
        "tasks": [{"name": "task", "train": str(folder / "task.jsonl")}],
        "train": {
            "max_steps": 2,
            "tokens_per_batch": 600 if name == "short" else 4096,
            "tokens_per_microbatch": 2048,
            "max_length": 512,
            "allow_few_steps": True,
        },
        "deepspeed": {"stage": 0},
        "checkpoint": {"every": "never"},
        "artifacts": {"folder": str(folder / "artifacts")},
        "output": str(folder / name),
    }
    if name in ("replay", "evaluation"):
        tree |= REPLAY | {"memory": {"source": str(folder / "memory.jsonl")}}
    if name == "evaluation":
        prompts = {"prompts": str(folder / "prompts.jsonl"), "benign_prompts": str(folder / "benign.jsonl")}
        tree["safety"] = prompts | {"max_new_tokens": 32}
    return tree


def planned_bytes(config: Path, *, keeps_freed: bool) -> tuple[int, dict[str, int]]:
    """Return the plan's peak, and its items, from a process of its own, as `safecl check` computes them."""
    command = [sys.executable, "-c", PLAN, str(config), str(int(keeps_freed))]
    found = json.loads(_output(command).splitlines()[-1])
    return found["peak"], found["items"]


PLAN = """
import json, sys
from safecl.planning.costs.shapes import shapes_of, teacher_shapes, trained_model
from safecl.config import load_config
from safecl.planning.costs.device_memory import plan_memory
from safecl.planning.costs.memory_report import program_bytes, settle_memory
from safecl.planning.run_plan import plan_run
config = load_config(sys.argv[1])
run = plan_run(config)
config = settle_memory(run)
if not run.keeps_freed_memory:
    sys.exit("this machine has too little free memory: the run would take more than half")
model, program = trained_model(config), program_bytes()
shape = shapes_of(model, run)(1)
settings = {"device": "cpu", "teachers": teacher_shapes(config), "program": program, "keeps_freed": sys.argv[2] == "1"}
plan = plan_memory(shape, config, 1, **settings)
items = {}
for item in plan.at_peak("device", "host"):
    items[item.what] = items.get(item.what, 0) + item.nbytes
print(json.dumps({"peak": plan.shared_host, "items": items}))
"""


def _output(command: list[str]) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def peak_bytes(config: Path, environment: dict[str, str]) -> int:
    """Return the largest resident set size of `safecl train`."""
    log = config.with_suffix(".log").open("w")
    command = [sys.executable, "-m", "safecl", "train", str(config)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(config.with_suffix(".log").read_text()[-2000:])
    return usage.ru_maxrss * 1024


def measure(folder: Path, model: str, name: str) -> dict:
    config = folder / f"{name}.yaml"
    config.write_text(json.dumps(config_of(folder, model, name)))
    returned = name == "returned"
    planned, items = planned_bytes(config, keeps_freed=not returned)
    peak = peak_bytes(config, GIVEN_BACK if returned else {})
    return {
        "run": name, "planned_bytes": planned, "peak_bytes": peak,
        "planned_of_peak": round(planned / peak, 3), "planned": items,
    }  # fmt: skip


def table(runs: list[dict]) -> str:
    lines = ["| run | planned | peak | planned / peak |", "|---|---|---|---|"]
    for run in runs:
        sizes = [f"{run[key] / 1e9:.2f} GB" for key in ("planned_bytes", "peak_bytes")]
        lines.append(f"| {RUNS[run['run']]} | {sizes[0]} | {sizes[1]} | {run['planned_of_peak']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder or hub id")
    parser.add_argument("--only", choices=list(RUNS))
    chosen = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_rows(folder)
        for name in [chosen.only] if chosen.only else RUNS:
            found.append(measure(folder, chosen.model, name))
            print(json.dumps(found[-1]), flush=True)
    if chosen.only is None:
        command, model = "python -m benchmarks.planning.run_memory MODEL", Path(chosen.model).name
        write_json(RESULT, {"machine": machine(torch.device("cpu")), "command": command, "model": model, "runs": found})
        renew_page(ROOT / "docs" / "memory.md", {"run-memory": table(found)})


if __name__ == "__main__":
    main()
