"""The choice of each kernel's back end on each device, with its reason, for the kernel calls and for `safecl env`.

A family has up to three back ends of one signature: `triton` (CUDA), `cpp` (the C++ library, CPU) and `torch` (the
twin, anywhere). The first one that works on the device is used. `SAFECL_KERNELS=torch` in the environment, or
`using("torch")` in code, forces the twin.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

log = logging.getLogger("safecl.kernels")

PREFERENCE = {"cuda": ("triton", "torch"), "cpu": ("cpp", "torch")}

# family -> back end -> module; all modules of a family have the functions in its backend.py.
FAMILIES = {
    "flat": {
        "triton": "safecl.kernels.flat.triton_kernels",
        "cpp": "safecl.kernels.flat.cpu",
        "torch": "safecl.kernels.flat.torch_twin",
    },
    "head": {"triton": "safecl.kernels.head.triton_rows", "torch": "safecl.kernels.head.torch_twin"},
    "ties": {"cpp": "safecl.kernels.ties.cpu", "torch": "safecl.kernels.ties.torch_twin"},
}
KERNELS = {
    "flat": ("ema_update_", "fisher_accumulate_", "fisher_penalty_", "penalized_grad_norm", "adamw_step_"),
    "head": ("linear_distill_loss", "distill_loss"),
    "ties": ("count_bracket", "elected_sum_"),
}

_forced: str | None = None


@dataclass(frozen=True)
class Choice:
    """One line of the table: the back end of a kernel on a device, and in `note` why it is not a faster one."""

    family: str
    kernel: str
    device: str
    backend: str
    note: str


def implementation(family: str, kernel: str, device: str) -> ModuleType:
    """Return the module that runs `kernel` of `family` for tensors of this device type."""
    name, _ = _choose(family, device, _forced or os.environ.get("SAFECL_KERNELS", ""))
    return importlib.import_module(FAMILIES[family][name])


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Force one back end ("torch", "cpp" or "triton") inside the block.

    It serves tests, benchmarks and the search for the cause of a wrong number.
    """
    global _forced
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def table() -> list[Choice]:
    """Return the back end in use for every kernel on every device."""
    forced = _forced or os.environ.get("SAFECL_KERNELS", "")
    rows = []
    for family, kernels in KERNELS.items():
        for device in PREFERENCE:
            backend, note = _choose(family, device, forced)
            rows += [Choice(family, kernel, device, backend, note) for kernel in kernels]
    return rows


@lru_cache(maxsize=32)
def _choose(family: str, device: str, forced: str) -> tuple[str, str]:
    """Return (back end, why it is not a faster one), and warn once if it is a slower one."""
    if forced and (forced in FAMILIES[family] or not any(forced in names for names in FAMILIES.values())):
        return _check_forced(family, device, forced), f"forced to {forced}"
    notes: list[str] = []
    for name in PREFERENCE.get(device, ("torch",)):
        if name not in FAMILIES[family]:
            continue
        missing = _missing(name)
        if not missing:
            if notes:
                log.warning("%s kernels on %s run in %s: %s", family, device, name, "; ".join(notes))
            return name, "; ".join(notes)
        notes.append(missing)
    raise RuntimeError(f"no back end of the {family} kernels runs on {device}: {'; '.join(notes)}")


def _check_forced(family: str, device: str, name: str) -> str:
    if name not in FAMILIES[family]:
        raise ValueError(f"SAFECL_KERNELS is {name!r}; the {family} kernels have {', '.join(FAMILIES[family])}")
    interpreted = name == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    runs_there = name == "torch" or interpreted or name in PREFERENCE.get(device, ())
    missing = _missing(name) if runs_there else f"{name} does not run on {device} tensors"
    if missing:
        raise ValueError(f"SAFECL_KERNELS is {name!r}, but {missing}")
    return name


def _missing(name: str) -> str:
    """Return why a back end cannot be used here, or "" if it can."""
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if name == "cpp":
        from safecl.kernels import native

        return native.missing()
    return ""
