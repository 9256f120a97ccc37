"""How the aligned model refuses, in its own words: what it answers greedily to prompts that are known to be
disallowed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from safecl.data import ChatRow, Message, tokenize_row
from safecl.evaluation.answers.model import EvalModel
from safecl.evaluation.answers.prompts import answer_prompts
from safecl.evaluation.scoring.keywords import SCORERS, refused

NUM_PROMPTS = 128
ANSWER_TOKENS = 24
FEW = 0.5


@dataclass(frozen=True)
class Refusals:
    """Openings of refusals, to be put behind a prompt.

    openings: token ids of each, none the beginning of another, the most common first. texts: what they say. share: of
    the known disallowed prompts that the model refuses, in [0, 1]; None where the refusals were given.
    """

    openings: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    share: float | None = None

    @property
    def warning(self) -> str | None:
        """Why the screen may be blind, where it may be."""
        if self.share is not None and self.share < FEW:
            return f"the model refuses only {self.share:.0%} of the known disallowed prompts, so a screen by its refusals sees little"
        return None


def own_refusals(
    model: EvalModel, tokenizer: Any, disallowed: Sequence[Any], *, num_tokens: int, num_refusals: int
) -> Refusals | None:
    """The most common openings among the model's refusals of known disallowed prompts; None where it refuses none of
    them.

    Args: `disallowed` prompts, or rows whose last assistant turn is left out, of which 128 are taken evenly;
    `num_tokens` of an opening; `num_refusals` openings at most. Every rank calls it.
    """
    chosen = (
        [disallowed[i * len(disallowed) // NUM_PROMPTS] for i in range(NUM_PROMPTS)]
        if len(disallowed) > NUM_PROMPTS
        else disallowed
    )
    answers = [
        a["text"]
        for a in answer_prompts(model, tokenizer, chosen, max_new_tokens=ANSWER_TOKENS, batch_size=NUM_PROMPTS)
    ]
    refusals = [answer.strip() for answer in answers if any(refused(answer, scorer) for scorer in SCORERS)]
    found = _distinct([opening_of(tokenizer, text, num_tokens) for text in refusals], num_refusals)
    if not found:
        return None
    return Refusals(found, tuple(tokenizer.decode(opening) for opening in found), len(refusals) / len(answers))


def given_refusals(tokenizer: Any, texts: Sequence[str], num_tokens: int) -> Refusals:
    """The openings of these texts."""
    found = _distinct([opening_of(tokenizer, text, num_tokens) for text in texts], len(texts))
    return Refusals(found, tuple(tokenizer.decode(opening) for opening in found))


def _distinct(openings: Sequence[tuple[int, ...]], most: int) -> tuple[tuple[int, ...], ...]:
    """The most common ones; of two where one begins like the whole of the other, the shorter, which contains it as an
    event."""
    counted = Counter(opening for opening in openings if opening)
    shorter = [o for o in counted if not any(o != other and o[: len(other)] == other for other in counted)]
    return tuple(sorted(shorter, key=lambda opening: (-counted[opening], opening))[:most])


def opening_of(tokenizer: Any, answer: str, num_tokens: int) -> tuple[int, ...]:
    """The first tokens of an answer, as they stand behind the template's opening of it."""
    row = tokenize_row(
        tokenizer, ChatRow((Message("user", "-"), Message("assistant", answer)), "refusal", 1), max_length=10**6
    )
    end = len(tokenizer(answer, add_special_tokens=False)["input_ids"])  # without the token that ends the turn
    return tuple(row.input_ids[row.loss_mask][: min(num_tokens, end)].tolist())
