"""Texts that are generated from the docs of the config's fields: the commented YAML of `safecl init`, and the page
docs/config.md.

`python -m safecl.config.docs > docs/config.md` renews the page.
"""

from __future__ import annotations

import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from safecl.config import RunConfig
from safecl.config.method_registry import builtin_methods, method_module
from safecl.config.presets import PRESETS

WIDTH = 110

# Keys of a new config, by section; `safecl init --all` shows every key.
USUAL = {
    "": ("model", "tasks", "memory", "methods", "train", "deepspeed", "safety", "output"),
    "model": ("path", "dtype"),
    "tasks": ("name", "train", "eval"),
    "tasks.eval": ("path", "metric"),
    "memory": ("source", "replay_ratio"),
    "train": ("epochs", "tokens_per_batch", "tokens_per_microbatch", "max_length", "learning_rate", "seed"),
    "deepspeed": ("stage", "offload"),
    "deepspeed.offload": ("optimizer", "parameters"),
    "safety": ("prompts", "benign_prompts", "gate"),
    "safety.gate": ("max_asr", "max_over_refusal"),
    "scan": ("action", "benign"),
}

# The usual one of several keys of which a section needs one.
ONE_OF = {"memory": ("source",)}

# Values of keys without a default, and of keys whose default says nothing about their form.
EXAMPLES = {
    "model.path": "path/to/model",
    "tasks.name": "my-task",
    "tasks.train": "train.jsonl",
    "tasks.eval.path": "heldout.jsonl",
    "fields.prompt": "Review: {sentence}",
    "fields.completion": "{label}",
    "memory.source": "refusals.jsonl",
    "memory.prompts": "disallowed-to-keep.jsonl",
    "memory.benign_prompts": "harmless.jsonl",
    "safety.prompts": "disallowed.jsonl",
    "safety.benign_prompts": "benign.jsonl",
    "safety.gate.max_asr": 0.05,
    "safety.gate.max_over_refusal": 0.15,
    "scan.benign": "known-harmless.jsonl",
    "poison.source": "poison.jsonl",
    "output": "runs/my-task",
}


# ----------------------------------------------------------------------------------------------------------------- YAML


def starter_yaml(values: Mapping[str, Any], every_key: bool = False) -> str:
    """A run config as commented YAML. The keys of `values` are set; others are comments with their defaults or an
    example."""
    return "\n".join(_section(RunConfig, values, "", every_key)).strip() + "\n"


def _section(model: type[BaseModel], values: Mapping[str, Any], path: str, every_key: bool) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if every_key or name in values or name in USUAL.get(path, ()):
            yield from [""] if path == "" else []
            yield from (f"# {line}" for line in textwrap.wrap(_summary(field.description), WIDTH))
            yield from (
                _methods(values.get(name, {}))
                if name == "methods"
                else _field(name, field, values, f"{path}.{name}".strip("."), every_key)
            )


def _field(name: str, field: FieldInfo, values: Mapping[str, Any], path: str, every_key: bool) -> Iterator[str]:
    section = section_of(field.annotation)
    if section is not None and (every_key or path in USUAL or name in values):
        lines = list(_open_section(name, field, section, values, path, every_key))
    else:
        lines = [f"{name}: {_value(field, values, path)}"]
    yield from lines if name in values else (f"# {line}".rstrip() for line in lines)


def _open_section(
    name: str, field: FieldInfo, section: type[BaseModel], values: Mapping[str, Any], path: str, every_key: bool
) -> Iterator[str]:
    given = values.get(name)
    inner = (given[0] if isinstance(given, list) else given) or _needed(section, path)
    body = textwrap.indent("\n".join(_section(section, inner, path, every_key)), "  ")
    if typing.get_origin(_bare(field.annotation)) is list:
        body = re.sub(r"^    (?=\w)", "  - ", textwrap.indent(body, "  "), count=1, flags=re.MULTILINE)
    yield f"{name}:"
    yield from body.splitlines()


def _needed(section: type[BaseModel], path: str) -> dict[str, Any]:
    """The keys that a commented section needs once a user uncomments it."""
    needed = [name for name, field in section.model_fields.items() if field.is_required()]
    return {name: example_of(f"{path}.{name}") for name in [*needed, *ONE_OF.get(path, ())]}


def example_of(path: str) -> Any:
    """The example of the longest ending of `path` in EXAMPLES; None without one."""
    keys = path.split(".")
    return next((EXAMPLES[name] for start in range(len(keys)) if (name := ".".join(keys[start:])) in EXAMPLES), None)


def _value(field: FieldInfo, values: Mapping[str, Any], path: str) -> str:
    name, default = path.rpartition(".")[2], default_of(field)
    if name in values:
        return inline(values[name])
    return inline(default if default is not None else example_of(path))


def _methods(chosen: Mapping[str, Any] | str) -> Iterator[str]:
    if isinstance(chosen, str):
        yield f"methods: {chosen}"
        yield f"# {PRESETS[chosen].summary} Stands for {inline(PRESETS[chosen].settings)}"
        yield "# Or, in its place, methods of your own choice:"
        yield from (f"# {line}" for line in _methods({}))
        return
    yield "methods:"
    for name in builtin_methods():
        config = method_module(name).Config
        settings = chosen.get(name) or {
            key: default_of(field) for key, field in config.model_fields.items() if default_of(field) is not None
        }
        yield f"  # {_summary(config.__doc__)}"
        yield f"  {name}: {inline(settings)}" if name in chosen else f"  # {name}: {inline(settings)}"


# ------------------------------------------------------------------------------------------------------------- Markdown

INTRODUCTION = """# The run config

One YAML file describes a run. Unknown keys are errors that name the nearest key. Every key can be overridden on the
command line: `safecl train run.yaml train.learning_rate=1e-5 tasks.0.max_rows=500`. A relative path is relative to the
folder in which safecl is started. `safecl init` writes a commented file to start from; `safecl check` says what a file
would do.

This page is generated from the docs of the config's fields: `python -m safecl.config.docs > docs/config.md`.
"""


def reference_page() -> str:
    """docs/config.md: every key with its type, default and meaning, section by section."""
    parts = [INTRODUCTION, _table("Top level", RunConfig)]
    parts += [_table(f"`{path}`", section) for path, section in sections()]
    parts += ["## Methods\n\nAny combination, under `methods:`. Without one it is plain fine-tuning.\n", _presets()]
    for name in builtin_methods():
        settings = method_module(name).Config
        parts.append(_table(f"`methods.{name}`", settings, level=3))
        parts += [_table(f"`{path}`", inner, level=4) for path, inner in sections(settings, f"methods.{name}")]
    return "\n".join(parts)


def _presets() -> str:
    """The table of the presets of `methods:`."""
    rows = [
        f"| `methods: {name}` | {preset.summary} | `{inline(preset.settings)}` |" for name, preset in PRESETS.items()
    ]
    return "\n".join(["### Presets", "", "| preset | for whom | stands for |", "|---|---|---|", *rows, ""])


def sections(model: type[BaseModel] = RunConfig, path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """(`train`, TrainConfig), (`tasks[].eval`, EvalConfig), ...: every section, depth first, each class once."""
    seen: set[type[BaseModel]] = set()
    for inner_path, section in _all_sections(model, path):
        if section not in seen:
            seen.add(section)
            yield inner_path, section


def _all_sections(model: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in model.model_fields.items():
        if name != "methods" and (section := section_of(field.annotation)) is not None:
            is_list = typing.get_origin(_bare(field.annotation)) is list
            inner_path = f"{path}.{name}".strip(".") + ("[]" if is_list else "")
            yield inner_path, section
            yield from _all_sections(section, inner_path)


def _table(title: str, model: type[BaseModel], level: int = 2) -> str:
    rows = [
        f"| `{name}` | {_cell(type_text(field))} | {_default_cell(field)} | {_cell(field.description or '')} |"
        for name, field in model.model_fields.items()
    ]
    head = ["| key | type | default | meaning |", "|---|---|---|---|"] if rows else []
    return "\n".join([f"{'#' * level} {title}", "", _summary(model.__doc__), "", *head, *rows, ""])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _default_cell(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = default_of(field)
    return "see below" if isinstance(value, BaseModel) else f"`{_cell(inline(value))}`"


# ----------------------------------------------------------------------------------------------------- values and types


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class inside `X`, `X | None` or `list[X]`; None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated, list):
        return next((found for part in typing.get_args(annotation) if (found := section_of(part)) is not None), None)
    return None


def default_of(field: FieldInfo) -> Any:
    """The default; None for a required field."""
    return None if field.is_required() else field.get_default(call_default_factory=True)


def inline(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, float):
        return re.sub(r"e([-+])0", r"e\1", f"{value:g}")
    value = _as_given(value)
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False, allow_unicode=True)
        .removesuffix("\n")
        .removesuffix("\n...")
    )


def _as_given(value: Any) -> Any:
    """A section as the keys that were given, also where it stands in a list or under a key; anything else as it is."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, dict):
        return {key: _as_given(part) for key, part in value.items()}
    return [_as_given(part) for part in value] if isinstance(value, list | tuple) else value


def type_text(field: FieldInfo) -> str:
    """The type in the words of a reader of YAML: `number, at least 0`, `bf16 | fp32`, `text or null`."""
    limits = [text for limit in field.metadata if (text := _limit(limit))]
    return ", ".join([_type(field.annotation), *limits])


_NAMES = {str: "text", int: "integer", float: "number", bool: "true | false", type(None): "null", Any: "anything"}
_LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def _limit(limit: Any) -> str:
    if getattr(limit, "min_length", None):
        return "not empty"
    return ", ".join(
        f"{word} {getattr(limit, name):g}" for name, word in _LIMITS.items() if getattr(limit, name, None) is not None
    )


def _type(annotation: Any) -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _NAMES:
        return _NAMES[annotation]
    if origin is Annotated:
        limits = [
            text
            for part in parts[1:]
            for limit in (getattr(part, "metadata", None) or [part])
            if (text := _limit(limit))
        ]
        return ", ".join([_type(parts[0]), *limits])
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(part) for part in parts)
    if origin is list:
        return f"list of {'sections' if section_of(parts[0]) else _type(parts[0])}"
    if origin is tuple:
        return f"[{'; '.join(_type(part) for part in parts)}]"
    if origin is dict:
        return "mapping"
    return "section" if section_of(annotation) else getattr(annotation, "__name__", str(annotation))


def _bare(annotation: Any) -> Any:
    """The annotation without Annotated and without `| None`."""
    if typing.get_origin(annotation) is Annotated:
        return _bare(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(_bare(part) for part in typing.get_args(annotation) if part is not type(None))
    return annotation


def _summary(text: str | None) -> str:
    """A docstring on one line."""
    return " ".join((text or "").split())


if __name__ == "__main__":
    print(reference_page(), end="")
