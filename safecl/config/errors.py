"""The messages for a wrong config, one line per mistake: section, key, what is wrong, and the nearest thing that
works."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails


class ConfigError(ValueError):
    """A wrong config or command line. The message says what is wrong, where, and the nearest thing that works. Exit
    code 2."""


def install_extra(name: str) -> str:
    """Return how an optional part of safecl is installed: from its repository, since no index has safecl."""
    return f'pip install -e ".[{name}]" in the repository of safecl'


# Keys of other trainers, and the keys of safecl with the same meaning.
ELSEWHERE = {
    "lr": "train.learning_rate",
    "batch_size": "train.tokens_per_batch",
    "global_batch_size": "train.tokens_per_batch",
    "gradient_accumulation_steps": "train.tokens_per_batch",
    "per_device_train_batch_size": "train.tokens_per_microbatch",
    "micro_batch_size": "train.tokens_per_microbatch",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_seq_length": "train.max_length",
    "max_seq_len": "train.max_length",
    "cutoff_len": "train.max_length",
    "sequence_len": "train.max_length",
    "lr_scheduler_type": "train.schedule",
    "lr_scheduler": "train.schedule",
    "warmup_steps": "train.warmup_ratio",
    "max_grad_norm": "train.clip_norm",
    "gradient_clipping": "train.clip_norm",
    "adam_beta1": "train.betas",
    "logging_steps": "log.every",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "model_name": "model.path",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype",
    "attn_implementation": "model.attention",
    "dataset": "tasks[].train",
    "datasets": "tasks[].train",
    "train_file": "tasks[].train",
    "output_dir": "output",
    "zero_stage": "deepspeed.stage",
    "zero_optimization": "deepspeed.stage",
    "rank": "model.lora.r",
}

_LONGEST_VALUE = 80


def explain(error: ValidationError, root: type[BaseModel], prefix: tuple[str, ...] = ()) -> list[str]:
    """The messages, one line per mistake. `root` is the section that was validated, `prefix` the keys that lead to
    it."""
    places: dict[str, list[str]] = {}
    for item in error.errors():
        where = _drop_union_tags(root, item["loc"])
        if item["type"] == "extra_forbidden":
            *section, key = where
            places.setdefault(_dotted(prefix, section), []).append(_unknown_key(root, section, key))
        else:
            places.setdefault(_dotted(prefix, where), []).append(_message(item))
    return [_line(place, message) for place, messages in places.items() for message in _joined(messages)]


def line_of(mistake: str, lines: Mapping[str, int | None]) -> int | None:
    """The line of the key that a mistake is about, or of the section that should have it; None where there is no line.

    lines: line in the file by dotted path; None for keys that the command line has set.
    """
    found = re.match(r"(?:([\w.]+): )?(?:unknown (?:key|method) `([^`]*)`)?", mistake)
    assert found is not None, "every part of the pattern may be absent"
    place, unknown = found.groups()
    keys = [*(place.split(".") if place else []), *([unknown] if unknown else [])]
    paths = [".".join(keys[:depth]) for depth in range(len(keys), 0, -1)]
    return next((lines[path] for path in paths if path in lines), None)


def _dotted(prefix: Iterable[str], keys: Iterable[str]) -> str:
    return ".".join((*prefix, *keys))


def _line(place: str, message: str) -> str:
    """The message with its place in front, unless the message names it already, as checks over several sections do."""
    return message if not place or message.startswith(f"{place}.") else f"{place}: {message}"


def _joined(messages: list[str]) -> list[str]:
    """One message for a value that no branch of a union accepts: pydantic has one message for each branch."""
    given = [message.rpartition(" (got ") for message in dict.fromkeys(messages)]
    if len(given) > 1 and len({value for _, _, value in given}) == 1 and all(got for _, got, _ in given):
        return [f"{'; or: '.join(text for text, _, _ in given).replace('?;', '?')} (got {given[0][2]}"]
    return list(dict.fromkeys(messages))


def _message(item: ErrorDetails) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "missing":
        return "too few entries" if isinstance(item["loc"][-1], int) else "missing, and there is no default"
    if kind == "value_error":
        return re.sub(r"^Value error, ", "", item["msg"])
    got = f" (got {_short(item['input'])})"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"must be a section of `key: value` lines{got}"
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", context["expected"])
        near = difflib.get_close_matches(str(item["input"]), known, n=1)
        return f"must be {context['expected']}" + (f"; did you mean {near[0]!r}?" if near else "") + got
    if kind == "list_type":
        return f"must be a list, `[...]` or lines that begin with `- `{got}"
    return re.sub(r"^(Input|String|List) should", "must", item["msg"]).replace(" after validation, not 0", "") + got


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


# --------------------------------------------------------------------------------------------------------- unknown keys


def _unknown_key(root: type[BaseModel], section: list[str], key: str) -> str:
    model = _walk(root, section)
    known = list(model.model_fields) if model else []
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        hint = f"; did you mean `{near[0]}`?"
    else:
        hint = _other_home(root, key) or (f"; known keys: {', '.join(known)}" if known else "")
    return f"unknown key `{key}`{hint}"


def _other_home(root: type[BaseModel], key: str) -> str:
    if key in ELSEWHERE:
        return f"; here it is `{ELSEWHERE[key]}`"
    for name, field in root.model_fields.items():
        if any(key in model.model_fields for model in _submodels(field.annotation)):
            return f"; `{key}` belongs in `{name}`"
    return ""


# ---------------------------------------------------------------------------------------------------- pydantic's places


def _submodels(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated, list, dict):
        return [model for part in typing.get_args(annotation) for model in _submodels(part)]
    return []


def _walk(root: type[BaseModel], keys: Iterable[str]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = root
    for key in keys:
        if key.isdigit():
            continue
        field = model.model_fields.get(key) if model else None
        model = next(iter(_submodels(field.annotation)), None) if field else None
    return model


def _drop_union_tags(root: type[BaseModel], location: tuple[int | str, ...]) -> tuple[str, ...]:
    """The keys of a location, without the names of union branches that pydantic puts between them, and without an index
    at the end."""
    kept: list[str] = []
    for part in map(str, location):
        model = _walk(root, kept)
        known = part.isdigit() or model is None or part in model.model_fields
        if known or part == str(location[-1]):
            kept.append(part)
    return tuple(kept) if not kept or _is_key(root, kept) else tuple(kept[:-1])


def _is_key(root: type[BaseModel], keys: list[str]) -> bool:
    model = _walk(root, keys[:-1])
    tag = re.match(r"^(constrained-|function-|literal\[|int$|float$|str$|bool$|list\[|tuple\[)", keys[-1])
    return model is not None and (keys[-1] in model.model_fields or not tag)
