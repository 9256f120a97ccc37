"""pass@1 of the answers to HumanEval-style problems: which of them pass their tests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from safecl.config import EvalConfig
from safecl.data.messages import ChatRow
from safecl.distributed import progress
from safecl.evaluation.answers.model import EvalModel, gather_in_order, shard_of
from safecl.evaluation.answers.prompts import Answer
from safecl.evaluation.code.problems import program_of
from safecl.evaluation.code.sandbox import PASSED, RunLimits, run_program

MOST_AT_ONCE: Final = 8


def outcomes(model: EvalModel, eval: EvalConfig, rows: Sequence[ChatRow], answers: Sequence[Answer]) -> list[str]:
    """Run the tests of each problem on its answer, each rank its share. Returns `passed`, `no answer`, or what went
    wrong, in order, on every rank."""
    limits = RunLimits(eval.run_seconds, eval.run_memory)

    def run(pair: tuple[ChatRow, Answer]) -> str:
        row, answer = pair
        outcome = "no answer" if answer.get("cut_off") else run_program(program_of(answer["text"], row.tags), limits)
        progress.beat()
        return outcome

    own = shard_of(model, list(zip(rows, answers, strict=True)))
    at_once = max(1, min(MOST_AT_ONCE, len(os.sched_getaffinity(0)) // model.world_size))
    with ThreadPoolExecutor(at_once) as threads:
        return gather_in_order(model, list(threads.map(run, own)))


def marks_of(outcome: str) -> dict[str, bool | float | str]:
    """Return what a record says of an outcome."""
    return {"correct": outcome == PASSED, "outcome": outcome}
