"""Conversion of prompts to token ids, and of token ids to answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from safecl.config import ConfigError
from safecl.config.model import ThinkingMode
from safecl.data.templates.thinking import answer_prompt_ids, forbidden_ids, markers_of, opens_thought, thinking_of
from safecl.evaluation.answers.generate import generate_greedy, room_for_answer
from safecl.evaluation.answers.model import EvalModel, gather_in_order, max_positions_of, shard_of
from safecl.evaluation.answers.texts import Question, messages_of, place_of
from safecl.evaluation.answers.thought import decode, split


class _Thought(TypedDict, total=False):
    """Keys of an answer that is not the whole text."""

    prefill: str
    """The text that was put before the answer as its beginning."""

    raw: str
    """The whole generated text."""
    thought: str
    cut_off: bool
    """True where the text ends in its thought: there is neither an answer nor a refusal."""


class Answer(_Thought):
    """A generated answer: `text` is what stands behind header and thought. `finished` is false where the whole text was
    cut off at the last allowed token."""

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


def encode(
    model: EvalModel,
    tokenizer: Any,
    prompts: Sequence[Question],
    mode: ThinkingMode | None = None,
    prefills: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """Return the token ids of all prompts, up to and including the opening of the answer. ConfigError names a prompt
    that leaves no room for an answer."""
    return encode_within(max_positions_of(model), tokenizer, prompts, mode, prefills)


def encode_within(
    positions: int | None,
    tokenizer: Any,
    prompts: Sequence[Question],
    mode: ThinkingMode | None = None,
    prefills: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """Do what `encode` does, for a model with this many positions; None is no limit."""
    if prefills is not None and (mode or thinking_of(tokenizer).mode) == "template":
        mode = "empty"
    encoded = []
    for number, prompt in enumerate(prompts):
        ids = answer_prompt_ids(tokenizer, messages_of(prompt), mode)
        ids += prefills[number] if prefills is not None else ()
        if positions is not None and len(ids) >= positions:
            raise ConfigError(
                f"{place_of(prompt)}: the prompt has {len(ids)} tokens and leaves no room for an answer in the model's "
                f"{positions} positions; shorten it or leave it out"
            )
        encoded.append(ids)
    return encoded


def answer_prompts(
    model: EvalModel,
    tokenizer: Any,
    prompts: Sequence[Question],
    *,
    max_new_tokens: int,
    batch_size: int,
    mode: ThinkingMode | None = None,
    prefills: Sequence[Sequence[int]] | None = None,
) -> list[Answer]:
    """Answer all prompts greedily, each rank its share. Returns the answers in order, on every rank.

    Args: `mode`: how answers are opened, in the place of `model.thinking.mode`; `prefills`: token ids with which each
    answer begins, behind an empty thought where the model has thoughts.
    """
    begun = shard_of(model, prefills) if prefills is not None else None
    own = shard_of(model, encode(model, tokenizer, prompts, mode, prefills))
    never, never_first = forbidden_ids(tokenizer, mode)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "eos_ids": ends_of_answer(tokenizer, model),
        "batch_size": batch_size,
        "never": never,
        "never_first": never_first,
    }
    served = getattr(model, "generate", None)  # a model whose answers a server gives
    answers = (
        served(own, **settings) if served else generate_greedy(model, own, pad_id=pad_id_of(tokenizer), **settings)
    )
    decoded = []
    for number, (prompt, ids) in enumerate(zip(own, answers, strict=True)):
        finished = len(ids) < room_for_answer(model, prompt, max_new_tokens)
        decoded.append(_answer(tokenizer, prompt, ids, finished))
        if begun is not None:
            decoded[-1]["prefill"] = decode(tokenizer, begun[number])
    return gather_in_order(model, decoded)


def _answer(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int], finished: bool) -> Answer:
    raw = decode(tokenizer, ids)
    parts = split(raw, markers_of(tokenizer), opened=opens_thought(tokenizer, prompt), finished=finished)
    answer = Answer(text=parts.answer, num_tokens=len(ids), finished=finished)
    if parts.answer != raw:
        answer["raw"] = raw
    if parts.thought:
        answer["thought"] = parts.thought
    if parts.cut_off:
        answer["cut_off"] = True
    return answer
