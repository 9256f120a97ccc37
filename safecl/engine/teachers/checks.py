"""Checks of online teachers before anything is loaded: whether they fit the run, and their cost."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from safecl.config import ConfigError, ModelConfig, RunConfig
from safecl.config.run import most_replayed, scoring_models
from safecl.data import load_tokenizer
from safecl.storage.model_folder import has_weights_here
from safecl.storage.model_records import ModelRecords
from safecl.storage.untrusted import library_error

KNOWN = ("aligned", "previous", "ema")
"""Teachers that are made from the run's own model; any other name is a folder or hub id."""

STREAMING_ERRORS = (IndexError, TypeError, RuntimeError, ValueError, AttributeError, KeyError)
"""Errors from a model's code whose layers do more than pass hidden states from one to the next."""


def check_teachers(config: RunConfig, tokenizer: Any) -> None:
    """Check the teachers of a run.

    Raises ConfigError, with the key, where an architecture cannot be streamed, where another model's files are not
    there or do not fit its settings, where it has another tokenizer, or where it has another width and hidden states
    are compared.
    """
    from safecl.engine.model.settings import read_model_settings

    _check_streaming(config)
    named = {key: source for key, source in config.online_teachers.items() if source not in KNOWN}
    for key, source in [*named.items(), *scoring_models(config).items()]:
        model = model_at(config, source)
        with _named(key):
            _check_files(model)
        theirs = load_tokenizer(model, key, ModelRecords.of(config))
        if difference := _different_token(theirs.get_vocab(), tokenizer.get_vocab()):
            raise ConfigError(
                f"{key}: {source} has another tokenizer ({difference}); it needs the tokenizer of model.path"
            )
        sizes = [read_model_settings(each).get_text_config().hidden_size for each in (model, config.model)]
        if key in named and key.startswith("methods.") and _compares_hidden(config, key) and sizes[0] != sizes[1]:
            raise ConfigError(
                f"{key}: {source} has hidden states of {sizes[0]:,}, model.path of {sizes[1]:,}; "
                "compare outputs instead (form: output)"
            )


def _check_streaming(config: RunConfig) -> None:
    """Check, without weights, that the architectures can be streamed. The start of the run compares numbers
    (streaming_check)."""
    for key, source in config.online_teachers.items():
        if source == "ema" or (source == "aligned" and config.model.lora is not None):
            continue
        model = config.model if source in KNOWN else model_at(config, source)
        with nullcontext() if source in KNOWN else _named(key):
            problem = _streaming_problem(model)
        if problem is not None:
            raise ConfigError(cannot_be_streamed(key, source, problem))


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Names this key in messages about a model, which name model.path."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.path:", f"{key}:", 1)) from None


def _check_files(model: ModelConfig) -> None:
    """Check the headers of the teacher's files against its settings, where they are on this machine."""
    from safecl.engine.model.dtypes import CONFIG_DTYPES
    from safecl.engine.model.structure import empty_model
    from safecl.engine.reference.layout import Layout
    from safecl.engine.reference.sources import find_weights

    if has_weights_here(model.path):
        dtype = CONFIG_DTYPES[model.dtype]
        empty = empty_model(model.path, dtype, trust_remote_code=model.trust_remote_code)
        find_weights(model.path, Layout.of(empty, dtype), empty, model.trust_remote_code)


def cannot_be_streamed(key: str, source: str, problem: str) -> str:
    """Return the message with the problem and what works instead."""
    recorded = "recorded or stored outputs (the method's outputs: recorded, memory.teacher.kind: topk)"
    otherwise = recorded if source in KNOWN else "another teacher"
    return f"teacher: {key}: this architecture cannot be streamed layer by layer ({problem}); use {otherwise}"


def _streaming_problem(model: ModelConfig) -> str | None:
    """Run the architecture on meta tensors. Return the problem; None where it works, or where only real weights would
    show the problem."""
    import torch

    from safecl.engine.model.attention import rows_are_not_packed
    from safecl.engine.model.dtypes import CONFIG_DTYPES
    from safecl.engine.model.settings import read_model_settings
    from safecl.engine.model.structure import empty_model
    from safecl.engine.teachers.questions import TeacherBatch
    from safecl.engine.teachers.streamed import StreamedTeacher

    read_model_settings(model)
    empty = empty_model(model.path, CONFIG_DTYPES[model.dtype], trust_remote_code=model.trust_remote_code)
    weights = dict(empty.named_parameters(remove_duplicate=False))
    try:
        with rows_are_not_packed():
            teacher = StreamedTeacher(empty, _MetaWeights(weights), torch.device("meta"), "in place")
            teacher.logits(TeacherBatch(torch.arange(2, 10)[None], torch.arange(8)[None]))
    except (ConfigError, *STREAMING_ERRORS) as error:
        only_without_numbers = isinstance(error, NotImplementedError) or "meta" in str(error).lower()
        return None if only_without_numbers else library_error(error)
    return None


@dataclass(frozen=True)
class _MetaWeights:
    """A WeightSource of weights without values."""

    by_name: Mapping[str, Any]

    def tensor(self, name: str) -> Any:
        return self.by_name[name].detach()


def model_at(config: RunConfig, source: str) -> ModelConfig:
    """Return the settings of another model than the run's own, whose adapters and template do not apply."""
    return config.model.model_copy(update={"path": source, "tokenizer": None, "chat_template": None, "lora": None})


def other_models(config: RunConfig) -> list[ModelConfig]:
    """The teachers and scoring models that are not made from the run's own model, each once."""
    sources = dict.fromkeys([*config.online_teachers.values(), *scoring_models(config).values()])
    return [model_at(config, source) for source in sources if source not in KNOWN]


def _compares_hidden(config: RunConfig, key: str) -> bool:
    return config.methods[key.removeprefix("methods.").removesuffix(".teacher")].compares_hidden


def _different_token(theirs: dict[str, int], ours: dict[str, int]) -> str:
    """Name the first token that differs; empty where none does."""
    for token, number in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token) != number:
            there = f"{theirs[token]:,}" if token in theirs else "unknown"
            return f"token {token!r} is {number:,} here and {there} there"
    extra = next((token for token in theirs if token not in ours), None)
    return "" if extra is None else f"token {extra!r} is unknown here"


def teacher_lines(config: RunConfig, tokens_per_batch: int) -> list[tuple[str, str]]:
    """Return (label, value) lines for `safecl check` and the start of a run."""
    lines = []
    for source in dict.fromkeys(config.online_teachers.values()):
        keys = ", ".join(key for key, named in config.online_teachers.items() if named == source)
        lines.append(("teacher", f"{source}, asked in every step ({keys}), {_where(config, source)}"))
        if _is_streamed(config, source):
            lines.append(("  copies", _copies(config, source, tokens_per_pass(config, source, tokens_per_batch))))
    return lines


def _where(config: RunConfig, source: str) -> str:
    if source == "ema":
        return "in place of the live weights during the pass"
    if source == "aligned" and config.model.lora is not None:
        return "the model with its adapters off"
    return "weights on each device" if config.teacher == "resident" else "weights in host memory, once per node"


def _is_streamed(config: RunConfig, source: str) -> bool:
    is_student = source == "ema" or (source == "aligned" and config.model.lora is not None)
    return config.teacher == "streamed" and not is_student


def tokens_per_pass(config: RunConfig, source: str, tokens_per_batch: int) -> int:
    """Tokens per rank in one teacher pass, which takes all rows that ask this teacher together."""
    keys = [key for key, named in config.online_teachers.items() if named == source]
    replayed = 0.0
    if "memory.teacher.source" in keys:
        assert config.memory is not None, "the key is in the section memory"
        replayed = most_replayed(config)
    own_rows = any(key.startswith("methods.") for key in keys)
    return round((own_rows + replayed) * tokens_per_batch) // _num_ranks()


def _num_ranks() -> int:
    return max(1, int(os.environ.get("WORLD_SIZE") or 1))


def _copies(config: RunConfig, source: str, tokens: int) -> str:
    from safecl.engine.model.dtypes import CONFIG_DTYPES
    from safecl.engine.teachers.break_even import advice, alternative, rates_here

    dtype = CONFIG_DTYPES[config.model.dtype]
    rates = rates_here(dtype)
    if rates is None:
        return "none: without a GPU the weights are read where they are"
    return advice(tokens, dtype.itemsize, rates, otherwise=alternative(source))
