"""The scan inside a run, before the first task that methods act on. It uses the run's own aligned model, in any ZeRO
stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safecl.distributed import collectives
from safecl.engine.passes.live_model import evaluating
from safecl.scan.screening import UploadRefused, screen_tasks
from safecl.training.output.console import Console
from safecl.training.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def screen_run(run: Run, tokenizer: PreTrainedTokenizerBase, console: Console, folder: Path) -> None:
    """Screen the rows of all tasks, print and write the flagged rows, and apply `scan.action`. A collective call.

    Raises UploadRefused where the upload must not be trained on.
    """
    privacy = run.config.privacy.examples
    with console.working("screening the rows"), evaluating(run.engine, average=False, many_passes=True) as model:
        screening = screen_tasks(model, tokenizer, run.config, [(task.config.name, task.dataset) for task in run.tasks])
    if collectives.rank() == 0:
        screening.write(folder / "scan", privacy)
        if screening.flags:
            console.terminal.print(screening.table(privacy))
    collectives.barrier()
    for note in (*screening.notes, *(task.line() for task in screening.tasks)):
        console.note(note)
    if screening.refused_because is not None:
        raise UploadRefused(f"{screening.refused_because}; the flagged rows are in {folder / 'scan'}")
    decisions = screening.decisions()
    run.screen(decisions)
    steps = {task.config.name: task.num_steps for task in run.tasks}
    for name, decision in decisions.items():
        done = (
            f"left out, which leaves {steps[name]:,} steps"
            if decision["weight"] == 0.0
            else f"weigh {decision['weight']:g}"
        )
        console.note(f"scan {name}: {len(decision['rows'])} flagged rows {done}; all of them in {folder / 'scan'}")
