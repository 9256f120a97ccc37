"""From prompts as read to token ids, and from token ids to answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safecl.config import ConfigError
from safecl.evaluation.generate import generate_greedy
from safecl.evaluation.model import EvalModel, gather_in_order, shard_of


def messages_of(prompt: Any) -> tuple:
    """The turns before the answer, of a `Prompt` or of a `ChatRow` (whose last assistant turn is the reference)."""
    messages = tuple(prompt.messages)
    return messages[:-1] if messages and messages[-1].role == "assistant" else messages


def text_of(prompt: Any) -> str:
    """What the user says last."""
    users = [message.content for message in messages_of(prompt) if message.role == "user"]
    return users[-1] if users else ""


def place_of(prompt: Any) -> str:
    return f"{prompt.path}:{prompt.line}"


def pad_id_of(tokenizer: Any) -> int:
    """A token to pad with; which one does not matter, padding is masked."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def ends_of_answer(tokenizer: Any, model: EvalModel) -> list[int]:
    """Tokens that end an answer: the tokenizer's and the chat template's, and those of the model's generation config where it has one.

    The template's matters for tuned base models: they learn to end with its token, which their generation config does not know.
    """
    from safecl.data import stop_ids

    return sorted({*stop_ids(tokenizer), *getattr(model, "eos_ids", ())})


def encode(model: EvalModel, tokenizer: Any, prompts: Sequence[Any], max_new_tokens: int) -> list[list[int]]:
    """Token ids of all prompts, up to and with the template's opening of the answer. ConfigError names the prompt that does not fit."""
    from safecl.data import prompt_ids

    limit = getattr(model, "max_positions", None)
    encoded = []
    for prompt in prompts:
        ids = list(prompt_ids(tokenizer, messages_of(prompt)))
        if limit is not None and len(ids) + max_new_tokens > limit:
            raise ConfigError(
                f"{place_of(prompt)}: the prompt has {len(ids)} tokens, and with max_new_tokens: {max_new_tokens} it passes the model's "
                f"{limit} positions; shorten the prompt or set max_new_tokens to {max(limit - len(ids), 0)} or less"
            )
        encoded.append(ids)
    return encoded


def answer_prompts(
    model: EvalModel, tokenizer: Any, prompts: Sequence[Any], *, max_new_tokens: int, batch_size: int
) -> list[dict[str, Any]]:
    """Greedy answers to all prompts, each rank doing its share: `{"text", "num_tokens", "finished"}` each, in order, on every rank."""
    encoded = encode(model, tokenizer, prompts, max_new_tokens)
    tokens = generate_greedy(
        model,
        shard_of(model, encoded),
        max_new_tokens=max_new_tokens,
        eos_ids=ends_of_answer(tokenizer, model),
        pad_id=pad_id_of(tokenizer),
        batch_size=batch_size,
    )
    own = [
        {"text": tokenizer.decode(ids, skip_special_tokens=True), "num_tokens": len(ids), "finished": len(ids) < max_new_tokens}
        for ids in tokens
    ]
    return gather_in_order(model, own)
