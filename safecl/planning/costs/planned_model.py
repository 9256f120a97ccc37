"""A model as planning sees it: its outline, and the bytes that its passes take, both remembered with its files.

transformers' settings and the structure of the model are made only where something asks for them: their classes import
the code of models, which takes longer than all else that a check does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from safecl.config import ConfigError, ModelConfig
from safecl.data.hub import refuse_unreachable
from safecl.engine.model.dtypes import CONFIG_DTYPES
from safecl.engine.model.outline import Outline
from safecl.engine.model.settings import read_model_settings
from safecl.engine.model.structure import empty_model
from safecl.storage.model_folder import has_weights_here, is_converted, settings_source
from safecl.storage.model_records import Basis, ModelRecords, model_basis
from safecl.storage.untrusted import library_error

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

MOST_COUNTS = 100
"""The oldest counts of a model beyond these are forgotten."""
_OF_THE_TEXT = {"path", "tokenizer", "chat_template", "template_date", "thinking"}
"""Settings that decide nothing of what a pass of a given shape takes."""


@dataclass(frozen=True)
class Counts:
    """Bytes that were counted for a model, by what was counted. basis: None where nothing is remembered."""

    records: ModelRecords | None = None
    basis: Basis | None = None
    name: str = ""

    def of(self, config: ModelConfig, what: list[int | str | bool], count: Callable[[], int]) -> int:
        """Return the bytes of `what`, a name and numbers, which `count` finds where they are not known."""
        if self.records is None or self.basis is None:
            return count()
        key, known = json.dumps([what, config.model_dump(mode="json", exclude=_OF_THE_TEXT)]), self._known()
        if not isinstance(found := known.get(key), int):
            found = count()
            kept = dict(list(self._known().items())[-MOST_COUNTS + 1 :]) | {key: found}
            self.records.keep(self.name, self.basis, kept)
        return found

    def _known(self) -> dict[str, int]:
        assert self.records is not None and self.basis is not None
        found = self.records.find(self.name, self.basis)
        return found if isinstance(found, dict) else {}


@dataclass
class PlannedModel:
    """The facts about a model that planning uses.

    notes: messages about its files; None where they have not been compared with the outline yet.
    """

    config: ModelConfig | None
    outline: Outline
    counts: Counts
    notes: tuple[str, ...] | None = None
    _settings: PretrainedConfig | None = None
    _structure: PreTrainedModel | None = None

    @classmethod
    def of(cls, model: nn.Module) -> PlannedModel:
        """Return what is known of a model that exists, on any device. Nothing is remembered."""
        pretrained = cast("PreTrainedModel", model)
        return cls(None, Outline.of(model), Counts(), None, pretrained.config, pretrained)

    def settings(self) -> PretrainedConfig:
        """Return transformers' settings of the model, as its structure has them."""
        if self._settings is None:
            self._settings = self.structure().config
        return self._settings

    def structure(self, *, to_change: bool = False) -> PreTrainedModel:
        """Return the model with its parameters on the meta device. to_change: for this caller alone, who adds parts."""
        structure = self._structure
        if structure is None:
            assert self.config is not None, "a model that exists is handed over once"
            structure = _structure_of(self.config)
        self._settings, self._structure = structure.config, None if to_change else structure
        return structure

    def keep(self, notes: tuple[str, ...]) -> None:
        """Remember the model, whose files fit its outline, with the messages about them."""
        self.notes = notes
        if self.counts.records is not None and self.counts.basis is not None:
            assert self.config is not None, "records are about a model with a path"
            value = {"outline": self.outline.to_json(), "notes": notes}
            self.counts.records.keep(_name(self.config), self.counts.basis, value)


def planned_model(config: ModelConfig, records: ModelRecords) -> PlannedModel:
    """Return what planning knows of the model of a config, from its files or from memory.

    Raises ConfigError for a model that cannot be tuned. One that was refused is not remembered.
    """
    refuse_unreachable("model.path", config.path)
    counts = Counts(records, _basis_of(config), f"bytes of passes {config.path}")
    if counts.basis is not None and (known := _remembered(config, counts, records, counts.basis)) is not None:
        return known
    settings = read_model_settings(config)
    structure = _structure_of(config)
    outline = Outline.of(structure, settings)
    return PlannedModel(config, outline, counts, None, structure.config, structure)


def _basis_of(config: ModelConfig) -> Basis | None:
    """Return what the outline depends on; None for a model whose own code decides it, or one that is not here."""
    if is_converted(config.path):
        return None
    settings_source(config.path)  # refuses a folder with files that no library may read
    return None if config.trust_remote_code or not has_weights_here(config.path) else model_basis(config.path)


def _remembered(config: ModelConfig, counts: Counts, records: ModelRecords, basis: Basis) -> PlannedModel | None:
    found = records.find(_name(config), basis)
    if not isinstance(found, dict) or not isinstance(notes := found.get("notes"), list):
        return None
    outline = Outline.from_json(found.get("outline"))
    return None if outline is None else PlannedModel(config, outline, counts, tuple(map(str, notes)))


def _name(config: ModelConfig) -> str:
    return f"outline {config.path}"


def _structure_of(config: ModelConfig) -> PreTrainedModel:
    try:
        return empty_model(config.path, CONFIG_DTYPES[config.dtype], trust_remote_code=config.trust_remote_code)
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # the library's classes check their sizes in many ways
        raise ConfigError(f"model.path: {config.path}: cannot be loaded: {library_error(error)}") from None
