"""Greedy generation in batches: left padding, a key-value cache, and ranks in lockstep.

    y_t = argmax p(. | prompt, y_<t),   t = 1 .. max_new_tokens, until an end token

Generation is greedy, so that rates do not depend on chance and a repeated measurement gives the same answers.

Under ZeRO-3 every forward pass is a collective: if one rank stopped early, the others would wait forever. So the ranks
agree on each round and each token with `model.any`; a rank without prompts left feeds a dummy token.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

import torch

from safecl.distributed import progress
from safecl.evaluation.answers.model import EvalModel, max_positions_of


@torch.no_grad()
def generate_greedy(
    model: EvalModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    pad_id: int,
    batch_size: int,
    never: Sequence[int] = (),
    never_first: Sequence[int] = (),
) -> list[list[int]]:
    """Generate the greedy continuation of each prompt of this rank.

    Args: `prompts`: token ids of this rank's prompts (their number may differ between ranks, and be 0); `eos_ids`:
    tokens that end an answer; `batch_size`: prompts generated together on one rank, or more where the model asks for it
    (`rows_at_once`); `never`, `never_first`: tokens that an answer cannot have, or cannot begin with.
    Returns: new token ids per prompt, in the order of `prompts`, without the end token; `room_for_answer` tokens where
    no end token came. Raises: ValueError for an empty prompt, or one that leaves no room within the model's positions.
    """
    _check(model, prompts, max_new_tokens, batch_size)
    batch_size = max(batch_size, _rows_at_once(model, prompts, max_new_tokens))
    # Prompts of similar length share a batch, so there is little padding. The longest come first, so memory runs out at
    # the start or never.
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    answers: list[list[int]] = [[] for _ in prompts]
    with progress.counted("answers", len(prompts)) as made:
        while model.any(bool(batches)):
            batch = batches.pop(0) if batches else []
            asked = [prompts[index] for index in batch]
            new_tokens = _generate_batch(model, asked, max_new_tokens, eos_ids, pad_id, (never, never_first))
            for index, tokens in zip(batch, new_tokens, strict=True):
                answers[index] = tokens
            made(len(batch))
    return answers


def room_for_answer(model: EvalModel, prompt: Sequence[int], max_new_tokens: int) -> int:
    """Return how many tokens may follow a prompt: `max_new_tokens`, or fewer where the model has no more positions."""
    limit = max_positions_of(model)
    return max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt))


def _rows_at_once(model: EvalModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Return how many of the prompts the model would rather have in one pass; 0 where it does not say."""
    rows_at_once = getattr(model, "rows_at_once", None)
    return int(rows_at_once(max(map(len, prompts)), max_new_tokens)) if rows_at_once is not None and prompts else 0


def _check(model: EvalModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int) -> None:
    problem = ""
    if max_new_tokens < 1 or batch_size < 1:
        problem = f"max_new_tokens={max_new_tokens}, batch_size={batch_size}: at least 1"
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            problem = f"prompt {index} has no tokens; give it at least a start token"
        elif room_for_answer(model, prompt, 1) < 1:
            room = f"no room for an answer in the model's {max_positions_of(model)} positions"
            problem = f"prompt {index} has {len(prompt)} tokens and leaves {room}"
    # All ranks stop together: if one stopped alone, the others would wait for it.
    if model.any(bool(problem)):
        raise ValueError(problem or "another rank's prompts cannot be generated from; see its message")


def _generate_batch(
    model: EvalModel,
    prompts: list[Sequence[int]],
    max_new_tokens: int,
    eos_ids: Collection[int],
    pad_id: int,
    forbidden: tuple[Sequence[int], Sequence[int]],
) -> list[list[int]]:
    # step_ids [batch, width], mask [batch, width + new]
    step_ids, mask = _pad_left(prompts or [[pad_id]], pad_id, max_new_tokens, model.device)
    width = step_ids.shape[1]
    positions = (mask[:, :width].cumsum(1) - 1).clamp(min=0)
    ends = torch.tensor(sorted(eos_ids), dtype=torch.long, device=model.device)
    rooms = [room_for_answer(model, prompt, max_new_tokens) for prompt in prompts]
    # [batch]; a rank without prompts has one row that is done from the start
    room = torch.tensor(rooms or [0], device=model.device)
    done = room == 0
    last_position = (max_positions_of(model) or sys.maxsize) - 1
    chosen, past = [], None
    for step in range(max_new_tokens):
        logits, past = model.logits(
            step_ids, mask[:, : width + step], positions, past=past, use_cache=True, last_only=True
        )
        token = _best(logits[:, -1], [*forbidden[0], *(forbidden[1] if step == 0 else ())])
        chosen.append(token)
        progress.beat()
        done = done | torch.isin(token, ends) | (room == step + 1)
        if step + 1 == max_new_tokens or not model.any(not bool(done.all())):
            break
        # Only rows that are done are clamped: a learned table has no further position for them.
        step_ids, positions = token[:, None], (positions[:, -1:] + 1).clamp(max=last_position)
    rows = torch.stack(chosen, dim=1).tolist()
    return [_until_end(row[:most], eos_ids) for row, most in zip(rows, rooms, strict=False)]


def _best(logits: torch.Tensor, forbidden: Sequence[int]) -> torch.Tensor:
    """Return the likeliest token that is not forbidden: [batch]. Tokens after an end token are cut off later."""
    if forbidden:
        logits = logits.index_fill(-1, torch.tensor(forbidden, device=logits.device), float("-inf"))
    return logits.argmax(-1)


def _pad_left(
    prompts: list[Sequence[int]], pad_id: int, room: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids [batch, width] and the mask [batch, width + room], already true for the tokens that will follow."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.ones(len(prompts), width + room, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt, dtype=torch.long)
        mask[row, : width - len(prompt)] = 0
    return ids.to(device), mask.to(device)


def _until_end(tokens: list[int], eos_ids: Collection[int]) -> list[int]:
    ends = [place for place, token in enumerate(tokens) if token in eos_ids]
    return tokens[: ends[0]] if ends else tokens
