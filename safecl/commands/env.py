"""`safecl env`: what an issue report needs, as a table or JSON. Where a fact cannot be found out, the reason is shown
in its place."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import safecl
from safecl.distributed import environment
from safecl.terminal import Terminal

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "triton",
    "flash-attn",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "pydantic",
    "numpy",
)
LAUNCHER_PREFIXES = ("NCCL_", "GLOO_", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_ID", "SAFECL_", "TORCHELASTIC_")
LAUNCHER_NAMES = (
    *environment.VARIABLES,
    "LOCAL_WORLD_SIZE",
    "CUDA_VISIBLE_DEVICES",
    "DS_ACCELERATOR",
    "TORCH_EXTENSIONS_DIR",
    "OMP_NUM_THREADS",
    "HF_HOME",
    "HF_HUB_OFFLINE",
)

Facts = dict[str, str]


def print_environment(as_json: bool) -> None:
    """Print every section; with `as_json`, print one JSON object {section: {name: value}}."""
    sections = collect_environment()
    if as_json:
        print(json.dumps(sections, indent=2))
        return
    console = Terminal()
    for title, facts in sections.items():
        console.print(title, style="bold")
        for name, value in facts.items() or [("none set", "")]:
            console.print(f"  {name:<24}{value}")


def collect_environment() -> dict[str, Facts]:
    """Return {section: {name: value}}, all text."""
    return {
        "versions": _versions(),
        "device": _or_reason(_device),
        "kernels": _or_reason(_kernels),
        "launcher": _launcher(),
    }


def _or_reason(collect: Callable[[], Facts]) -> Facts:
    try:
        return collect()
    except Exception as error:  # a broken driver or library must show in the report, not end it
        return {"not available": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def _versions() -> Facts:
    facts = {
        "safecl": safecl.__version__ + _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    return facts | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    root = Path(safecl.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    found = _output("git", "-C", str(root), "rev-parse", "--short", "HEAD")
    return f" (commit {found})" if found else ""


def _output(*command: str) -> str:
    """Return what a command prints; empty where it cannot be run."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _device() -> Facts:
    import torch

    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    facts = {"cpu": f"{os.cpu_count()} cores, {capability}, {_host_memory()}, {threads} torch threads"}
    if not torch.cuda.is_available():
        has_gpu_support = torch.version.cuda or torch.version.hip
        return facts | {"gpu": "none" if has_gpu_support else "none (this torch is a CPU build)"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.1f} GiB"
        facts[f"gpu {index}"] = f"{gpu.name}, {memory}, compute capability {gpu.major}.{gpu.minor}"
    facts["cuda of torch"] = str(torch.version.cuda)
    drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    facts["driver"] = drivers[0] if drivers else "unknown"
    facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return facts


def _host_memory() -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{total / 2**30:.1f} GiB memory"


def _kernels() -> Facts:
    import torch

    from safecl.kernels import backends, native

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = {}
    for choice in backends.table():
        notes = [choice.note] if choice.note else []
        if choice.backend == "cpp":
            threads = native.num_threads() if choice.family == "flat" else 1
            notes += [native.instruction_set(), f"{threads} thread{'s' * (threads != 1)}"]
        backend = choice.backend + (f" ({', '.join(notes)})" if notes else "")
        if choice.device == device:
            rows[choice.kernel] = backend
        elif choice.device == "cpu" and choice.family in ("flat", "ties"):  # an offloaded optimizer, or a merge
            rows[f"{choice.kernel} on cpu"] = backend
    return rows


def _launcher() -> Facts:
    names = [name for name in os.environ if name in LAUNCHER_NAMES or name.startswith(LAUNCHER_PREFIXES)]
    return {name: os.environ[name] for name in sorted(names)}
