"""Judges at work in a measurement: each writes its verdict into the records of the answers."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch

from safecl.config import ConfigError
from safecl.config.judges import JudgeConfig
from safecl.config.safety import JUDGE
from safecl.distributed import devices, progress
from safecl.evaluation.answers.model import EvalModel, gather_in_order, shard_of
from safecl.evaluation.judges.kept import judged_records
from safecl.evaluation.judges.loading import load_judge
from safecl.evaluation.judges.panel import panel_of
from safecl.evaluation.judges.verdict import Verdict
from safecl.evaluation.judges.worker import judge_in_process
from safecl.evaluation.records import is_disallowed, whole_answer


def add_judge(model: EvalModel, config: JudgeConfig, records: list[dict[str, Any]]) -> None:
    """Write the judge's verdicts into `attack_succeeded` of the records of disallowed prompts, None where none is.

    A collective call. Raises ConfigError on every rank where the judge cannot work on one.
    """
    name, judged = f"{JUDGE}{config.title}", judged_records(records)
    verdicts = _in_ranks(model, config, judged) if config.where == "run" else _in_process(model, config, judged)
    for record, verdict in zip(judged, verdicts, strict=True):
        score = verdict.score
        record["attack_succeeded"][name] = None if score is None else score >= config.threshold
    for record in records:
        if is_disallowed(record):
            record["attack_succeeded"].setdefault(name, None)


def _in_ranks(model: EvalModel, config: JudgeConfig, judged: Sequence[Any]) -> list[Verdict]:
    """Judge in the ranks themselves, each its own share; the judge's memory is given back."""
    own, problem, verdicts = shard_of(model, judged), "", list[Verdict]()
    try:
        judge = load_judge(config)
        verdicts = judge.judge([record["prompt"] for record in own], [whole_answer(record) for record in own])
        del judge
    except ConfigError as error:
        problem = str(error)
    gc.collect()
    if devices.on_gpu():
        torch.cuda.empty_cache()
    _raise_everywhere(model, problem)
    return gather_in_order(model, verdicts)


def _in_process(model: EvalModel, config: JudgeConfig, judged: Sequence[Any]) -> list[Verdict]:
    """Judge in a process of its own, which rank 0 starts; the other ranks wait in step with it."""
    verdicts, problem = list[Verdict](), ""

    def in_step(works: bool) -> bool:
        progress.beat()
        return model.any(works)

    if model.rank == 0:
        try:
            verdicts = judge_in_process(config, judged, waiting=in_step)
        except ConfigError as error:
            problem = str(error)
    else:
        while in_step(False):
            pass
    _raise_everywhere(model, problem)
    return model.gather(verdicts)


def _raise_everywhere(model: EvalModel, problem: str) -> None:
    if found := [each for each in model.gather([problem]) if each]:
        raise ConfigError(found[0])


def panel_in(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the panel of the judges whose verdicts are in the records of disallowed prompts; None for fewer than
    two."""
    names = [name for name in (records[0]["attack_succeeded"] if records else ()) if name.startswith(JUDGE)]
    marks = {name: [record["attack_succeeded"][name] for record in records] for name in names}
    return panel_of(marks, [record["id"] for record in records])
