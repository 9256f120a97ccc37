"""The demonstration from start to end: materials, alignment, all arms on two ranks in one process group, and the
outcome."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from safecl.config import ConfigError, parse_yaml
from safecl.demo.arms import ARMS, EVERY_ARM, Arm, poisoned
from safecl.demo.materials import Materials
from safecl.demo.outcome import Outcome, print_outcomes, read_outcomes
from safecl.demo.progress import ALIGN, Bar
from safecl.demo.setting import RANDOM, Setting
from safecl.distributed.spawn import run_ranks
from safecl.exits import ExitCode
from safecl.terminal import Terminal

SECONDS_TO_SAVE = 180.0
"""A run that is stopped ends its step or its measurement and saves its state, 1.6 GB of a pretrained model."""


def chosen_arms(*, poison: float = 0.0, every: bool = False) -> list[Arm]:
    """Return the demonstration's arms; with `every` an arm for each method, on clean data and with poison."""
    if every:
        return [*EVERY_ARM, *(poisoned(EVERY_ARM, poison) if poison else poisoned(EVERY_ARM))]
    return poisoned(ARMS, poison) if poison else ARMS


def default_folder(*, seed: int = 0, poison: float = 0.0, every: bool = False, setting: Setting = RANDOM) -> Path:
    """Return the folder of these options. Each choice has its own, since a run continues from what its folder holds."""
    name = setting.name + ("-all" if every else "")
    return Path("runs") / (name + (f"-poison-{poison:g}" if poison else "") + (f"-seed-{seed}" if seed else ""))


def run_demo(
    folder: Path,
    *,
    seed: int = 0,
    arms: Sequence[Arm] = ARMS,
    num_ranks: int | None = None,
    setting: Setting = RANDOM,
) -> int:
    """Run all that is not finished in `folder` and print the table.

    num_ranks: instead of the setting's.

    Returns: the exit code of the first rank that failed, or 0.
    """
    refuse_other_demonstration(folder, seed, arms)
    console = Terminal()
    start = time.perf_counter()
    console.print(setting.introduction.format(arms=len(arms)))
    if code := _train(folder, seed, arms, num_ranks or setting.num_ranks, console, setting):
        return code
    outcomes = read_outcomes(folder, arms)
    print_outcomes(outcomes, console)
    page = _write_page(folder, outcomes, setting)
    console.print(f"\n{time.perf_counter() - start:.0f} seconds in all. The same as a page: {page}")
    console.print(f"One arm alone: safecl train {folder / arms[-1].name}.yaml output={folder / 'again'}")
    return ExitCode.DONE


def refuse_other_demonstration(folder: Path, seed: int, arms: Sequence[Arm]) -> None:
    """Raise ConfigError where the folder holds a demonstration with another seed or share of poison, before its files
    are overwritten."""
    for name, poison in {"align": 0.0, **{arm.name: arm.poison for arm in arms}}.items():
        path = folder / f"{name}.yaml"
        try:
            there = parse_yaml(path.read_text(encoding="utf-8"))
            found = {"seed": there["train"]["seed"], "poison": (there.get("poison") or {}).get("ratio", 0.0)}
        except (OSError, ConfigError, TypeError, KeyError, AttributeError):
            continue
        wanted = {"seed": seed, "poison": poison}
        if other := [f"{key} {value:g}" for key, value in found.items() if value != wanted[key]]:
            raise ConfigError(
                f"{folder} holds a demonstration with {' and '.join(other)}; "
                "name another folder, or none for one of its own"
            )


def _train(folder: Path, seed: int, arms: Sequence[Arm], num_ranks: int, console: Terminal, setting: Setting) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    events = folder / "progress.jsonl"
    titles = {ALIGN: "alignment"} | {arm.name: arm.title + (", poisoned" if arm.poison else "") for arm in arms}
    with Bar(events, titles, console, setting.lengths) as bar:
        materials = setting.write(folder, seed, arms, bar.say, bar.made)
        bar.materials_written()
        arguments = [str(events), *map(str, _configs(materials, arms))]
        code = run_ranks("safecl.demo.worker", arguments, num_ranks, watch=bar.watch, grace=SECONDS_TO_SAVE)
        bar.watch()
    events.unlink(missing_ok=True)
    return ExitCode.FAILED if code < 0 else code


def _configs(materials: Materials, arms: Sequence[Arm]) -> list[Path]:
    return [materials.align_config, *(materials.arm_configs[arm.name] for arm in arms)]


def _write_page(folder: Path, outcomes: Sequence[Outcome], setting: Setting) -> Path:
    from safecl.demo.page import demo_page
    from safecl.storage.durable import replace_file

    replace_file(folder / "report.html", demo_page(outcomes, model=setting.model))
    return folder / "report.html"
