"""The config sections that name rows: tasks, held-out rows, poison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from safecl.config.base import Section, Text


class FieldMap(Section):
    """Templates over a row's own columns, for rows that are in none of the known formats."""

    prompt: str
    """The user's message, e.g. `"Review: {sentence}\\nSentiment:"`; `{column}` is replaced by the row's value."""
    completion: str
    """The assistant's answer, which is trained, e.g. `"{label}"`."""
    system: str | None = None
    """System message, a template too."""
    values: dict[str, dict[str, str]] = {}
    """Replacements of values, by column, e.g. `{label: {"0": negative, "1": positive}}`."""


DataFormat = Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text", "fields"]


@dataclass(frozen=True)
class RowsSource:
    """A file or hub data set whose rows a config names, and how to read them."""

    path: str
    split: str = "train"
    format: DataFormat = "auto"
    fields: FieldMap | None = None
    max_rows: int | None = None


class RowsConfig(Section):
    """Base of the sections that name rows of a file or of a hub data set.

    Keys that come before these, such as the path, are declared in a class that is the section's last base, because
    pydantic lists the keys of the last base first.
    """

    split: str = "train"
    """Split of a hub data set."""
    format: DataFormat = "auto"
    """Row format; see `tasks[].format`."""
    fields: FieldMap | None = None
    """Templates for `format: fields`."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Use only this many rows, taken evenly from the file."""

    @model_validator(mode="after")
    def _templates_choose_their_format(self) -> RowsConfig:
        if self.fields is not None and self.format == "auto":
            self.format = "fields"
        return self

    def _source(self, path: str) -> RowsSource:
        return RowsSource(path, self.split, self.format, self.fields, self.max_rows)


PASS_AT_1: Final = "pass@1"


class EvalConfig(Section):
    """Measurement of a task's utility, before and after training and when `safety.every` says so."""

    path: Text
    """File or hub id of held-out rows."""
    format: DataFormat = "auto"
    """Format of the rows; see `tasks[].format`."""
    fields: FieldMap | None = None
    """Templates for `format: fields`; the task's own by default."""
    metric: Literal["exact_match", "label_accuracy", "gsm8k", "rouge_l", "answer_nll", "pass@1"] = "exact_match"
    """exact_match, gsm8k and rouge_l generate an answer; label_accuracy takes the likeliest label; answer_nll is nats
    per answer token; pass@1 runs the tests of HumanEval-style problems on the code that the model writes."""
    run_code: bool = False
    """Allows pass@1 to run what the model writes: each program in a process of its own that can only compute."""
    run_seconds: Annotated[float, Field(gt=0, le=600)] = 10.0
    """CPU seconds of one program; by the clock three times as many and 5 more."""
    run_memory: Annotated[int, Field(ge=64)] = 1024
    """MiB of memory of one program."""
    max_rows: Annotated[int, Field(ge=1)] = 200
    """Rows used, taken evenly from the file."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    """Largest number of tokens generated per answer."""

    @model_validator(mode="after")
    def _running_code_is_asked_for(self) -> EvalConfig:
        if self.metric == PASS_AT_1 and not self.run_code:
            raise ValueError(
                f"metric: {PASS_AT_1} runs programs that the model writes; set run_code: true to allow it, or take "
                "another metric"
            )
        return self

    def rows_source(self, fields: FieldMap | None) -> RowsSource:
        """The held-out rows; `fields`, the task's templates, apply where this section has none."""
        fields = self.fields or fields
        format: DataFormat = "fields" if fields is not None and self.format == "auto" else self.format
        return RowsSource(self.path, format=format, fields=fields, max_rows=self.max_rows)


class _TaskRows(Section):
    """The keys of a task that come before those of RowsConfig."""

    name: Text
    """Short name, used in metrics and folders."""
    train: Text
    """Training rows: a local .jsonl, .json, .csv or .parquet file, or a hub id."""


class TaskConfig(RowsConfig, _TaskRows):
    """One task of the sequence."""

    format: DataFormat = "auto"
    """Row format: OpenAI messages, prompt_completion, alpaca, sharegpt, text, or fields (templates); auto detects
    it."""
    role: Literal["task", "align"] = "task"
    """`align` marks the first task as the alignment stage: memory, Fisher and anchor are taken after it."""
    eval: EvalConfig | None = None
    """Measurement of this task's utility."""
    mix: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of each earlier task's rows that is mixed into this task's (dual-stage mixed fine-tuning, DMT, arXiv
    2310.05492)."""
    part: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    """[k, n]: train the k-th of n disjoint parts of the rows, which train.seed draws; null: all rows."""

    @model_validator(mode="after")
    def _the_part_is_one_of_them(self) -> TaskConfig:
        if self.part is not None and self.part[0] > self.part[1]:
            raise ValueError(
                f"part: there is no part {self.part[0]} of {self.part[1]}; the first is [1, {self.part[1]}]"
            )
        return self

    @model_validator(mode="after")
    def _the_format_fields_has_templates(self) -> TaskConfig:
        if self.format == "fields" and self.fields is None:
            raise ValueError("format `fields` needs `fields: {prompt: ..., completion: ...}`")
        return self

    @property
    def rows_source(self) -> RowsSource:
        """The training rows."""
        return self._source(self.train)


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
    """Decides which poisoned rows are taken and where they go."""

    @model_validator(mode="after")
    def _ratio_needs_a_source(self) -> PoisonConfig:
        if self.ratio > 0 and self.source is None:
            raise ValueError("ratio > 0 needs `source`, a file of poisoned rows")
        return self

    @model_validator(mode="after")
    def _templates_choose_their_format(self) -> PoisonConfig:
        if self.fields is not None and self.format == "auto":
            self.format = "fields"
        return self

    @property
    def rows_source(self) -> RowsSource:
        """The poisoned rows; only with a `source`."""
        assert self.source is not None, "a ratio above 0 has a source"
        return RowsSource(self.source, format=self.format, fields=self.fields)
