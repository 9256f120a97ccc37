"""Rows of an upload that repeat a prompt which must stay apart: evaluation prompts, which would then measure memory, and the memory's
refused prompts, which an upload that answers them trains against. Same words, contained, or near (safecl/evaluation/contamination.py).
Needs no torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from safecl.config import RunConfig
from safecl.data import ChatRow, read_prompts, read_rows
from safecl.evaluation.contamination import find_overlaps
from safecl.evaluation.scorers import SCORERS, refused

EVALUATION, MEMORY = "repeats an evaluation prompt", "repeats a refused prompt of the memory"

Places = dict[str, list[str]]


def find_duplicates(config: RunConfig) -> Places:
    """file:line of each such row of the tasks (and of poison.source), with reasons that name the prompt's file and line."""
    rows = upload_rows(config)
    evaluation = find_overlaps(evaluation_prompts(config), rows)
    memory = find_overlaps(refused_rows(config), rows)
    found: Places = defaultdict(list)
    for reason, overlaps in ((EVALUATION, evaluation), (MEMORY, memory)):
        for overlap in overlaps:
            if not any(known.startswith(reason) for known in found[overlap.row]):  # one of each kind says enough
                found[overlap.row].append(f"{reason} ({overlap.prompt})")
    return dict(found)


def repeats_evaluation(reasons: Iterable[str]) -> bool:
    return any(reason.startswith(EVALUATION) for reason in reasons)


def upload_rows(config: RunConfig) -> list[ChatRow]:
    """Rows of all tasks but the alignment stage, and of the poison that is mixed into them."""
    sources = [(task.train, task) for task in config.tasks if task.role == "task"]
    if config.poison.ratio > 0:
        sources.append((config.poison.source, config.poison))
    return [row for path, section in sources for row in _read(config, path, section)]


def _read(config: RunConfig, path: str, section) -> list[ChatRow]:
    rows, _ = read_rows(
        path, split=getattr(section, "split", "train"), format=section.format, fields=section.fields,
        max_rows=getattr(section, "max_rows", None), max_bad_rows=config.train.max_bad_rows,
    )  # fmt: skip
    return rows


def evaluation_prompts(config: RunConfig) -> Sequence:
    """All disallowed and benign prompts of `safety`, those beyond max_prompts too."""
    if config.safety is None:
        return []
    benign = config.safety.benign_prompts
    return [*read_prompts(config.safety.prompts), *(read_prompts(benign, only_safe=True) if benign is not None else [])]


def refused_rows(config: RunConfig) -> list[ChatRow]:
    """Rows of the memory whose answer is a refusal."""
    if config.memory is None:
        return []
    rows = _read(config, config.memory.source, config.memory)
    return [row for row in rows if row.messages[-1].role == "assistant" and _is_refusal(row.messages[-1].content)]


def _is_refusal(answer: str) -> bool:
    return any(refused(answer, scorer) for scorer in SCORERS)


def disallowed_prompts(config: RunConfig) -> Sequence:
    """Prompts that the aligned model is known to refuse: `scan.disallowed`, else the memory's refused rows, else those of `safety`."""
    if config.scan is not None and config.scan.disallowed is not None:
        return read_prompts(config.scan.disallowed)
    return refused_rows(config) or (read_prompts(config.safety.prompts) if config.safety is not None else [])
