"""A tiny model through the engine on a device, in every ZeRO stage, with and without state in host memory: EWC, EMA and
DER for three steps, compared with the same run on the CPU.

    python launch/engine_smoke.py --device cuda --out smoke.json

The distance of weights and average from those of the CPU is relative to the distance that they moved; 1e-3 at most.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT = 1e-3
STEPS = 3
PLACES = {
    "none": "",
    "state": ", methods' state in host memory",
    "all": ", offloaded",
}
"""In host memory: nothing; anchor, Fisher and average; or the optimizer, too, and in stage 3 the weights. By name."""
RUNS = [
    (0, "none"),
    (2, "state"),
    (1, "none"),
    (1, "all"),
    (2, "none"),
    (2, "all"),
    (3, "none"),
    (3, "state"),
    (3, "all"),
]
METHODS = {"ewc": {"strength": 0.5, "sign_batches": 2, "rows_per_batch": 4}, "ema": {"decay": 0.9}, "der": {}}


def train(device: str, runs: int, out: str) -> None:
    """Train all runs in this process and save their states, and those before the first step."""
    os.environ["DS_ACCELERATOR"] = device
    import torch

    from safecl.distributed.collectives import init_distributed
    from tests.engine import scenes

    init_distributed()
    states = {}
    for stage, place in RUNS[:runs]:
        torch.manual_seed(0)
        sharding = {"stage": stage, "offload": offload_of(stage, place)}
        run, task = scenes.make_run(scenes.run_config(methods=METHODS, deepspeed=sharding), scenes.tiny_model())
        before = scenes.state_of(run)["weights"]
        for _ in range(STEPS):
            run.train_step(task)
        found = scenes.state_of(run)
        print(f"{device}: {name_of(stage, place)} is done", flush=True)
        states[name_of(stage, place)] = {"before": before, "weights": found["weights"], "ema": found["ema"]}
    torch.save(states, out)
    torch.distributed.destroy_process_group()


def offload_of(stage: int, place: str) -> dict[str, str]:
    """Return `deepspeed.offload` of a run."""
    state = dict.fromkeys(("reference", "fisher", "ema"), "none" if place == "none" else "cpu")
    everything = "cpu" if place == "all" else "none"
    return {"optimizer": everything, "parameters": everything if stage == 3 else "none", **state}


def name_of(stage: int, place: str) -> str:
    return f"stage {stage}{PLACES[place]}"


def compare(device: str, runs: int) -> list[dict]:
    """Train on the device and on the CPU, each in a process of its own, and return the largest error of each run."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        started = []
        for number, where in enumerate((device, "cpu")):  # side by side: most of the time goes into imports
            path = str(Path(folder) / f"{number}.pt")
            command = [sys.executable, __file__, "--device", where, "--runs", str(runs), "--state", path]
            environment = {"OMP_NUM_THREADS": "2", **os.environ, "DS_ACCELERATOR": where}
            started.append((path, subprocess.Popen(command, cwd=ROOT, env=environment)))
        if any(code != 0 for code in [process.wait() for _, process in started]):
            raise SystemExit("a run failed")
        found = [torch.load(path, weights_only=True) for path, _ in started]
    results = []
    for name, expected in found[1].items():
        errors = {
            kind: distance(found[0][name][kind], expected[kind], expected["before"]) for kind in ("weights", "ema")
        }
        error = max(errors.values())
        results.append({"name": name, "errors": errors, "error": error, "met": error <= LIMIT})
    return results


def distance(a: dict, b: dict, start: dict) -> float:
    """||a - b|| / ||b - start|| over all parameters, in fp64."""
    flat = [torch_flat(each) for each in (a, b, start)]
    return float((flat[0] - flat[1]).norm() / (flat[1] - flat[2]).norm())


def torch_flat(tensors: dict):
    import torch

    return torch.cat([tensors[name].double().cpu().view(-1) for name in sorted(tensors)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--runs", type=int, default=len(RUNS), help="the first so many of the runs")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--state", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.state:
        train(options.device, options.runs, options.state)
        return 0
    results = compare(options.device, options.runs)
    options.out.write_text(json.dumps({"limit": LIMIT, "steps": STEPS, "runs": results}, indent=2) + "\n")
    for one in results:
        print(f"{one['name']}: {one['error']:.1e} (at most {LIMIT:.0e})")
    return 0 if all(one["met"] for one in results) else 1


if __name__ == "__main__":
    sys.exit(main())
