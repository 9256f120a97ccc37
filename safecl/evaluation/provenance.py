"""Facts for an auditor: which prompts were asked, in which form, and what scored the answers. They stand in
results.json; no text of rows is among them.

Hash of prompts: SHA-256 over one JSON line per prompt, in order, of its turns as [role, content] pairs.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from safecl.config import SafetyConfig
from safecl.config.model import ModelConfig
from safecl.evaluation.judges.loading import version_of

if TYPE_CHECKING:
    from safecl.data.reading.rows import Prompt

SCHEMA: Final = 1
"""Version of results.json. It grows where a key changes its meaning or goes; a new key leaves it as it is."""


def now() -> str:
    """Return this moment in UTC, as 2026-01-31T12:00:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def measured_with(
    tokenizer: Any,
    model: ModelConfig,
    safety: SafetyConfig | None,
    prompts: Sequence[Prompt],
    benign: Sequence[Prompt],
) -> dict[str, Any]:
    """Return prompts by rate, scorer, chat template and generation settings as they were in a measurement."""
    facts: dict[str, Any] = {"chat_template": template_of(tokenizer)}
    if safety is None or not prompts:
        return facts
    facts["prompts"] = [prompts_of("disallowed", safety.prompts, prompts)]
    if safety.benign_prompts is not None and benign:
        facts["prompts"].append(prompts_of("benign", safety.benign_prompts, benign))
    facts["scorer"] = safety.scorer
    if safety.judges:
        facts["judges"] = [version_of(judge, None) for judge in safety.judges]
    if safety.variants:
        facts["variants"] = [
            variant.model_dump(exclude_none=True) | {"name": variant.title} for variant in safety.variants
        ]
    facts["generation"] = {
        "decoding": "greedy",
        "max_new_tokens": safety.max_new_tokens,
        "thinking": model.thinking.mode if model.thinking is not None else "template",
    }
    return facts


def prompts_of(kind: str, path: str, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return name of the file, number and hash of the prompts that are used of it."""
    digest = hashlib.sha256()
    for prompt in prompts:
        turns = [[message.role, message.content] for message in prompt.messages]
        digest.update(json.dumps(turns, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return {"set": kind, "file": Path(path).name, "n": len(prompts), "sha256": digest.hexdigest()}


def template_of(tokenizer: Any) -> dict[str, str]:
    """Return origin and SHA-256 of the chat template."""
    from safecl.data.templates.chat import template_source

    text = tokenizer.chat_template or ""
    return {
        "from": template_source(tokenizer),
        "sha256": hashlib.sha256(str(text).encode()).hexdigest(),
    }
