"""Counts the bytes that two hosts send each other in a step of each ZeRO stage (part of scaling.py)."""

from __future__ import annotations

import math
import sys
import tempfile
import time
from pathlib import Path

FIRST, LAST = 5, 35
"""Steps between which bytes are counted."""


def bytes_by_stage() -> dict:
    """Return megabytes that a host sends in a step, by stage."""
    import torch

    from benchmarks.harness import machine
    from safecl.demo.materials import write_materials
    from tests.launching.hosts import reason_against

    if (reason := reason_against()) is not None:
        sys.exit(f"two hosts cannot be made here: {reason}")
    with tempfile.TemporaryDirectory(prefix="safecl-scaling-") as name:
        folder = Path(name)
        write_materials(folder / "demo")
        weights = sum(math.prod(shape) for shape in _shapes(folder / "demo" / "random-model" / "model.safetensors"))
        stages = {str(stage): _of_stage(folder, stage) for stage in (0, 1, 2, 3)}
    return {
        "command": "python -m benchmarks.planning.scaling --measure",
        "machine": machine(torch.device("cpu")),
        "setting": {"hosts": 2, "ranks": 2, "dtype": "fp32", "micro_batches": 1, "weights": weights},
        "megabytes_a_step": stages,
    }


def _of_stage(folder: Path, stage: int) -> float:
    from tests.launching.node_scenes import Job, two_hosts, write_config

    config = write_config(
        folder / "demo",
        folder / f"stage-{stage}" / "run.yaml",
        deepspeed={"stage": stage},
        methods={},
        memory=None,
        checkpoint={"every": "never"},
        train={"max_steps": LAST + 10, "tokens_per_microbatch": 4096},
    )
    with two_hosts([folder]) as machines:
        job = Job(config, machines)
        job.start()
        job.reach(FIRST)
        first = job.steps(), _sent(machines[0].link)
        while job.steps() < LAST:
            time.sleep(0.01)
        last = job.steps(), _sent(machines[0].link)
        assert job.wait() == [0, 0], job.said()[-3000:]
    measured = (last[1] - first[1]) / (last[0] - first[0]) / 1e6
    print(f"stage {stage}: {measured:.2f} MB a step", flush=True)
    return round(measured, 3)


def _sent(link: str) -> int:
    """Bytes that the host behind a link has sent."""
    return int(Path(f"/sys/class/net/{link}/statistics/rx_bytes").read_text())


def _shapes(path: Path) -> list[list[int]]:
    """The shapes of the tensors of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return [file.get_slice(name).get_shape() for name in file.keys()]
