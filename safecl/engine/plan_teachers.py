"""What can be said of teachers that are asked in every step before anything is loaded: whether they fit, and what they will cost."""

from __future__ import annotations

import os
from typing import Any

from safecl.config import ConfigError, RunConfig
from safecl.data import load_tokenizer

KNOWN = ("aligned", "previous", "ema")


def check_teachers(config: RunConfig, tokenizer: Any) -> None:
    """Raises ConfigError, naming the key, for another model's folder that has another tokenizer, or another width where that matters."""
    from safecl.engine.model import read_model_settings

    for key, source in config.online_teachers.items():
        if source in KNOWN:
            continue
        model = config.model.model_copy(update={"path": source, "tokenizer": None, "chat_template": None, "lora": None})
        theirs = load_tokenizer(model)
        if difference := _different_token(theirs.get_vocab(), tokenizer.get_vocab()):
            raise ConfigError(f"{key}: {source} has another tokenizer ({difference}); a teacher needs the tokenizer of model.path")
        sizes = [read_model_settings(each).get_text_config().hidden_size for each in (model, config.model)]
        if key.startswith("methods.") and _compares_hidden(config, key) and sizes[0] != sizes[1]:
            raise ConfigError(
                f"{key}: {source} has hidden states of {sizes[0]:,}, model.path of {sizes[1]:,}; compare outputs instead (form: output)"
            )


def _compares_hidden(config: RunConfig, key: str) -> bool:
    return getattr(config.methods[key.removeprefix("methods.").removesuffix(".teacher")], "form", None) == "hidden"


def _different_token(theirs: dict[str, int], ours: dict[str, int]) -> str:
    """The first token that differs, in words; empty where none does."""
    for token, number in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token) != number:
            there = f"{theirs[token]:,}" if token in theirs else "unknown"
            return f"token {token!r} is {number:,} here and {there} there"
    extra = next((token for token in theirs if token not in ours), None)
    return "" if extra is None else f"token {extra!r} is unknown here"


def teacher_lines(config: RunConfig, tokens_per_batch: int) -> list[tuple[str, str]]:
    """(what, value) lines for `safecl check` and the start of a run."""
    lines = []
    for source in dict.fromkeys(config.online_teachers.values()):
        keys = ", ".join(key for key, named in config.online_teachers.items() if named == source)
        lines.append(("teacher", f"{source}, asked in every step ({keys}), {_where(config, source)}"))
        if _is_streamed(config, source):
            lines.append(("  copies", _copies(config, source, _tokens_per_pass(config, source, tokens_per_batch))))
    return lines


def _where(config: RunConfig, source: str) -> str:
    if source == "ema":
        return "in the place of the live weights for the time of the pass"
    if source == "aligned" and config.model.lora is not None:
        return "the model with its adapters off"
    return "weights on each device" if config.teacher == "resident" else "weights in host memory, once a node"


def _is_streamed(config: RunConfig, source: str) -> bool:
    return config.teacher == "streamed" and source != "ema" and not (source == "aligned" and config.model.lora is not None)


def _tokens_per_pass(config: RunConfig, source: str, tokens_per_batch: int) -> int:
    """Of one rank: all rows that anybody asks this teacher about go through it together."""
    keys = [key for key, named in config.online_teachers.items() if named == source]
    replayed = config.memory.replay_ratio if "memory.teacher.source" in keys else 0.0
    own_rows = any(key.startswith("methods.") for key in keys)
    return round((own_rows + replayed) * tokens_per_batch) // _num_ranks()


def _num_ranks() -> int:
    return max(1, int(os.environ.get("WORLD_SIZE") or 1))


def _copies(config: RunConfig, source: str, tokens: int) -> str:
    from safecl.engine.break_even import advice, alternative, rates_here
    from safecl.engine.model import DTYPES

    dtype = DTYPES[config.model.dtype]
    rates = rates_here(dtype)
    if rates is None:
        return "none: without a GPU the weights are read where they are"
    return advice(tokens, dtype.itemsize, rates, otherwise=alternative(source))
