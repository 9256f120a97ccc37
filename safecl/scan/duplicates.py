"""Rows of an upload that repeat a prompt which must stay apart: evaluation prompts, which would then measure memory,
and the memory's refused prompts, which an upload that answers them trains against. Same words, contained, or near
(safecl/evaluation/contamination.py). Needs no torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from safecl.config import RunConfig
from safecl.data import ChatRow, read_prompts
from safecl.data.config_rows import read_section, upload_rows
from safecl.evaluation.contamination import find_overlaps
from safecl.evaluation.scoring.keywords import SCORERS, refused

EVALUATION, MEMORY = "repeats an evaluation prompt", "repeats a refused prompt of the memory"

Places = dict[str, list[str]]


def find_duplicates(config: RunConfig) -> Places:
    """file:line of each such row of the tasks (and of poison.source), with reasons that name the prompt's file and
    line."""
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
    rows = read_section(config, config.memory.source, config.memory)
    return [row for row in rows if row.messages[-1].role == "assistant" and _is_refusal(row.messages[-1].content)]


def _is_refusal(answer: str) -> bool:
    return any(refused(answer, scorer) for scorer in SCORERS)


def disallowed_prompts(config: RunConfig) -> Sequence:
    """Prompts that the aligned model is known to refuse: `scan.disallowed`, else the memory's refused rows, else those
    of `safety`."""
    if config.scan is not None and config.scan.disallowed is not None:
        return read_prompts(config.scan.disallowed)
    return refused_rows(config) or (read_prompts(config.safety.prompts) if config.safety is not None else [])
