"""The sections of a run config: what each key means, its unit, default and limits. safecl/config/run.py puts them together.

Imports no torch. The string under a field is its documentation; `safecl init` and docs/config.md are generated from
these strings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, and the string under a field is its documentation."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _an_empty_section_is_its_defaults(cls, given: Any) -> Any:
        """`train:` with every key behind a comment sign reads as null."""
        if not isinstance(given, Mapping):
            return given
        sections = {name for name, field in cls.model_fields.items() if isinstance(field.default, BaseModel)}
        return {key: value for key, value in given.items() if value is not None or key not in sections}


class MethodConfig(Section):
    """Base of every method's config (`methods: {name: {...}}`).

    A method says what it needs by class variables or properties: `needs_memory`; `needs_teacher`, stored outputs in the
    memory; `state_kinds`, what it keeps with one value per weight; `refuses_lora`, why it cannot be combined with
    adapters.
    """

    state_kinds: ClassVar[tuple[str, ...]] = ()
    """Kinds of state in the shards. By the ends of their names, `anchor`, `fisher` and `ema` live where
    deepspeed.offload says."""

    @property
    def online_teacher(self) -> str | None:
        """The model that the method asks in every step: aligned, previous, ema, or a folder; None where it asks
        none."""
        return None
