"""The demonstration from start to end: materials, alignment, all arms on two ranks in one process group, and what came out."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from safecl.commands.ending import ExitCode
from safecl.demo.materials import ARMS, Arm, Materials, write_materials
from safecl.demo.outcome import print_outcomes, read_outcomes
from safecl.spawn import run_ranks

NUM_RANKS = 2


def run_demo(folder: Path, *, seed: int = 0, poison_ratio: float = 0.0, arms: Sequence[Arm] = ARMS, num_ranks: int = NUM_RANKS) -> int:
    """Runs everything and prints the table; returns the exit code of the first rank that failed, or 0. Earlier files are renewed."""
    console = Console(highlight=False, soft_wrap=True)
    start = time.perf_counter()
    materials = write_materials(folder, seed=seed, arms=arms, poison_ratio=poison_ratio)
    _introduce(materials, arms, num_ranks, console)
    times = folder / "seconds.json"
    configs = [materials.align_config, *(materials.arm_configs[arm.name] for arm in arms)]
    if code := run_ranks("safecl.demo.worker", [str(times), *map(str, configs)], num_ranks):
        return ExitCode.FAILED if code < 0 else code
    console.print()
    print_outcomes(read_outcomes(folder, arms, json.loads(times.read_text(encoding="utf-8"))), console)
    console.print(
        f"\n{time.perf_counter() - start:.0f} seconds in all. Everything is in {folder}; one arm alone: safecl train {configs[-1]}"
    )
    return ExitCode.DONE


def _introduce(materials: Materials, arms: Sequence[Arm], num_ranks: int, console: Console) -> None:
    console.print(
        f"A Llama of {materials.num_parameters / 1e6:.2f} M random parameters learns to refuse; then a user's harmless task "
        f"(sentiment of a sentence) is trained into it in {len(arms)} ways. {num_ranks} ranks, ZeRO-2, CPU.",
        markup=False,
    )
