"""`safecl demo`: chooses the demonstration, its arms and its folder."""

from __future__ import annotations

from pathlib import Path

from safecl.commands.preflight import make_folder
from safecl.config import ConfigError
from safecl.exits import tracebacks


def show(folder: Path | None, *, seed: int, poison: float, every: bool, real: bool) -> int:
    """Run the demonstration and return its exit code. Raises ConfigError for options that exclude each other."""
    from safecl.demo.arms import poisoned
    from safecl.demo.run import chosen_arms, default_folder, run_demo
    from safecl.demo.setting import PRETRAINED, RANDOM

    if real and every:
        raise ConfigError("--all has the random model alone, since ten methods take --real some hours; leave one out")
    setting = PRETRAINED if real else RANDOM
    arms = chosen_arms(poison=poison, every=every)
    if real:
        arms = poisoned(list(setting.arms), poison) if poison else list(setting.arms)
    folder = folder or default_folder(seed=seed, poison=poison, every=every, setting=setting)
    make_folder(folder)
    tracebacks.folder = folder
    return run_demo(folder, seed=seed, arms=arms, setting=setting)
