"""`safecl scan CFG`: screens the rows of the tasks with the aligned model, without training. Any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safecl.commands.preflight import preflight
from safecl.commands.spinner import working
from safecl.config import ConfigError, RunConfig, ScanConfig, validate_tree
from safecl.distributed import environment
from safecl.exits import ExitCode
from safecl.terminal import Terminal

if TYPE_CHECKING:
    from safecl.data import TokenDataset
    from safecl.scan.screening import Screening


def scan_run(config: RunConfig, as_json: bool) -> ExitCode:
    """Print the flagged rows on rank 0, and write them into <output>/scan. Returns ExitCode.GATE where `scan.action:
    refuse` would stop the run."""
    environment.join_launcher()
    config = with_scan(config)
    if config.tasks[0].role == "align":
        raise ConfigError(
            "scan: model.path is aligned only by the first task (role: align); put `scan:` into the config and train it"
        )
    preflight(config)
    from safecl.data import load_tokenizer
    from safecl.data.config_rows import prepare_task
    from safecl.data.templates.thinking import check_thinking
    from safecl.distributed.collectives import process_group
    from safecl.engine.artifacts.memory_prompts import with_memory_rows

    tokenizer = load_tokenizer(config.model)
    check_thinking(tokenizer)
    with working("reading the rows"):
        tasks = [(task.name, prepare_task(config, task, tokenizer)[0]) for task in config.tasks]
    with working("screening the rows"), process_group():
        config = with_memory_rows(config, lambda message: None)
        screening = _screened(config, tokenizer, tasks)
    if environment.rank() == 0:
        folder = screening.write(Path(config.output) / "scan", config.privacy.examples)
        show_screening(screening, config, folder, as_json)
    return ExitCode.GATE if screening.refused_because else ExitCode.DONE


def _screened(config: RunConfig, tokenizer: Any, tasks: list[tuple[str, TokenDataset]]) -> Screening:
    from safecl.distributed.watchdog import watched
    from safecl.evaluation import HFEvalModel
    from safecl.scan import screen_tasks

    with watched(Path(config.output), "evaluation"):
        settings = config.model
        model = HFEvalModel.load(
            settings.path,
            dtype=settings.dtype,
            attention=settings.attention,
            trust_remote_code=settings.trust_remote_code,
        )
        return screen_tasks(model, tokenizer, config, tasks)


def with_scan(config: RunConfig) -> RunConfig:
    """Return the config; where it has no section `scan`, with the default one. Raises ConfigError where a scan cannot
    run with this config."""
    if config.scan is not None:
        return config
    return validate_tree(config.model_dump(mode="json") | {"scan": ScanConfig().model_dump(mode="json")}, "safecl scan")


def show_screening(screening: Screening, config: RunConfig, folder: Path, as_json: bool) -> None:
    """Print the flagged rows and the summary of each task, or all of it as JSON."""
    if as_json:
        print(json.dumps(screening.to_dict(config.privacy.examples), indent=2))
        return
    console = Terminal()
    if screening.flags:
        console.print(screening.table(config.privacy.examples), soft_wrap=False)
    for note in screening.notes:
        console.print(f"note: {note}", style="yellow")
    for task in screening.tasks:
        console.print(task.line())
    if screening.refused_because:
        console.print(f"refused: {screening.refused_because}", style="bold red")
    console.print(f"all flagged rows in {folder}")
