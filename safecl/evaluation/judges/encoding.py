"""Token ids of a judge's input. Where prompt and answer do not fit, the answer is cut at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from safecl.config import ConfigError
from safecl.config.judges import ChatTemplate, JudgeConfig
from safecl.evaluation.judges.verdict import filled


def encode(tokenizer: Any, config: JudgeConfig, prompt: str, answer: str, room: int) -> list[int]:
    """Return at most `room` token ids. Raises ConfigError where the prompt alone does not fit."""
    ids = _ids(tokenizer, config, prompt, answer)
    if len(ids) <= room:
        return ids
    fits = _ids(tokenizer, config, prompt, "")
    if len(fits) > room:
        raise ConfigError(
            f"judge {config.title}: a prompt alone is longer than the {room} tokens of its input; raise max_length"
        )
    least, most = 0, len(answer)  # characters: the first number fits, the second does not
    while most - least > 1:
        middle = (least + most) // 2
        ids = _ids(tokenizer, config, prompt, answer[:middle])
        least, most, fits = (middle, most, ids) if len(ids) <= room else (least, middle, fits)
    return fits


def _ids(tokenizer: Any, config: JudgeConfig, prompt: str, answer: str) -> list[int]:
    if config.template == ChatTemplate:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        more = {"guideline": config.guideline} if config.guideline is not None else {}
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **more)
    else:
        text = filled(config.template, prompt, answer)
    bos = tokenizer.bos_token
    special = bos is None or not text.startswith(bos)
    return list(tokenizer(text, add_special_tokens=special and config.template != ChatTemplate)["input_ids"])


def padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and mask, int64 [batch, length], padded on the right."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)
