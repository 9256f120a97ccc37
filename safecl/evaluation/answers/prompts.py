"""From prompts as read to token ids, and from token ids to answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safecl.config import ConfigError
from safecl.evaluation.answers.generate import generate_greedy, room_for_answer
from safecl.evaluation.answers.model import EvalModel, gather_in_order, shard_of
from safecl.evaluation.answers.texts import messages_of, place_of


def pad_id_of(tokenizer: Any) -> int:
    """A token to pad with; which one does not matter, padding is masked."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def ends_of_answer(tokenizer: Any, model: EvalModel) -> list[int]:
    """Tokens that end an answer: the tokenizer's and the chat template's, and those of the model's generation config
    where it has one.

    The template's matters for tuned base models: they learn to end with its token, which their generation config does
    not know.
    """
    from safecl.data import stop_ids

    return sorted({*stop_ids(tokenizer), *getattr(model, "eos_ids", ())})


def encode(model: EvalModel, tokenizer: Any, prompts: Sequence[Any]) -> list[list[int]]:
    """Token ids of all prompts, up to and with the template's opening of the answer. ConfigError names a prompt that
    leaves no room."""
    from safecl.data import prompt_ids

    encoded = []
    for prompt in prompts:
        ids = list(prompt_ids(tokenizer, messages_of(prompt)))
        if room_for_answer(model, ids, 1) < 1:
            raise ConfigError(
                f"{place_of(prompt)}: the prompt has {len(ids)} tokens and leaves no room for an answer in the model's "
                f"{model.max_positions} positions; shorten it or leave it out"
            )
        encoded.append(ids)
    return encoded


def answer_prompts(
    model: EvalModel, tokenizer: Any, prompts: Sequence[Any], *, max_new_tokens: int, batch_size: int
) -> list[dict[str, Any]]:
    """Greedy answers to all prompts, each rank doing its share: `{"text", "num_tokens", "finished"}` each, in order, on
    every rank."""
    own = shard_of(model, encode(model, tokenizer, prompts))
    answers = generate_greedy(
        model,
        own,
        max_new_tokens=max_new_tokens,
        eos_ids=ends_of_answer(tokenizer, model),
        pad_id=pad_id_of(tokenizer),
        batch_size=batch_size,
    )
    told = []
    for prompt, ids in zip(own, answers, strict=True):
        finished = len(ids) < room_for_answer(model, prompt, max_new_tokens)
        told.append(
            {"text": tokenizer.decode(ids, skip_special_tokens=True), "num_tokens": len(ids), "finished": finished}
        )
    return gather_in_order(model, told)
