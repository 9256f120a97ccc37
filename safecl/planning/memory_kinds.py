"""The tags of the memory's rows, and the shares of its draws.

With `memory.balance_by: kind` a row without the tag `kind` gets it from its text: refusal where the answer is one by
any list of refusals, else answer. `safecl memory build` writes the same tag.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from safecl.config import ConfigError, MemoryConfig
from safecl.data import Row, TokenDataset
from safecl.engine.artifacts.memory_rows import ANSWER, REFUSAL
from safecl.evaluation.answers.thought import answer_of
from safecl.evaluation.scoring.keywords import refused_by_any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KIND, TASK_ROW = "kind", "task"

TagsOf = Callable[[int], dict[str, str]]


def tags_of_memory(config: MemoryConfig, rows: TokenDataset, tokenizer: PreTrainedTokenizerBase) -> TagsOf:
    """Return a function from a row's number to its tags, with its kind where the draws or the policy need it."""
    if config.balance_by != KIND:
        return rows.tags

    def tags(i: int) -> dict[str, str]:
        own = rows.tags(i)
        return own if KIND in own else {**own, KIND: kind_of(rows.row(i), tokenizer)}

    return tags


def tags_of_task_rows(config: MemoryConfig, rows: TokenDataset) -> TagsOf:
    """Return the same for rows of a finished task, which are neither refusals nor the model's own answers."""
    return (lambda i: {KIND: TASK_ROW, **rows.tags(i)}) if config.balance_by == KIND else rows.tags


def kind_of(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the kind of a row by its answer's text: refusal, or answer."""
    text = str(tokenizer.decode(row.input_ids[row.loss_mask].tolist(), skip_special_tokens=True))
    return REFUSAL if refused_by_any(answer_of(tokenizer, text)) else ANSWER


def check_shares(config: MemoryConfig, rows: TokenDataset, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return notes on shares that the draws cannot have: their category has no rows. Raises ConfigError where none of
    the named categories has any."""
    if not config.shares or config.balance_by in ("task", "source"):
        return []
    tags = tags_of_memory(config, rows, tokenizer)
    found = Counter(tags(i).get(config.balance_by, "") for i in range(len(rows)))
    there = ", ".join(f"{name or 'none'} ({count:,})" for name, count in found.most_common(5))
    missing = [name for name in config.shares if name not in found]
    if len(missing) == len(config.shares):
        raise ConfigError(
            f"memory.shares: no row of {config.origin} has the {config.balance_by} {', '.join(missing)}; "
            f"the rows have: {there}"
        )
    if set(found) <= set(config.shares) and sum(config.shares.values()) < 1 - 1e-9:
        return [
            f"memory.shares: {config.origin} has no rows beside {there}, so the draws hold nothing else; "
            "`safecl memory build --benign` adds harmless rows, which keep over-refusal low"
        ]
    return [f"memory.shares: no row of {config.origin} has the {config.balance_by} {name}" for name in missing]
