"""Renews the examples in this folder: the batch script and the manifests that `safecl launch` writes for run.yaml.

    python launch/templates/render.py

They are examples to read; `safecl launch --via slurm | kubernetes` makes the file for a config.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))


def examples() -> dict[str, str]:
    """Return name -> text of every example."""
    from safecl.config import LaunchConfig
    from safecl.launching import kubernetes, slurm
    from safecl.launching.job import Job

    def job(**settings: object) -> Job:
        launch = LaunchConfig.model_validate({"nodes": 4, "gpus_per_node": 8, **settings})
        return Job(Path("run.yaml"), ("train.max_steps=1000",), (), launch, Path("/shared/runs/support"))

    batch = job(via="slurm", slurm={"partition": "gpu", "time": "1-00:00:00", "setup": [". /shared/venv/bin/activate"]})
    pods = {"image": "registry.example/safecl:latest", "claim": "workspace"}
    found = {"job.sbatch": slurm.script_of(batch, 8, "python3")}
    for kind in ("Job", "JobSet"):
        one = job(via="kubernetes", max_restarts=3, kubernetes={**pods, "kind": kind})
        found[f"{kind.lower()}.yaml"] = yaml.safe_dump_all(kubernetes.manifests(one), sort_keys=False, width=120)
    return found


if __name__ == "__main__":
    for name, text in examples().items():
        (HERE / name).write_text(text, encoding="utf-8")
        print(f"wrote {HERE / name}")
