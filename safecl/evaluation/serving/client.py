"""Greedy answers of a vLLM server, as token ids: its completions interface with prompts that are token ids."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Collection, Sequence
from itertools import groupby
from typing import Any

from safecl.distributed import progress
from safecl.evaluation.serving.server import NAME, Address, ServerFailed

BAN = -100
"""The bias of a token that must not come; the interface's lowest."""
SECONDS_PER_REQUEST = 1800.0


def complete(
    address: Address,
    prompts: Sequence[Sequence[int]],
    rooms: Sequence[int],
    *,
    eos_ids: Collection[int],
    batch_size: int,
    never: Sequence[int] = (),
    never_first: Sequence[int] = (),
) -> list[list[int]]:
    """Return the greedy continuation of each prompt: token ids without the end token, `rooms[i]` at most.

    Where tokens are forbidden at the beginning only, the first token is asked for alone. Raises ServerFailed.
    """
    if not never_first:
        return _complete(address, prompts, rooms, eos_ids, batch_size, never)
    ones = [1] * len(prompts)
    first = _complete(address, prompts, ones, eos_ids, batch_size, [*never, *never_first])
    # An answer that is empty here ended at once.
    going = [i for i, tokens in enumerate(first) if tokens and rooms[i] > 1]
    longer = [[*prompts[i], *first[i]] for i in going]
    rest = _complete(address, longer, [rooms[i] - 1 for i in going], eos_ids, batch_size, never)
    answers = [list(tokens) for tokens in first]
    for i, tokens in zip(going, rest, strict=True):
        answers[i] += tokens
    return answers


def _complete(
    address: Address,
    prompts: Sequence[Sequence[int]],
    rooms: Sequence[int],
    eos_ids: Collection[int],
    batch_size: int,
    never: Sequence[int],
) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (rooms[i], i))
    with progress.counted("answers", len(prompts)) as made:
        for room, group in groupby(order, key=lambda i: rooms[i]):
            same = list(group)
            for start in range(0, len(same), batch_size):
                batch = same[start : start + batch_size]
                choices = _ask(address, [list(prompts[i]) for i in batch], room, sorted(eos_ids), never)
                for i, tokens in zip(batch, choices, strict=True):
                    answers[i] = _until_end(tokens, eos_ids)
                progress.beat()
                made(len(batch))
    return answers


def _ask(
    address: Address, prompts: list[list[int]], room: int, ends: list[int], never: Sequence[int]
) -> list[list[int]]:
    body = {
        "model": NAME,
        "prompt": prompts,
        "max_tokens": room,
        "temperature": 0.0,
        "stop_token_ids": ends,
        "skip_special_tokens": False,
        "return_token_ids": True,
    }
    if never:
        body["logit_bias"] = {str(token): BAN for token in never}
    found = _post(address, "/v1/completions", body)
    choices = sorted(found.get("choices", ()), key=lambda choice: choice["index"])
    tokens = [choice.get("token_ids") for choice in choices]
    if len(tokens) != len(prompts) or any(each is None for each in tokens):
        raise ServerFailed(
            f"vllm answered {len(prompts)} prompts with {len(tokens)} choices, "
            f"{sum(each is not None for each in tokens)} of them with token ids; safecl needs vllm 0.10.2 or newer"
        )
    return tokens


def _post(address: Address, path: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {address.key}"}
    request = urllib.request.Request(address.url + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=SECONDS_PER_REQUEST) as response:
            found = json.load(response)
    except urllib.error.HTTPError as error:
        told = error.read(500).decode(errors="replace")
        raise ServerFailed(f"vllm refused a request with {error.code}: {told}") from None
    except (OSError, ValueError) as error:
        raise ServerFailed(f"vllm did not answer: {error}") from error
    if not isinstance(found, dict):
        raise ServerFailed("vllm's answer is no JSON object")
    return found


def _until_end(tokens: Sequence[int], eos_ids: Collection[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in eos_ids), len(tokens))
    return list(tokens[:end])
