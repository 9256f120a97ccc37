"""Finds rows of an upload that repeat a prompt which must not be in it.

These are evaluation prompts, which would then measure memorisation, and the memory's refused prompts: an upload that
answers them trains against the refusals. A repeat has the same words, contains the prompt, or is near
(safecl/evaluation/contamination.py). Imports no torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from safecl.config import RunConfig
from safecl.data.config_rows import read_memory_rows, read_upload_rows
from safecl.data.messages import ChatRow
from safecl.data.reading.rows import Prompt, read_prompts
from safecl.data.templates.thinking import markers_of_config
from safecl.evaluation.answers.thought import split
from safecl.evaluation.contamination import find_overlaps
from safecl.evaluation.scoring.keywords import refused_by_any

EVALUATION, MEMORY = "repeats an evaluation prompt", "repeats a refused prompt of the memory"

Reasons = dict[str, list[str]]
"""Reasons by the place of a row, `file:line`."""


def find_duplicates(config: RunConfig) -> Reasons:
    """Find the rows of the tasks and of poison.source that repeat such a prompt.

    Returns: reasons by the row's place (`file:line`). A reason names the prompt's file and line.
    """
    rows = read_upload_rows(config)
    evaluation = find_overlaps(evaluation_prompts(config), rows)
    memory = find_overlaps(refused_rows(config), rows)
    found: Reasons = defaultdict(list)
    for reason, overlaps in ((EVALUATION, evaluation), (MEMORY, memory)):
        for overlap in overlaps:
            if not any(known.startswith(reason) for known in found[overlap.row]):  # one reason of each kind is enough
                found[overlap.row].append(f"{reason} ({overlap.prompt})")
    return dict(found)


def repeats_evaluation(reasons: Iterable[str]) -> bool:
    return any(reason.startswith(EVALUATION) for reason in reasons)


def evaluation_prompts(config: RunConfig) -> list[Prompt]:
    """Read all disallowed and benign prompts of `safety`, also those beyond max_prompts."""
    if config.safety is None:
        return []
    benign = config.safety.benign_prompts
    return [*read_prompts(config.safety.prompts), *(read_prompts(benign, only_safe=True) if benign is not None else [])]


def refused_rows(config: RunConfig) -> list[ChatRow]:
    """Read the rows of the memory whose last answer is a refusal."""
    answered = [row for row in read_memory_rows(config) if row.messages[-1].role == "assistant"]
    markers = markers_of_config(config.model.thinking)
    return [row for row in answered if _is_refusal(split(row.messages[-1].content, markers).answer)]


def answered_rows(config: RunConfig) -> list[ChatRow]:
    """Read the rows of the memory whose last answer is none: known harmless rows."""
    refused = {(row.path, row.line) for row in refused_rows(config)}
    rows = [row for row in read_memory_rows(config) if row.messages[-1].role == "assistant"]
    return [row for row in rows if (row.path, row.line) not in refused]


def _is_refusal(answer: str) -> bool:
    return refused_by_any(answer)


def disallowed_prompts(config: RunConfig) -> Sequence[Prompt | ChatRow]:
    """Read prompts that the aligned model is known to refuse: `scan.disallowed`, else the memory's refused rows, else
    `safety.prompts`."""
    if config.scan is not None and config.scan.disallowed is not None:
        return read_prompts(config.scan.disallowed)
    return refused_rows(config) or (read_prompts(config.safety.prompts) if config.safety is not None else [])
