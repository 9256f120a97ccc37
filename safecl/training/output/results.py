"""Writes the files of a finished run: model folders with their cards, results.json and report.html."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safecl
from safecl.distributed import collectives
from safecl.engine.checkpoint.model_export import save_model
from safecl.engine.passes.live_model import evaluating
from safecl.engine.teachers.recorded import TEACHER
from safecl.evaluation import Evaluation, GateResult, summarise
from safecl.evaluation.provenance import SCHEMA, now
from safecl.planning.plans import RunPlan
from safecl.report.card import Card
from safecl.report.folder import MEASURED
from safecl.report.run import REPORT, write_run_report
from safecl.storage.cache_folder import PREPARED
from safecl.storage.model_folder import FAILED_MODEL, LIVE_MODEL, RUN_MODEL
from safecl.training.output.console import Console
from safecl.training.output.cost import cost_of, kept_bytes, state_bytes
from safecl.training.run import Run


def save_models(run: Run, plan: RunPlan, folder: Path, card: Card, *, passed: bool = True) -> str:
    """Save the last weights and, where the run has one, the average of the weights. A collective call.

    The average is then `model`, and the last weights are `model-live`. Without `passed`, for a model that did not pass
    the gate, `model-failed` takes the place of `model`, and there is no `model`. Returns a line about it. card: the
    card of the last weights.
    """
    has_average = run.saves_average
    tuned, other = (RUN_MODEL, FAILED_MODEL) if passed else (FAILED_MODEL, RUN_MODEL)
    if collectives.rank() == 0:
        shutil.rmtree(folder / other, ignore_errors=True)
    card = replace(card, folder=tuned)
    live = folder / (LIVE_MODEL if has_average else tuned)
    saved = save_model(run.engine, plan.tokenizer, live, card=replace(card, measured=not has_average).text())
    if has_average:
        with evaluating(run.engine, average=True):
            text = replace(card, average=True).text()
            saved = save_model(run.engine, plan.tokenizer, folder / tuned, card=text)
    both = " (the average) and model-live (the last weights)" if has_average else ""
    return f"saved {folder / tuned}{both}: {saved}"


def results_of(
    run: Run,
    evaluations: Sequence[Evaluation],
    gate: GateResult | None,
    *,
    num_tokens: int,
    seconds: float,
    metrics: bytes,
    provenance: dict[str, Any],
    skipped_at_the_end: int = 0,
    events: Sequence[dict[str, Any]] = (),
    drift: dict[str, dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Return the contents of results.json, the same on every rank. A collective call, before `run.finish()`.

    num_tokens: tokens trained on, over all ranks. seconds: time of the whole run. metrics: the lines of metrics.jsonl,
    on rank 0. provenance: see provenance.py. skipped_at_the_end: the last steps that were skipped, in a row.
    events: what the run did where the gate failed. drift: distance of the saved weights from the aligned model by
    layer; None where it was not measured.
    """
    state = state_bytes(run)
    return {
        "schema": SCHEMA,
        "safecl": safecl.__version__,
        "finished": collectives.gather_objects([now()])[0],
        "methods": list(run.config.methods),
        "world_size": collectives.world_size(),
        "steps": run.global_step,
        "skipped_steps": run.skipped_steps,
        "skipped_at_the_end": skipped_at_the_end,
        "tokens": num_tokens,
        "seconds": collectives.gather_objects([round(seconds, 3)])[0],
        "cost": cost_of(run, metrics, state),
        "saved": "average" if run.saves_average else "live",
        "kept_bytes": kept_bytes(run, state),
        "evaluations": [evaluation.to_dict() for evaluation in evaluations],
        "summary": summarise(evaluations),
        "gate": gate.to_dict() if gate is not None else None,
        "provenance": provenance,
        **({"events": list(events)} if events else {}),
        **({"weight_drift": drift} if drift is not None else {}),
    }


def complete_folder(folder: Path, console: Console) -> None:
    """Finish a run that was killed after results.json: write the report, remove what only an unfinished run needs."""
    if not (folder / REPORT).exists():
        write_report(folder, console)
    remove_what_only_an_unfinished_run_needs(folder)
    shutil.rmtree(folder / TEACHER, ignore_errors=True)


def remove_what_only_an_unfinished_run_needs(folder: Path) -> None:
    """Remove measured.json, and prepared rows that `privacy.keep_prepared: false` has put into the run folder."""
    (folder / MEASURED).unlink(missing_ok=True)
    shutil.rmtree(folder / PREPARED, ignore_errors=True)


def write_report(folder: Path, console: Console) -> None:
    """Write report.html. A run without it has not failed: all that the page shows is in results.json and outputs/."""
    try:
        write_run_report(folder)
    except OSError as error:
        console.note(f"report.html could not be written: {error.strerror}; `safecl report {folder}` makes it")
