"""The aligned model's own refusals: its greedy answers to prompts that are known to be disallowed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from safecl.data.messages import ChatRow, Message
from safecl.data.reading.rows import Prompt
from safecl.data.templates.masks import tokenize_row
from safecl.data.templates.thinking import without_empty_thought
from safecl.evaluation.answers.model import EvalModel
from safecl.evaluation.answers.prompts import answer_prompts
from safecl.evaluation.scoring.keywords import refused_by_any

NUM_PROMPTS = 128
ANSWER_TOKENS = 24
FEW = 0.5
"""A smaller share of refused prompts gives a warning."""


T = TypeVar("T")


@dataclass(frozen=True)
class Refusals:
    """Openings of refusals, which are scored as continuations of a prompt.

    openings: token ids of each, none the beginning of another, the most common first. texts: the same, decoded. share:
    the part of the known disallowed prompts that the model refuses, in [0, 1]; None where `scan.refusals` gives texts.
    """

    openings: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    share: float | None = None

    @property
    def warning(self) -> str | None:
        """Warning where the model refuses so little that the screen may be blind, or None."""
        if self.share is None or self.share >= FEW:
            return None
        return (
            f"the model refuses only {self.share:.0%} of the known disallowed prompts, "
            "so a screen by its refusals misses much"
        )


def own_refusals(
    model: EvalModel, tokenizer: Any, disallowed: Sequence[Prompt | ChatRow], *, num_tokens: int, num_refusals: int
) -> Refusals | None:
    """Find the most common openings among the model's refusals of known disallowed prompts. A collective call.

    Args: `disallowed`: prompts, or rows whose last assistant turn is left out; at most 128 are taken, evenly.
    `num_tokens`: tokens of an opening. `num_refusals`: largest number of openings. Return None where the model refuses
    none of the prompts.
    """
    chosen = evenly(disallowed, NUM_PROMPTS)
    # Scores are taken behind an empty thought, too: there the first tokens are those of the answer.
    records = answer_prompts(
        model, tokenizer, chosen, max_new_tokens=ANSWER_TOKENS, batch_size=NUM_PROMPTS, mode="empty"
    )
    answers = [record["text"] for record in records]
    refusals = [answer.strip() for answer in answers if refused_by_any(answer)]
    found = _distinct([opening_of(tokenizer, text, num_tokens) for text in refusals], num_refusals)
    if not found:
        return None
    return Refusals(found, tuple(tokenizer.decode(opening) for opening in found), len(refusals) / len(answers))


def evenly(items: Sequence[T], most: int) -> Sequence[T]:
    """Choose at most `most` items, evenly spread."""
    return items if len(items) <= most else [items[i * len(items) // most] for i in range(most)]


def given_refusals(tokenizer: Any, texts: Sequence[str], num_tokens: int) -> Refusals:
    """Take the openings of these texts."""
    found = _distinct([opening_of(tokenizer, text, num_tokens) for text in texts], len(texts))
    return Refusals(found, tuple(tokenizer.decode(opening) for opening in found))


def _distinct(openings: Sequence[tuple[int, ...]], most: int) -> tuple[tuple[int, ...], ...]:
    """Return the most common openings. Where one is the beginning of another, only the shorter one stays: as an event
    it includes the longer one."""
    counted = Counter(opening for opening in openings if opening)
    shorter = [o for o in counted if not any(o != other and o[: len(other)] == other for other in counted)]
    return tuple(sorted(shorter, key=lambda opening: (-counted[opening], opening))[:most])


def opening_of(tokenizer: Any, answer: str, num_tokens: int) -> tuple[int, ...]:
    """Return the first tokens of an answer, as they follow the template's opening of an assistant turn and an empty
    thought."""
    chat = ChatRow((Message("user", "-"), Message("assistant", answer)), "refusal", 1)
    row = tokenize_row(tokenizer, chat, max_length=10**6)
    end = len(tokenizer(answer, add_special_tokens=False)["input_ids"])  # without the token that ends the turn
    trained = without_empty_thought(tokenizer, row.input_ids[row.loss_mask].tolist())
    return tuple(trained[: min(num_tokens, end)])
