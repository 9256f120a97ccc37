"""Checks of a planned run against its model. Only `check_weights_are_finite` reads more than the model's settings and
the headers of its files."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

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
from safecl.engine.model.settings import read_model_settings
from safecl.engine.model.structure import empty_model
from safecl.engine.reference.layout import Layout
from safecl.engine.reference.sources import find_weights
from safecl.engine.teachers.checks import other_models
from safecl.evaluation.answers.prompts import encode_within
from safecl.evaluation.answers.texts import place_of
from safecl.evaluation.task import check_rows, encode_rows
from safecl.evaluation.variants import asked_in, prefills_of
from safecl.planning.plans import RunPlan
from safecl.storage.model_folder import has_weights_here
from safecl.storage.untrusted import library_error

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_EXTRA_ROWS = 2
"""OPT's table of positions has two rows before the first."""


def check_model(plan: RunPlan) -> None:
    """Check the model's files, adapters, vocabulary and positions before anything is loaded.

    Raises ConfigError for what would stop the run, and adds a note for what is left out or unusual.
    """
    config = plan.config.model
    settings = read_model_settings(config)
    try:
        model = empty_model(config.path, CONFIG_DTYPES[config.dtype], trust_remote_code=config.trust_remote_code)
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # the library's classes check their sizes in many ways
        raise ConfigError(f"model.path: {config.path}: cannot be loaded: {library_error(error)}") from None
    plan.notes += [*_check_weights(model, plan), *_note_on_head(settings, model, config.path)]
    plan.notes += _check_parts_without_text(plan, model)
    check_vocabulary(plan, model)
    plan.notes += _check_positions(plan, model)
    trained: nn.Module = model
    if config.lora is not None:
        with torch.device("meta"):
            trained = add_adapters(model, config)
    for name, method in plan.config.methods.items():
        method.check_weight_names(name, weight_names(trained))
        _check_base_model(plan.config.model, f"methods.{name}.base", method.base_model)
        layer_numbers(method.compared_layers, settings.get_text_config().num_hidden_layers, f"methods.{name}.layers")
    plan.notes += [*_note_on_unpulled(plan, trained), *_note_on_frozen(plan, trained)]


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


def _note_on_frozen(plan: RunPlan, trained: nn.Module) -> list[str]:
    """Say how many weights methods freeze. Raises ConfigError where nothing is left to train."""
    sizes = {name: p.numel() for name, p in trained.named_parameters() if p.requires_grad}
    frozen = frozen_weights(plan.config, sizes)
    if not frozen:
        return []
    names = ", ".join(name for name, settings in plan.config.methods.items() if settings.freezes)
    count = sum(sizes[name] for name in frozen)
    return [f"methods.{names}: {count:,} of {sum(sizes.values()):,} weights stay as they are, in {len(frozen)} tensors"]


def _note_on_unpulled(plan: RunPlan, adapted: nn.Module) -> list[str]:
    """Name the adapters of embeddings where a penalty pulls the products of all others."""
    terms = [(method.name, method.penalty()) for method in plan.methods]
    pulling = [name for name, penalty in terms if penalty is not None and penalty.product]
    embeddings = [name for name, module in adapted.named_modules() if len(getattr(module, "lora_embedding_A", ()))]
    names = ", ".join(name.removeprefix("base_model.model.") for name in embeddings)
    if not names:
        return []
    return [f"methods.{name}: the adapter of {names} is not pulled, only those of linear maps" for name in pulling]


def _check_weights(model: PreTrainedModel, plan: RunPlan) -> list[str]:
    config = plan.config.model
    if not has_weights_here(config.path):
        return [f"model.path: {config.path} is not downloaded yet; its tensors are checked when it is"]
    found = find_weights(config.path, Layout.of(model, CONFIG_DTYPES[config.dtype]), model, config.trust_remote_code)
    return list(found.notes)


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


def _note_on_head(settings: PretrainedConfig, model: PreTrainedModel, path: str) -> list[str]:
    """Say where the settings tie the head to the embedding and the files hold two different tensors."""
    embedding, head = (cast(Any, part) for part in (model.get_input_embeddings(), model.get_output_embeddings()))
    if not getattr(settings, "tie_word_embeddings", False) or head is None or head.weight is embedding.weight:
        return []
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        f"model.path: {path}: config.json ties {names[id(head.weight)]} to {names[id(embedding.weight)]}, but the "
        "files hold two different tensors; both are trained and saved, as transformers loads them"
    ]


def _check_parts_without_text(plan: RunPlan, model: PreTrainedModel) -> list[str]:
    """Name the parts of a model of several kinds of input that text does not reach, such as a vision tower.

    They get no gradient and stay as they are. Raises ConfigError for a weight decay, which would shrink them.
    """
    if plan.config.model.lora is not None:
        return []
    if not (left := parts_without_text(model)):
        return []
    parts = ", ".join(dict.fromkeys(name.removeprefix("model.").split(".")[0] for name in left))
    told = f"model.path: {plan.config.model.path}: text does not reach {parts} ({sum(left.values()):,} weights)"
    if plan.config.train.weight_decay > 0:
        raise ConfigError(f"{told}, and train.weight_decay would shrink them; set train.weight_decay: 0, or use LoRA")
    return [f"{told}; they stay as they are, and take the optimizer's memory"]


def parts_without_text(model: PreTrainedModel) -> dict[str, int]:
    """Return the sizes of the weights that belong neither to the model's decoder nor to its head, by name."""
    parts = cast("tuple[nn.Module, nn.Module]", (model.get_decoder(), model.get_output_embeddings()))
    reached = {id(p) for part in parts for p in part.parameters()}
    return {name: p.numel() for name, p in model.named_parameters() if id(p) not in reached}


# ----------------------------------------------------------------------------------------------------------- vocabulary


def check_vocabulary(plan: RunPlan, model: PreTrainedModel) -> None:
    """Raise ConfigError for a token that the model does not know, in rows, evaluation rows, prompts or padding; the
    embedding would fail with an index error."""
    vocabulary = cast(Any, model.get_input_embeddings()).num_embeddings
    for data in _datasets(plan):
        if data.max_token_id >= vocabulary:
            raise ConfigError(_unknown(data.max_token_id, data.path(0), vocabulary))
    for place, ids in evaluated(plan, _positions_of(model)):
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


def _check_positions(plan: RunPlan, model: PreTrainedModel) -> list[str]:
    """Refuse rows that are longer than a table of positions; return a note where they are longer than the model was
    made for."""
    limit = _positions_of(model)
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


def _positions_of(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def has_position_table(model: PreTrainedModel, limit: int) -> bool:
    """Whether positions are rows of a table, so that there are none beyond `limit`."""
    words = model.get_input_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not words]
    return any(limit <= table.num_embeddings <= limit + _EXTRA_ROWS for table in tables)
