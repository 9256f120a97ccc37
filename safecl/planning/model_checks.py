"""Checks of a planned run against its model. Only `check_weights_are_finite` reads more than the model's settings and
the headers of its files."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from safecl.config import ConfigError, ModelConfig, RunConfig
from safecl.data import TokenDataset
from safecl.data.reading.files import where
from safecl.engine.artifacts.base_model import once_per_model
from safecl.engine.artifacts.store import ArtifactStore
from safecl.engine.model.adapters import add_adapters, weight_names
from safecl.engine.model.dtypes import CONFIG_DTYPES
from safecl.engine.model.features import layer_numbers
from safecl.engine.model.frozen import frozen_weights
from safecl.engine.model.outline import Outline
from safecl.engine.model.structure import empty_model
from safecl.engine.reference.layout import Layout
from safecl.engine.reference.sources import find_weights
from safecl.engine.teachers.checks import other_models
from safecl.evaluation.answers.prompts import encode_within
from safecl.evaluation.answers.texts import place_of
from safecl.evaluation.task import check_rows, encode_rows
from safecl.evaluation.variants import asked_in, prefills_of
from safecl.planning.costs.planned_model import PlannedModel, planned_model
from safecl.planning.plans import RunPlan
from safecl.storage.model_folder import has_weights_here
from safecl.storage.model_records import ModelRecords

_EXTRA_ROWS = 2
"""OPT's table of positions has two rows before the first."""


def check_model(plan: RunPlan) -> None:
    """Check the model's files, adapters, vocabulary and positions before anything is loaded.

    Raises ConfigError for what would stop the run, and adds a note for what is left out or unusual.
    """
    config = plan.config.model
    model = planned_model(config, ModelRecords.of(plan.config))
    outline = model.outline
    plan.notes += [*_check_weights(model, config), *_note_on_head(outline, config.path)]
    plan.notes += _check_parts_without_text(plan, outline)
    check_vocabulary(plan, outline)
    plan.notes += _check_positions(plan, outline)
    trained = _Trained(list(outline.trained), outline.trained, [])
    if config.lora is not None:
        with torch.device("meta"):
            trained = _Trained.of(add_adapters(model.structure(to_change=True), config))
    for name, method in plan.config.methods.items():
        method.check_weight_names(name, trained.names)
        _check_base_model(plan.config.model, f"methods.{name}.base", method.base_model)
        layer_numbers(method.compared_layers, outline.num_hidden_layers, f"methods.{name}.layers")
    plan.notes += [*_note_on_unpulled(plan, trained.embeddings), *_note_on_frozen(plan, trained.sizes)]


@dataclass(frozen=True)
class _Trained:
    """The weights that a run trains. names: of the trained weights; with LoRA, of those that have adapters. sizes: of
    the trained tensors. embeddings: names of those that have an adapter."""

    names: list[str]
    sizes: dict[str, int]
    embeddings: list[str]

    @classmethod
    def of(cls, adapted: nn.Module) -> _Trained:
        sizes = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
        modules = adapted.named_modules()
        embeddings = [name for name, module in modules if len(getattr(module, "lora_embedding_A", ()))]
        return cls(weight_names(adapted), sizes, embeddings)


def _check_base_model(config: ModelConfig, key: str, path: str | None) -> None:
    """Raise ConfigError where a model before its alignment has not the layers of the run's model."""
    if path is None or not has_weights_here(path):
        return
    dtype = CONFIG_DTYPES[config.dtype]
    theirs, own = (empty_model(each, dtype, trust_remote_code=config.trust_remote_code) for each in (path, config.path))
    shapes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in (own, theirs)]
    for name, shape in shapes[0].items():
        if ".layers." in name and shapes[1].get(name) != shape:
            raise ConfigError(
                f"{key}: {path} has no {name} of the shape {list(shape)}; it must be model.path unaligned"
            )
    find_weights(path, Layout.of(theirs, dtype), theirs, config.trust_remote_code)


def _note_on_frozen(plan: RunPlan, sizes: dict[str, int]) -> list[str]:
    """Say how many of the trained weights methods freeze. Raises ConfigError where nothing is left to train."""
    frozen = frozen_weights(plan.config, sizes)
    if not frozen:
        return []
    names = ", ".join(name for name, settings in plan.config.methods.items() if settings.freezes)
    count = sum(sizes[name] for name in frozen)
    return [f"methods.{names}: {count:,} of {sum(sizes.values()):,} weights stay as they are, in {len(frozen)} tensors"]


def _note_on_unpulled(plan: RunPlan, embeddings: list[str]) -> list[str]:
    """Name the adapters of embeddings where a penalty pulls the products of all others."""
    terms = [(method.name, method.penalty()) for method in plan.methods]
    pulling = [name for name, penalty in terms if penalty is not None and penalty.product]
    names = ", ".join(name.removeprefix("base_model.model.") for name in embeddings)
    if not names:
        return []
    return [f"methods.{name}: the adapter of {names} is not pulled, only those of linear maps" for name in pulling]


def _check_weights(model: PlannedModel, config: ModelConfig) -> tuple[str, ...]:
    """Compare the model's files with its outline, once; return the notes about them."""
    if model.notes is not None:
        return model.notes
    if not has_weights_here(config.path):
        return (f"model.path: {config.path} is not downloaded yet; its tensors are checked when it is",)
    structure, dtype = model.structure(), CONFIG_DTYPES[config.dtype]
    found = find_weights(config.path, Layout.of(structure, dtype), structure, config.trust_remote_code)
    model.keep(found.notes)
    return found.notes


def check_weights_are_finite(config: RunConfig) -> None:
    """Raise ConfigError for a weight that is NaN or infinite, in the model or in an online teacher, in the words of the
    run that reads it. A model whose files have not changed is read once."""
    store = ArtifactStore.of(config)
    for settings in [config.model, *other_models(config)]:
        if has_weights_here(settings.path):
            work = functools.partial(_check_weights_are_finite, settings)
            once_per_model(settings.path, f"finite in {settings.dtype}", store, work)


def _check_weights_are_finite(settings: ModelConfig) -> None:
    dtype, trusted = CONFIG_DTYPES[settings.dtype], settings.trust_remote_code
    model = empty_model(settings.path, dtype, trust_remote_code=trusted)
    find_weights(settings.path, Layout.of(model, dtype), model, trusted).check_finite()


def _note_on_head(model: Outline, path: str) -> list[str]:
    """Say where the settings tie the head to the embedding and the files hold two different tensors."""
    if model.untied is None:
        return []
    head, embedding = model.untied
    return [
        f"model.path: {path}: config.json ties {head} to {embedding}, but the "
        "files hold two different tensors; both are trained and saved, as transformers loads them"
    ]


def _check_parts_without_text(plan: RunPlan, model: Outline) -> list[str]:
    """Name the parts of a model of several kinds of input that text does not reach, such as a vision tower.

    They get no gradient and stay as they are. Raises ConfigError for a weight decay, which would shrink them.
    """
    if plan.config.model.lora is not None:
        return []
    if not (left := model.without_text):
        return []
    count = sum(model.sizes[name] for name in left)
    parts = ", ".join(dict.fromkeys(name.removeprefix("model.").split(".")[0] for name in left))
    told = f"model.path: {plan.config.model.path}: text does not reach {parts} ({count:,} weights)"
    if plan.config.train.weight_decay > 0:
        raise ConfigError(f"{told}, and train.weight_decay would shrink them; set train.weight_decay: 0, or use LoRA")
    return [f"{told}; they stay as they are, and take the optimizer's memory"]


# ----------------------------------------------------------------------------------------------------------- vocabulary


def check_vocabulary(plan: RunPlan, model: Outline) -> None:
    """Raise ConfigError for a token that the model does not know, in rows, evaluation rows, prompts or padding; the
    embedding would fail with an index error."""
    vocabulary = model.vocabulary
    for data in _datasets(plan):
        if data.max_token_id >= vocabulary:
            raise ConfigError(_unknown(data.max_token_id, data.path(0), vocabulary))
    for place, ids in evaluated(plan, model.positions):
        if max(ids, default=0) >= vocabulary:
            raise ConfigError(_unknown(max(ids), place, vocabulary))
    if (pad := plan.tokenizer.pad_token_id) is not None and pad >= vocabulary:
        raise ConfigError(
            f"model.tokenizer: its pad token {plan.tokenizer.pad_token!r} has the id {pad}, "
            f"but the model knows only {vocabulary:,} tokens; set a pad_token that it knows, such as its end token"
        )
    if len(plan.tokenizer) > vocabulary:
        plan.notes.append(
            f"model.tokenizer: it has {len(plan.tokenizer):,} tokens and the model knows only {vocabulary:,}; "
            "none of the others occurs in rows and prompts"
        )


def _unknown(token: int, place: str, vocabulary: int) -> str:
    return (
        f"model.tokenizer: token id {token} occurs in {place}, "
        f"but the model knows only {vocabulary:,} tokens; use the model's own tokenizer"
    )


def _datasets(plan: RunPlan) -> list[TokenDataset]:
    return [*(task.dataset for task in plan.tasks), *([plan.memory] if plan.memory is not None else [])]


def evaluated(plan: RunPlan, positions: int | None) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield (file and line, token ids) of all that evaluations feed to the model. Raises ConfigError as they do.

    The tasks learn the length of their longest row, since encoding many rows again would take a second.
    """
    for task in plan.tasks:
        if task.config.eval is not None:
            check_rows(task.config.eval, plan.tokenizer, task.eval_rows)
            ids = encode_rows(task.config.eval, plan.tokenizer, task.eval_rows, positions)
            task.longest_evaluated = max(map(len, ids))
            yield from zip(map(place_of, task.eval_rows), ids, strict=True)
    for prompt in [*plan.prompts, *plan.benign]:
        yield place_of(prompt), encode_within(positions, plan.tokenizer, [prompt])[0]
    if (safety := plan.config.safety) is not None:
        for variant in safety.variants:
            asked = asked_in(variant, safety, plan.prompts, plan.benign)
            begun = prefills_of(variant, plan.tokenizer, asked)
            ids = encode_within(positions, plan.tokenizer, asked, None, begun)
            yield from zip(map(place_of, asked), ids, strict=True)
    for known in plan.scanned:  # a scan cuts long prompts at their beginning
        yield place_of(known), encode_within(None, plan.tokenizer, [known], "empty")[0]


# ------------------------------------------------------------------------------------------------------------ positions


def _check_positions(plan: RunPlan, model: Outline) -> list[str]:
    """Refuse rows that are longer than a table of positions; return a note where they are longer than the model was
    made for."""
    limit = model.positions
    if limit is None:
        return []
    notes = []
    for data in _datasets(plan):
        longest = int(data.lengths.argmax())
        if (length := int(data.lengths[longest])) > limit:
            row = where(data.path(longest), int(data.lines[longest]))
            told = f"{row}: the row has {length:,} tokens and the model positions for {limit:,}"
            if has_position_table(model, limit):
                raise ConfigError(f"{told}; set train.max_length: {limit}, which cuts longer rows, or less")
            notes.append(f"{told}; answers may suffer beyond them, and train.max_length: {limit} would cut the row")
    return notes


def has_position_table(model: Outline, limit: int) -> bool:
    """Whether positions are rows of a table, so that there are none beyond `limit`."""
    return any(limit <= rows <= limit + _EXTRA_ROWS for rows in model.tables)
