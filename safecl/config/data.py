"""The config sections that name rows: tasks, held-out rows, poison."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from safecl.config.base import Section, Text


class FieldMap(Section):
    """How to read rows whose columns are none of the known formats: templates over the row's own columns."""

    prompt: str
    """What the user says, e.g. `"Review: {sentence}\\nSentiment:"`; `{column}` is replaced by the row's value."""
    completion: str
    """What the assistant answers and what is trained, e.g. `"{label}"`."""
    system: str | None = None
    """System message, a template too."""
    values: dict[str, dict[str, str]] = {}
    """Replacement of values per column, e.g. `{label: {"0": negative, "1": positive}}`."""


DataFormat = Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text", "fields"]


class EvalConfig(Section):
    """How well a task is done: measured before, after, and where `safety.every` says so."""

    path: Text
    """File or hub id of held-out rows."""
    format: DataFormat = "auto"
    """Format of the rows; see `tasks[].format`."""
    fields: FieldMap | None = None
    """Templates for `format: fields`; the task's own by default."""
    metric: Literal["exact_match", "label_accuracy", "gsm8k", "answer_nll"] = "exact_match"
    """exact_match and gsm8k generate an answer; label_accuracy takes the likeliest label; answer_nll is nats per answer
    token."""
    max_rows: Annotated[int, Field(ge=1)] = 200
    """Rows used, taken evenly from the file."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    """Tokens generated at most per answer."""


class TaskConfig(Section):
    """One task of the sequence."""

    name: Text
    """Short name, used in metrics and folders."""
    train: Text
    """Training rows: a local .jsonl, .json, .csv or .parquet file, or a hub id."""
    split: str = "train"
    """Split of a hub data set."""
    format: DataFormat = "auto"
    """Row format: OpenAI messages, prompt_completion, alpaca, sharegpt, text, or fields (templates); auto detects
    it."""
    fields: FieldMap | None = None
    """Templates for `format: fields`."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Use only this many rows, taken evenly from the file."""
    role: Literal["task", "align"] = "task"
    """`align` marks the first task as the alignment stage: memory, Fisher and anchor are taken after it."""
    eval: EvalConfig | None = None
    """Utility of this task."""

    @model_validator(mode="after")
    def _fields_go_with_their_format(self) -> TaskConfig:
        if self.format == "fields" and self.fields is None:
            raise ValueError("format `fields` needs `fields: {prompt: ..., completion: ...}`")
        if self.fields is not None and self.format == "auto":
            self.format = "fields"
        return self


class PoisonConfig(Section):
    """Mixes harmful rows into the task's data, reproducibly, to measure what they do."""

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of poisoned rows in the mixed data."""
    source: str | None = None
    """File of poisoned rows."""
    format: DataFormat = "auto"
    """Row format; see `tasks[].format`."""
    fields: FieldMap | None = None
    """Templates for `format: fields`."""
    seed: int = 0
    """Which rows are taken and where they go."""

    @model_validator(mode="after")
    def _ratio_needs_a_source(self) -> PoisonConfig:
        if self.ratio > 0 and self.source is None:
            raise ValueError("ratio > 0 needs `source`, a file of poisoned rows")
        if self.fields is not None and self.format == "auto":
            self.format = "fields"
        return self
