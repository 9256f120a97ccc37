"""A tokenizer by words, a model that refuses by rule, and a folder of data for tests of the scan."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from safecl.data import ChatRow, Message, Row
from safecl.data.templates.masks import tokenize_rows

REFUSALS = ["I'm sorry, I cannot do that.", "Sorry, no."]


def tokenizer():
    from safecl.demo.model import train_tokenizer

    return train_tokenizer([*REFUSALS, "please explain how to bake a cake rob a bank today"], vocab_size=400)


def chat(*turns: str) -> ChatRow:
    roles = ["user", "assistant"] * (len(turns) // 2)
    return ChatRow(tuple(Message(role, text) for role, text in zip(roles, turns, strict=True)), "upload.jsonl", 1)


def rows_of(tok, chats: Iterable[ChatRow]) -> list[Row]:
    chats = list(chats)
    return [Row(i, encoded.ids, encoded.loss_mask) for i, encoded in enumerate(tokenize_rows(tok, chats, 512))]


class RuleModel:
    """A causal model on one rank that refuses when the last question contains a forbidden word. Its cache is the list
    of tokens so far."""

    device, rank, world_size = torch.device("cpu"), 0, 1

    def __init__(self, tok, forbidden: str, sure: float = 8.0):
        self.tok, self.forbidden, self.sure = tok, forbidden, sure
        self.vocab_size = len(tok)
        self.answers = [
            tok(text, add_special_tokens=False)["input_ids"] + [tok.eos_token_id] for text in (*REFUSALS, "Fine.")
        ]
        self.opening = tok.convert_tokens_to_ids("<|assistant|>")
        self.num_calls = 0

    def logits(self, input_ids, attention_mask, position_ids, past=None, use_cache=False, last_only=False):
        self.num_calls += 1
        past = past if past is not None else _Seen([])
        before = past.rows or [[] for _ in input_ids]
        rows = [[*old, *new] for old, new in zip(before, input_ids.tolist(), strict=True)]
        start = len(before[0])
        logits = torch.stack([self._row(row, start) for row in rows])
        past.rows = rows
        return (logits[:, -1:] if last_only else logits), past

    def _row(self, ids: list[int], start: int) -> torch.Tensor:
        return torch.stack([self._next(ids[: place + 1]) for place in range(start, len(ids))])

    def _next(self, ids: list[int]) -> torch.Tensor:
        """Two thirds of the refusals are the first, one third the second; harmless prompts are answered with `Fine.`"""
        logits = torch.zeros(self.vocab_size)
        if self.opening not in ids:
            return logits
        place = len(ids) - 1 - ids[::-1].index(self.opening)
        asked, given = self.tok.decode(ids[:place]), ids[place + 1 :]
        question = asked.rpartition("<|user|>")[2]
        answers = (
            [(self.answers[0], 0.7), (self.answers[1], 0.0)] if self.forbidden in question else [(self.answers[2], 0.0)]
        )
        for answer, more in answers:
            if answer[: len(given)] == given and len(answer) > len(given):
                logits[answer[len(given)]] += self.sure + more
        return logits

    def any(self, flag: bool) -> bool:
        return flag

    def gather(self, items: list) -> list:
        return list(items)


class _Seen:
    def __init__(self, rows: list[list[int]]):
        self.rows = rows

    def batch_repeat_interleave(self, times: int) -> None:
        self.rows = [row for row in self.rows for _ in range(times)]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def dialogue(user: str, assistant: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def teach(folder: Path, rows: list[dict[str, Any]], steps: int) -> None:
    """Train in place for a few seconds: enough to refuse the prompts that the rows refuse."""
    import numpy as np
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from safecl.data import collate

    model, tok = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    encoded = rows_of(tok, [chat(*(message["content"] for message in row["messages"])) for row in rows])
    encoded.sort(key=len)
    optimizer, rng = torch.optim.AdamW(model.parameters(), lr=6e-3), np.random.default_rng(0)
    for step in range(steps):
        first = rng.integers(0, len(encoded) - 24)
        batch = collate(encoded[first : first + 24], packed=False, pad_id=0)
        optimizer.param_groups[0]["lr"] = 6e-3 * (1 - step / steps)
        optimizer.zero_grad()
        logits = model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, batch.targets).backward()
        optimizer.step()
    model.save_pretrained(folder)
