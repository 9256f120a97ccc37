"""Conversion of prompts to token ids, and of token ids to answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from safecl.config import ConfigError
from safecl.evaluation.answers.generate import generate_greedy, room_for_answer
from safecl.evaluation.answers.model import EvalModel, gather_in_order, max_positions_of, shard_of
from safecl.evaluation.answers.texts import Question, messages_of, place_of


class Answer(TypedDict):
    """A generated answer. `finished` is false where it was cut off at the last allowed token."""

    text: str
    num_tokens: int
    finished: bool


def pad_id_of(tokenizer: Any) -> int:
    """Return a token to pad with. Any token would do: padding is masked."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def ends_of_answer(tokenizer: Any, model: EvalModel) -> list[int]:
    """Return the tokens that end an answer: those of the tokenizer, of the chat template and of the model's generation
    config.

    Tuned base models learn to end with the template's token, which their generation config does not name.
    """
    from safecl.data import stop_ids

    return sorted({*stop_ids(tokenizer), *getattr(model, "eos_ids", ())})


def encode(model: EvalModel, tokenizer: Any, prompts: Sequence[Question]) -> list[list[int]]:
    """Return the token ids of all prompts, up to and including the template's opening of the answer. ConfigError names
    a prompt that leaves no room for an answer."""
    from safecl.data import prompt_ids

    encoded = []
    for prompt in prompts:
        ids = list(prompt_ids(tokenizer, messages_of(prompt)))
        if room_for_answer(model, ids, 1) < 1:
            raise ConfigError(
                f"{place_of(prompt)}: the prompt has {len(ids)} tokens and leaves no room for an answer in the model's "
                f"{max_positions_of(model)} positions; shorten it or leave it out"
            )
        encoded.append(ids)
    return encoded


def answer_prompts(
    model: EvalModel, tokenizer: Any, prompts: Sequence[Question], *, max_new_tokens: int, batch_size: int
) -> list[Answer]:
    """Answer all prompts greedily, each rank its share. Returns the answers in order, on every rank."""
    own = shard_of(model, encode(model, tokenizer, prompts))
    answers = generate_greedy(
        model,
        own,
        max_new_tokens=max_new_tokens,
        eos_ids=ends_of_answer(tokenizer, model),
        pad_id=pad_id_of(tokenizer),
        batch_size=batch_size,
    )
    decoded = []
    for prompt, ids in zip(own, answers, strict=True):
        finished = len(ids) < room_for_answer(model, prompt, max_new_tokens)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        decoded.append(Answer(text=text, num_tokens=len(ids), finished=finished))
    return gather_in_order(model, decoded)
