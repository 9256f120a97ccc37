"""Checks of a planned run that read its rows or the model's files."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from safecl.config import ConfigError, RunConfig, SafetyConfig
from safecl.config.errors import install_extra
from safecl.distributed import environment
from safecl.evaluation.serving.server import vllm_program
from safecl.planning.plans import RunPlan
from safecl.scan.known import read_known

FEW_STEPS = 50
MOST_WEIGHT_ON_START = 0.5


def check_fisher(config: RunConfig) -> None:
    """Raise ConfigError for a Fisher of another model, which would silently hold the wrong weights."""
    from safecl.engine.artifacts.base_model import model_hash
    from safecl.engine.artifacts.store import ArtifactStore
    from safecl.engine.fisher.file import open_fisher, refuse_other_model

    for name, settings in config.methods.items():
        if (path := settings.fisher_file) is None:
            continue
        if config.tasks[0].role == "align":
            raise ConfigError(
                f"methods.{name}.fisher: the first task (role: align) makes the aligned model; leave `fisher` out"
            )
        fisher = open_fisher(path)
        if environment.rank() == 0:  # it reads the whole model; where it fails, the launcher ends all ranks
            refuse_other_model(fisher, config.model.path, model_hash(config.model.path, ArtifactStore.of(config)))


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"log.report_to: {name} is not installed; {install_extra('track')}, or leave it out")


def check_backend(safety: SafetyConfig | None) -> None:
    """Raise ConfigError where the program that is to answer prompts is not installed."""
    if safety is not None and safety.backend == "vllm":
        vllm_program()


def check_scan(plan: RunPlan) -> None:
    """Read the prompts that a scan compares the upload with. Raises ConfigError as the scan itself does."""
    if plan.config.scan is None:
        return
    known = read_known(plan.config)
    plan.scanned = [*known.disallowed, *known.benign]


def check_fisher_values(config: RunConfig) -> None:
    """Raise ConfigError for a Fisher file with a value that is NaN, infinite or negative, as the run does.

    Reads the whole file.
    """
    from safecl.engine.fisher.file import open_fisher

    for path in dict.fromkeys(settings.fisher_file for settings in config.methods.values()):
        if path is not None:
            open_fisher(path).check_values()


def check_sizes(plan: RunPlan) -> None:
    """Refuse, unless train.allow_few_steps is set, too few steps and an average that mostly holds the start."""
    allow = plan.config.train.allow_few_steps
    for task in plan.tasks:
        if task.config.role == "align":
            continue
        steps, name = task.num_steps, task.config.name
        if steps < FEW_STEPS:
            fix = "use smaller train.tokens_per_batch or more train.epochs"
            _refuse_or_note(plan, allow, f"task {name}: only {steps} optimizer steps; {fix}")
        for method_name, settings in plan.config.methods.items():
            weight = settings.weight_on_start(steps)
            if weight > MOST_WEIGHT_ON_START:
                fix = f"use methods.{method_name}.horizon: 0.3 instead of decay, or more steps"
                problem = f"after {steps} steps the average keeps {weight:.0%} of its weight on the start"
                _refuse_or_note(plan, allow, f"task {name}: {problem}; {fix}")


def _refuse_or_note(plan: RunPlan, allow: bool, message: str) -> None:
    if not allow:
        raise ConfigError(f"{message}, or accept it with train.allow_few_steps: true")
    plan.notes.append(message)
