"""First section of the GPU suite: it records the machine, and fails if the suite cannot run on it.

python launch/gpu_environment.py OUT.json [--dry]
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

OLDEST = (2, 8)


def facts() -> dict:
    """Return versions and GPUs of this machine."""
    import torch

    found = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda, "gpus": []}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            found["gpus"].append(
                {
                    "name": p.name,
                    "memory_gib": round(p.total_memory / 2**30, 1),
                    "sm": f"{p.major}{p.minor}",
                    "sms": p.multi_processor_count,
                }
            )
    for name in ("triton", "pytest", "transformers", "deepspeed"):
        found[name] = _version(name)
    return found


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown" if importlib.util.find_spec(name) else None


def problems(found: dict) -> list[str]:
    """Return the reasons why the suite cannot run here."""
    release = tuple(int(x) for x in found["torch"].split("+")[0].split(".")[:2])
    reasons = []
    if release < OLDEST:
        reasons.append(f"torch {found['torch']} is older than {'.'.join(map(str, OLDEST))}")
    if not found["gpus"]:
        reasons.append("torch sees no CUDA device")
    reasons += [f"{name} is not installed" for name in ("triton", "pytest") if not found[name]]
    return reasons


if __name__ == "__main__":
    found = facts()
    Path(sys.argv[1]).write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    wrong = [] if "--dry" in sys.argv else problems(found)
    print("\n".join(wrong))
    sys.exit(1 if wrong else 0)
