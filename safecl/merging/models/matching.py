"""Matches the tensors of all models: names, tied heads, padded vocabularies, buffers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from safecl.engine.model.dtypes import FLOAT_DTYPES
from safecl.merging.base import Unmergeable
from safecl.merging.models.folder import FolderWeights
from safecl.merging.models.names import names_in_files
from safecl.merging.models.tokens import Tokens
from safecl.merging.models.view import Source, View

_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight$")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output)\.(?:weight|bias)$")
_BUFFER = re.compile(r"(?:\.inv_freq|\.attn\.bias|\.attn\.masked_bias|\.attention\.bias|\.attention\.masked_bias)$")


@dataclass(frozen=True)
class Matched:
    """The tensors of the result: `views` by model, in the order they were given; `unties`: whether the result has a
    head of its own though its settings tie it. `notes` says what was aligned or left out."""

    views: Sequence[View]
    unties: bool
    notes: tuple[str, ...]


def match_models(sources: Sequence[Source], tokens: Sequence[Tokens | None]) -> Matched:
    """Match the tensors of all models with those of the first, whose names and shapes the result has.

    Raises Unmergeable with the name of a tensor that is missing or has another shape.
    """
    ends = [_ends_of(source) for source in sources]
    head = next((own.head for own in ends if own.head is not None), None)
    keeps_head = not _is_tied_everywhere(sources, ends)
    names = [name for name in sources[0].stored if name != ends[0].head or keeps_head]
    if keeps_head and head is not None and ends[0].head is None:
        names.append(head)
    buffers, notes = _buffers(sources), []
    if left_out := [name for name in names if name in buffers]:
        notes.append(f"left out, as the model makes them itself: {_named(left_out)}")
    names = [name for name in names if name not in buffers]
    home = _view(sources[0], names, ends[0].aliases(head, ends[0].embedding))
    views = [home]
    for source, own_ends, their_tokens in zip(sources[1:], ends[1:], tokens[1:], strict=True):
        aliases = own_ends.aliases(head, ends[0].embedding)
        aliases |= _renamed(source, sources[0], names, aliases)
        own = _view(source, names, aliases, home)
        _check_nothing_more(source, sources[0], {*own.names.values(), *buffers, own_ends.head})
        notes += _check_shapes(own, home, tokens[0], their_tokens)
        views.append(own)
    unties = keeps_head and any(own.head is None for own in ends)
    if unties:
        notes.append(f"{head} becomes a tensor of its own: one of the models has it apart from its embedding")
    return Matched(views, unties, tuple(dict.fromkeys(notes)))


@dataclass(frozen=True)
class _Ends:
    """The names of a model's token embedding and of the weight of its output head; None where it has no such tensor."""

    embedding: str | None
    head: str | None

    def aliases(self, head: str | None, embedding: str | None) -> dict[str, str]:
        """Return {name in the merge: name in this model}; a model without a head uses its embedding."""
        own_head = self.head or self.embedding
        found = {head: own_head, embedding: self.embedding}
        return {name: own for name, own in found.items() if name is not None and own is not None}


def _ends_of(source: Source) -> _Ends:
    heads = (name for name in source.stored if _HEAD.search(name) and name.endswith("weight"))
    embeddings = (name for name in source.stored if _EMBEDDING.search(name))
    return _Ends(next(embeddings, None), next(heads, None))


def _is_tied_everywhere(sources: Sequence[Source], ends: Sequence[_Ends]) -> bool:
    """Whether the head is the embedding in every model: it is not stored, or stored with the same values."""
    pairs = [(source, own.head, own.embedding) for source, own in zip(sources, ends, strict=True)]
    if all(head for _, head, _ in pairs) and all(s.settings.get("tie_word_embeddings") is False for s in sources):
        return False
    return all(
        embedding is not None and source.same_bytes(head, embedding) for source, head, embedding in pairs if head
    )


def _buffers(sources: Sequence[Source]) -> set[str]:
    """Buffers that not all models store; a model makes them itself."""
    found = {name for source in sources for name in source.stored if _BUFFER.search(name)}
    return {name for name in found if not all(name in source.stored for source in sources)}


def _view(source: Source, names: Sequence[str], aliases: Mapping[str, str], home: View | None = None) -> View:
    own = {name: aliases.get(name, name) for name in names}
    if missing := [name for name in names if own[name] not in source.stored]:
        raise Unmergeable(f"{source.label}: has no tensor {_named(missing)}")
    shapes = home.shapes if home is not None else {name: source.stored[own[name]].shape for name in names}
    return View(source, own, shapes, home)


def _renamed(source: Source, home: Source, names: Sequence[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """Return {name in the first model: name in this one} for tensors that the two store under different names."""
    missing = [name for name in names if aliases.get(name, name) not in source.stored]
    if not missing:
        return {}
    theirs = names_in_files(_folder_of(source))
    in_model = {stored: name for name, stored in names_in_files(_folder_of(home)).items()}
    return {name: theirs[in_model[name]] for name in missing if in_model.get(name) in theirs}


def _folder_of(source: Source) -> FolderWeights:
    return source if isinstance(source, FolderWeights) else source.base


def _check_nothing_more(source: Source, home: Source, known: set[str | None]) -> None:
    if more := [name for name in source.stored if name not in known]:
        raise Unmergeable(f"{source.label}: has the tensor {_named(more)}, which {home.label} does not have")


def _check_shapes(view: View, home: View, mine: Tokens | None, theirs: Tokens | None) -> list[str]:
    """Refuse other shapes but those of vocabularies of another size; return notes about these."""
    notes = []
    for name, shape in home.shapes.items():
        own = view.source.shapes[view.names[name]]
        if own == shape:
            continue
        is_vocabulary = bool(_EMBEDDING.search(name) or _HEAD.search(name))
        if not is_vocabulary or own[1:] != shape[1:]:
            raise Unmergeable(f"{view.label}: {name} has shape {list(own)}, that of {home.label} has {list(shape)}")
        if mine is None or theirs is None:
            without = home.label if mine is None else view.label
            raise Unmergeable(
                f"{view.label}: a vocabulary of {own[0]:,} rows, that of {home.label} has {shape[0]:,}, and {without} "
                "has no tokenizer that says which rows are which"
            )
        if lost := [token for token in theirs.tokens if shape[0] <= token < own[0] and token not in mine.tokens]:
            raise Unmergeable(
                f"{view.label}: a vocabulary of {own[0]:,} rows with {len(lost)} tokens behind the {shape[0]:,} "
                f"rows of {home.label}, which would be lost"
            )
        notes.append(
            f"{view.label}: {name} has {own[0]:,} rows of {shape[0]:,}; the others are those of {home.label}"
            if own[0] < shape[0]
            else f"{view.label}: {name} has {own[0]:,} rows; those behind {shape[0]:,} are padding and left out"
        )
    return notes


def holds_numbers(views: Sequence[View], name: str) -> bool:
    """Whether a tensor holds floating-point numbers in all models, and not integers or masks in some."""
    return all(view.source.stored[view.names[name]].dtype in FLOAT_DTYPES for view in views)


def copied(views: Sequence[View], name: str) -> bytes:
    """Return the bytes of a tensor that is copied because it holds no floating-point numbers.

    Raises Unmergeable where it differs between models.
    """
    values = [view.raw(name) for view in views]
    other = next((view for view, value in zip(views, values, strict=True) if value != values[0]), None)
    if other is not None:
        raise Unmergeable(f"{other.label}: {name} holds no floating-point numbers, and others than {views[0].label}")
    return values[0]


def _named(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
