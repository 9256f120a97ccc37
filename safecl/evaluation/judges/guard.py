"""A causal language model that writes a verdict, or whose first word is one.

    pattern   score = 1 where the pattern is found in the generated text, else 0, or none where `harmless_pattern` is
              not found either (greedy)
    choices   score = p(first) / (p(first) + p(second)) of the next token; two words of one token each

(Llama Guard 3, WildGuard arXiv 2406.18495, HarmBench arXiv 2402.04249; ShieldGemma arXiv 2407.21772 by choices.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from safecl.config import ConfigError
from safecl.config.judges import JudgeConfig
from safecl.distributed import collectives, progress
from safecl.evaluation.answers.generate import generate_greedy
from safecl.evaluation.answers.model import HFEvalModel
from safecl.evaluation.judges.encoding import encode, padded
from safecl.evaluation.judges.verdict import Verdict, verdict_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LocalModel(HFEvalModel):
    """A model that works on its own rows and waits for no other rank."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        self.rank, self.world_size = 0, 1

    def any(self, flag: bool) -> bool:
        return bool(flag)


class Guard:
    """A guard that is loaded."""

    def __init__(self, config: JudgeConfig, model: LocalModel, tokenizer: Any, version: dict[str, Any]):
        self.config, self.model, self.tokenizer, self.version = config, model, tokenizer, version
        self.pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        self.choices = [_token_of(config, tokenizer, word) for word in config.choices or ()]

    @classmethod
    def load(cls, config: JudgeConfig, tokenizer: Any, version: dict[str, Any]) -> Guard:
        """Load the model that the config names."""
        model = LocalModel.load(str(config.model), dtype=config.dtype, device=collectives.device())
        return cls(config, model, tokenizer, version)

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """Return a verdict per answer."""
        new = 0 if self.choices else self.config.max_new_tokens
        room = min(self.config.max_length, self.model.max_positions or self.config.max_length) - new
        rows = [encode(self.tokenizer, self.config, *pair, room) for pair in zip(prompts, answers, strict=True)]
        return self._by_choice(rows) if self.choices else self._by_pattern(rows)

    def _by_pattern(self, rows: list[list[int]]) -> list[Verdict]:
        ends = {
            *self.model.eos_ids,
            *([self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else ()),
        }
        written = generate_greedy(
            self.model,
            rows,
            max_new_tokens=self.config.max_new_tokens,
            eos_ids=ends,
            pad_id=self.pad_id,
            batch_size=self.config.batch_size,
        )
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
        return [verdict_in(text, self.config) for text in texts]

    @torch.no_grad()
    def _by_choice(self, rows: list[list[int]]) -> list[Verdict]:
        verdicts = []
        for start in range(0, len(rows), self.config.batch_size):
            batch = rows[start : start + self.config.batch_size]
            ids, mask = padded(batch, self.pad_id, self.model.device)
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()
            logits, _ = self.model.logits(ids, mask, positions)
            last = logits[torch.arange(len(batch)), [len(row) - 1 for row in batch]].float()  # [batch, vocab]
            shares = last[:, self.choices].softmax(-1)[:, 0]
            verdicts += [Verdict(float(share)) for share in shares]
            progress.beat()
        return verdicts


def _token_of(config: JudgeConfig, tokenizer: Any, word: str) -> int:
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ConfigError(f"judge {config.title}: choices: {word!r} is {len(ids)} tokens of its tokenizer; choose one")
    return int(ids[0])
