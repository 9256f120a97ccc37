"""`safecl check CFG`: reads and tokenises all data, reads the model's settings, and prints what `safecl train` would
do. It trains nothing."""

from __future__ import annotations

import contextlib
import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safecl.commands.preflight import preflight
from safecl.commands.spinner import lines_of
from safecl.config import ConfigError, RunConfig
from safecl.storage.cache_folder import PREPARED
from safecl.terminal import Terminal, fact

if TYPE_CHECKING:
    from safecl.engine.artifacts.memory_prompts import Prospect
    from safecl.engine.model.outline import Outline


def check_run(config: RunConfig) -> None:
    """Print the plan and one decoded example per task. Raises ConfigError for everything that would stop the run; for
    bad rows it names file and line."""
    with _collecting_nothing(), lines_of("checking"):
        preflight(config)
        if config.memory is None or not config.memory.awaits_rows:
            _check_run(config, None)
            return
        from safecl.engine.artifacts.memory_prompts import with_known_or_expected_rows

        with with_known_or_expected_rows(config) as (known, prospect):
            _check_run(known, prospect)


def _check_run(config: RunConfig, prospect: Prospect | None) -> None:
    """prospect: what becomes of the prompts of the memory; None where it has rows of its own."""
    from safecl.data import describe
    from safecl.distributed import devices
    from safecl.planning.checks import check_fisher_values
    from safecl.planning.costs.memory_report import memory_lines, program_bytes, ranks_here, settle_memory, too_little
    from safecl.planning.costs.shapes import shapes_of, teacher_shapes, trained_model
    from safecl.planning.costs.step_report import prediction
    from safecl.planning.describe import describe_plan
    from safecl.planning.model_checks import check_weights_are_finite
    from safecl.planning.run_plan import plan_run
    from safecl.training.folder import RunFolder
    from safecl.training.identity import refuse_folder_of_other_run

    console = Terminal()
    with leaving_nothing_prepared(config):
        plan = plan_run(config)
    config = settle_memory(plan)
    check_weights_are_finite(config)
    check_fisher_values(config)
    facts = describe_plan(plan)
    model = trained_model(config)
    facts[1:1] = model_facts(model.outline, config)
    program = program_bytes()
    shape_on, teachers = shapes_of(model, plan), teacher_shapes(config)
    facts += memory_lines(shape_on, config, teachers, program=program, keeps_freed=plan.keeps_freed_memory)
    most_tokens = max(task.tokens_per_batch for task in plan.tasks)
    facts += prediction(shape_on(ranks_here()), config, most_tokens, teachers)
    if prospect is not None:
        facts.insert([label for label, _ in facts].index("memory"), ("memory prompts", prospect.text))
    for what, value in facts:
        console.print(fact(what, value, 18))
    for task in plan.tasks:
        console.print(
            describe(task.dataset, plan.tokenizer, examples=config.privacy.examples, title=f"task {task.config.name}"),
            soft_wrap=False,
        )
    if prospect is None or prospect.written:
        refuse_folder_of_other_run(RunFolder(Path(config.output)), plan)
    for note in plan.notes:
        console.print(f"note: {note}", style="yellow")
    if (shortage := too_little(shape_on, config, teachers, program=program)) is not None:
        if devices.on_gpu() and not config.train.allow_little_memory:
            raise ConfigError(shortage)
        console.print(f"note: {shortage}", style="yellow")
    console.print(f"ready: safecl train would write {config.output}", style="green")


@contextlib.contextmanager
def _collecting_nothing() -> Iterator[None]:
    """Leave objects that refer to each other where they are: looking for them takes a sixth of a check's time, and a
    check leaves few."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def model_facts(model: Outline, config: RunConfig) -> list[tuple[str, str]]:
    """Return (label, value) lines about the model."""
    from safecl.engine.model.settings import choose_attention

    attention, reason = choose_attention(config.model.attention, config.model.dtype)
    return [
        ("  parameters", f"{model.num_parameters:,} ({model.model_type}), vocabulary {model.vocabulary:,}"),
        ("  attention", f"{attention} ({reason})"),
        ("  activations", "recomputed in the backward pass" if config.model.gradient_checkpointing else "kept"),
    ]


@contextlib.contextmanager
def leaving_nothing_prepared(config: RunConfig) -> Iterator[None]:
    """Remove the prepared rows that `privacy.keep_prepared: false` puts into the run folder, where no run has some.

    They stay mapped, so the plan can be used.
    """
    output = Path(config.output)
    prepared, is_new = output / PREPARED, not output.exists()
    keeps = config.privacy.keep_prepared or prepared.exists()
    try:
        yield
    finally:
        if not keeps:
            shutil.rmtree(prepared, ignore_errors=True)
            with contextlib.suppress(OSError):
                if is_new:
                    output.rmdir()
