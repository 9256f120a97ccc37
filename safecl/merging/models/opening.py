"""Opens the models that a merge works with, and makes sure that they fit together, before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safecl.merging.base import MergeConfig, Models, Needs, Unmergeable, Weights
from safecl.merging.models.checkpoint import CheckpointWeights, is_checkpoint
from safecl.merging.models.checks import check_more_tokens, check_related, check_settings, check_tokens
from safecl.merging.models.folder import FolderWeights
from safecl.merging.models.lora import AdapterWeights
from safecl.merging.models.matching import Matched, holds_numbers, match_models
from safecl.merging.models.tensor_files import ReusedMemory
from safecl.merging.models.tokens import Tokens, read_tokens
from safecl.merging.models.view import Source
from safecl.merging.places import places_of
from safecl.storage.model_folder import adapter_base, is_adapter
from safecl.storage.untrusted import UnusableWeights

_PROBED_BYTES = 4096


@dataclass(frozen=True)
class Parent:
    """A model that takes part in a merge: its role (`base`, `tuned`, `tuned 2`, `aligned`), and its path as given."""

    role: str
    path: str
    source: Source

    @property
    def folder(self) -> Path:
        """The folder that the path stands for: a model's or an adapter's."""
        return self.source.folder


@dataclass(frozen=True)
class Opened:
    """All parents, the first tuned model first, and what the merge sees of them."""

    parents: Sequence[Parent]
    matched: Matched
    models: Models

    @property
    def home(self) -> Parent:
        """The first tuned model, whose settings, tokenizer, names and dtypes the result has."""
        return self.parents[0]

    def trained_on(self, adapter: AdapterWeights) -> Weights | None:
        """Return the model that an adapter was trained on, of those that are merged: the aligned one or the base."""
        for parent, view in zip(self.parents, self.matched.views, strict=True):
            source = parent.source
            if parent.role in ("aligned", "base") and isinstance(source, FolderWeights):
                if source is adapter.base or _has_same_weights(adapter.base, source):
                    return view
        return None

    def reuse(self, memory: ReusedMemory | None) -> None:
        """Let values be read into this memory; None: into new tensors."""
        for parent in self.parents:
            parent.source.reuse(memory)

    def close(self) -> None:
        for parent in self.parents:
            parent.source.close()

    def check_unchanged(self) -> None:
        for parent in self.parents:
            parent.source.check_unchanged()


def open_models(
    kind: str,
    config: MergeConfig,
    *,
    base: str | None,
    tuned: Sequence[str],
    aligned: str | None,
    data: Path | None,
) -> Opened:
    """Open the models. Raises ConfigError where one is missing, cannot be used, or does not fit the others."""
    if kept := [path for path in (*tuned, base, aligned) if path is not None and is_checkpoint(path)]:
        check_checkpoints(kind, config, kept[0])
    if tuned and is_adapter(tuned[0]):  # it was trained on the aligned model where a kind needs one
        if config.needs.aligned == "yes":
            aligned = aligned or adapter_base(tuned[0])
        elif config.needs.base == "yes":
            base = base or adapter_base(tuned[0])
    check_needs(kind, config.needs, base=base, num_tuned=len(tuned), aligned=aligned, data=data)
    opened_base = _open(base, "base") if base is not None else None
    opened_aligned = _open(aligned, "aligned", [opened_base]) if aligned is not None else None
    roles = ["tuned" if i == 0 else f"tuned {i + 1}" for i in range(len(tuned))]
    parents = [
        Parent(role, path, _open(path, role, [opened_aligned, opened_base], config.reads_averages))
        for role, path in zip(roles, tuned, strict=True)
    ]
    if base is not None and opened_base is not None:
        parents.append(Parent("base", base, opened_base))
    if aligned is not None and opened_aligned is not None:
        parents.append(Parent("aligned", aligned, opened_aligned))
    tokens = [_tokens_of(parent.source) for parent in parents]
    _check_pairs(config, parents, tokens)
    matched = match_models([parent.source for parent in parents], tokens)
    if config.related:
        check_related(matched.views[0], matched.views[1:])
    names = [name for name in matched.views[0].shapes if holds_numbers(matched.views, name)]
    by_role = dict(zip([parent.role for parent in parents], matched.views, strict=True))
    models = Models(
        tuned=[by_role[role] for role in roles],
        base=by_role.get("base"),
        aligned=by_role.get("aligned"),
        places=places_of(names),
        data=data,
        folders={parent.role: os.fspath(parent.folder) for parent in parents},
    )
    return Opened(parents, matched, models)


def check_needs(
    kind: str, needs: Needs, *, base: str | None, num_tuned: int, aligned: str | None, data: Path | None
) -> None:
    """Raise ConfigError that names a model or data that the kind needs and did not get, or got and has no use for."""
    for role, need, given in (("base", needs.base, base), ("aligned", needs.aligned, aligned)):
        if need == "yes" and given is None:
            raise Unmergeable(f"{kind} needs the {role} model: --{role} FOLDER")
        if need == "no" and given is not None:
            raise Unmergeable(f"{kind} has no use for a model in the role --{role}; leave it out")
    if num_tuned < needs.fewest:
        what = "a tuned model" if needs.fewest == 1 else f"{needs.fewest} tuned models or more"
        raise Unmergeable(f"{kind} needs {what}, and got {num_tuned}: --tuned FOLDER, once for each")
    if needs.most is not None and num_tuned > needs.most:
        raise Unmergeable(f"{kind} takes {needs.most} tuned model{'s' * (needs.most > 1)}, and got {num_tuned}")
    if needs.data and not needs.data_optional and data is None:
        raise Unmergeable(f"{kind} needs rows: --data FILE, {needs.data}")
    if not needs.data and data is not None:
        raise Unmergeable(f"{kind} has no use for --data; leave it out")
    if data is not None and not data.is_file():
        raise Unmergeable(f"--data {data}: no such file")


def check_checkpoints(kind: str, config: MergeConfig, path: str) -> None:
    """Raise Unmergeable where the kind does not take a run's checkpoints."""
    if not config.takes_checkpoints:
        raise Unmergeable(
            f"{path}: is a checkpoint of a run, which {kind} does not take; give the run's model folder, RUN/model"
        )


def _open(path: str, role: str, bases: Sequence[Source | None] = (), averaged: bool = False) -> Source:
    """Open a model. bases: those that were opened before, on one of which an adapter was trained."""
    label = f"{role} ({path})"
    if is_checkpoint(path):
        return CheckpointWeights(path, label, averaged)
    if not is_adapter(path):
        return FolderWeights(path, label)
    named = adapter_base(path)
    whole = [base for base in bases if isinstance(base, FolderWeights)]
    if (same := next((base for base in whole if _is_same(named, base)), None)) is not None:
        return AdapterWeights(path, label, same)
    if is_adapter(named):
        raise UnusableWeights(f"{label}: an adapter of an adapter; merge the first one into its base before")
    own = FolderWeights(named, f"the base of {label}")
    if whole and not any(_has_same_weights(own, base) for base in whole):
        raise Unmergeable(
            f"{label}: the adapter was trained on {named}, whose weights differ from those of "
            f"{' and '.join(base.label for base in whole)}; give that folder as {_roles_of(whole)}"
        )
    return AdapterWeights(path, label, own)


def _roles_of(models: Sequence[FolderWeights]) -> str:
    return " or ".join(f"--{model.label.split()[0]}" for model in models)


def _is_same(named: str, base: FolderWeights) -> bool:
    return Path(named).expanduser().is_dir() and Path(named).expanduser().resolve() == base.folder.resolve()


def _has_same_weights(own: FolderWeights, base: FolderWeights) -> bool:
    """Whether two models have the same tensors, by their shapes and by the first bytes of each."""
    if own.shapes != base.shapes:
        return False
    return all(own.head(name, _PROBED_BYTES) == base.head(name, _PROBED_BYTES) for name in own.shapes)


def _tokens_of(source: Source) -> Tokens | None:
    """Read an adapter's own tokenizer, or that of its base; for other models, the folder's."""
    own = read_tokens(source.folder)
    if own is None and not isinstance(source, FolderWeights):
        return read_tokens(source.base.folder)
    return own


def _check_pairs(config: MergeConfig, parents: Sequence[Parent], tokens: Sequence[Tokens | None]) -> None:
    home, mine = parents[0], tokens[0]
    for parent, theirs in zip(parents[1:], tokens[1:], strict=True):
        check_settings(home.source, parent.source)
        if not config.same_tokens:
            continue
        check_tokens(home.source, mine, parent.source, theirs)
        if parent.role.startswith("tuned"):
            check_more_tokens(home.source, mine, parent.source, theirs)
