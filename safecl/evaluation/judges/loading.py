"""Loads the judge that a config names, with the facts that decide its verdicts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from safecl.config import ConfigError
from safecl.config.judges import JudgeConfig
from safecl.evaluation.answers.folders import check_is_model
from safecl.evaluation.judges.verdict import ModelJudge

HashOfModel = Callable[[str], str]


def load_judge(config: JudgeConfig, hash_of: HashOfModel | None = None) -> ModelJudge:
    """Load a judge. hash_of: hashes its weights for the record. Raises ConfigError where it cannot be loaded."""
    if config.kind == "endpoint":
        from safecl.evaluation.judges.endpoint import Endpoint

        return Endpoint(config, version_of(config, None))
    import torch
    from transformers import AutoTokenizer

    path = str(config.model)
    try:
        check_is_model(path)
    except ConfigError as error:
        raise ConfigError(f"judge {config.title}: {error}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        version = version_of(config, hash_of(path) if hash_of is not None else None)
        if config.kind == "classifier":
            from safecl.evaluation.judges.classifier import Classifier

            dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
            return Classifier.load(config, tokenizer, dtype, version)
        from safecl.evaluation.judges.guard import Guard

        return Guard.load(config, tokenizer, version)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"judge {config.title}: {path} cannot be loaded: {str(error).splitlines()[0]}") from None


def version_of(config: JudgeConfig, digest: str | None) -> dict[str, Any]:
    """Return the facts: two judges with the same give the same verdicts."""
    facts = {
        "name": config.title,
        "kind": config.kind,
        "model": config.model,
        "xxh3_128": digest,
        "template_sha256": hashlib.sha256(f"{config.template}\n{config.guideline or ''}".encode()).hexdigest(),
        "verdict": config.pattern or (list(config.choices) if config.choices else config.label),
        "harmless": config.harmless_pattern,
        "threshold": config.threshold,
        "max_length": config.max_length,
    }
    return {key: value for key, value in facts.items() if value is not None}
