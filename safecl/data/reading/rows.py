"""Rows of any file in the common form. A row that cannot be used is named by file and line, and skipped.

`train.max_bad_rows` limits how many are skipped. It is a share below 1 and a count from 1 on: 0.01 allows one row in a
hundred, 5 allows five.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from safecl.config import FieldMap
from safecl.data.messages import ChatRow, DataError, Message, RowProblem, check_messages, clip, columns_of
from safecl.data.reading.benchmarks import as_prompt, benchmark_of, benchmark_rows
from safecl.data.reading.cells import is_nan, turns_in
from safecl.data.reading.columns import is_unwanted, unused_columns
from safecl.data.reading.files import Source, open_source, where
from safecl.data.reading.formats import detect, turns_of_cell, with_system, with_tools
from safecl.data.reading.raw import RawRow
from safecl.data.reading.readers import check_fields, row_reader, suggest_fields, tags_of, template_columns
from safecl.data.reading.turns import read_turns

_SAMPLE = 100  # rows that are read to detect the format
_PROMPT_COLUMNS = ("prompt", "goal", "instruction", "question", "text")


@dataclass
class BadRows:
    """Rows that cannot be used, and what is not used of the others. seen: rows in the file; count: bad ones; left_out:
    those whose answer is marked as not wanted; examples: the first bad ones, as "file:line: reason"; notes: (number of
    rows, place of the first) by remark."""

    path: str
    seen: int = 0
    count: int = 0
    left_out: int = 0
    examples: list[str] = field(default_factory=list)
    limit_report: int = 10
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)

    def note(self, where: str, remark: str) -> None:
        """Count a remark on a row that is used."""
        count, first = self.notes.get(remark, (0, where))
        self.notes[remark] = (count + 1, first)

    def told(self) -> list[str]:
        """The remarks as lines, with the number of rows and the first of them."""
        lines = [f"{count:,} of {self.seen:,} rows: {text} (first: {at})" for text, (count, at) in self.notes.items()]
        return [f"{self.path}: {line}" for line in lines]

    def add(self, where: str, reason: str) -> None:
        self.count += 1
        if len(self.examples) < self.limit_report:
            self.examples.append(f"{where}: {reason}")

    def __str__(self) -> str:
        more = [f"... and {self.count - len(self.examples)} more"] if self.count > len(self.examples) else []
        return "\n".join(f"  {line}" for line in [*self.examples, *more])

    def check(self, max_bad_rows: float) -> None:
        """Raise DataError where more rows are bad than `max_bad_rows` allows, or none is good."""
        if self.seen == 0:
            raise DataError(f"{self.path}: has no rows")
        if self.left_out == self.seen:
            raise DataError(f"{self.path}: every row marks its answer as not wanted (`label: false`), so none is left")
        if self.count + self.left_out == self.seen:
            raise DataError(f"{self.path}: none of the {self.seen} rows can be used:\n{self}")
        if self.count > (max_bad_rows if max_bad_rows >= 1 else max_bad_rows * self.seen):
            allowed = f"{max_bad_rows:g}" if max_bad_rows >= 1 else f"{100 * max_bad_rows:g} %"
            raise DataError(
                f"{self.path}: {self.count} of {self.seen} rows ({100 * self.count / self.seen:.2g} %) cannot be used, "
                f"max_bad_rows allows {allowed}:\n{self}\n"
                "Repair these rows, or skip them with a larger train.max_bad_rows."
            )


def read_rows(
    path: str,
    *,
    split: str = "train",
    format: str = "auto",
    fields: FieldMap | Mapping[str, Any] | None = None,
    max_rows: int | None = None,
    max_bad_rows: float = 0.01,
    limit_report: int = 10,
) -> tuple[list[ChatRow], BadRows]:
    """Read all rows of a local file, a `datasets.save_to_disk` folder or a hub id, in the common form.

    Args: `split` of a hub data set; `format` as in the config, `auto` detects it; `max_rows` good rows are taken evenly
    from the file; `max_bad_rows`: a share below 1, a count from 1 on; `limit_report` bad rows are named, the others
    only counted.
    Raises: DataError, with file and line, where the file or too many of its rows cannot be used.
    """
    source = open_source(path, split)
    bad = BadRows(source.path, limit_report=limit_report)
    rows = list(good_rows(source, format, fields, bad))
    bad.check(max_bad_rows)
    return [rows[i] for i in spread(len(rows), max_rows)], bad


def spread(num_rows: int, max_rows: int | None) -> np.ndarray:
    """Choose at most `max_rows` of `num_rows` rows, evenly spread. Indices, int64 [min(num_rows, max_rows)]"""
    if max_rows is None or max_rows >= num_rows:
        return np.arange(num_rows)
    return np.arange(max_rows) * num_rows // max_rows


def good_rows(
    source: Source, format: str, fields: FieldMap | Mapping[str, Any] | None, bad: BadRows
) -> Iterator[ChatRow]:
    """Yield the good rows of a source, and record the others in `bad`. Raises DataError where the format does not fit
    the file."""
    fields = FieldMap.model_validate(fields) if isinstance(fields, Mapping) else fields
    format = settle_format(source, format, fields)
    read = row_reader(format, fields)
    templates = (fields.prompt, fields.completion, fields.system or "") if fields else ()
    used = {name for template in templates for name in template_columns(template)}
    for raw in source.rows():
        bad.seen += 1
        place = source.where(raw.line)
        try:
            columns = _columns(raw)
            if is_unwanted(columns, format):
                bad.left_out += 1
                bad.note(place, "left out, since `label: false` marks an answer that is not wanted")
                continue
            messages = read(columns)
        except RowProblem as problem:
            bad.add(place, str(problem))
            continue
        for name in unused_columns(columns, messages, format):
            bad.note(place, f"{name} is not used")
        tags = tags_of({name: value for name, value in columns.items() if name not in used})
        yield ChatRow(messages, source.path, raw.line, tags)


def _columns(raw: RawRow) -> dict[str, Any]:
    if raw.columns is None:
        raise RowProblem(raw.problem)
    return {name: None if is_nan(value) else value for name, value in raw.columns.items()}


def settle_format(source: Source, format: str, fields: FieldMap | None) -> str:
    """Return the named format, or for `auto` the one of most of the first rows. Raises DataError where none fits."""
    format = "fields" if format == "auto" and fields is not None else format
    if format == "fields" and fields is None:
        raise DataError(f"{source.path}: format `fields` needs templates, `fields: {{prompt: ..., completion: ...}}`")
    if format not in ("auto", "fields"):
        return format
    sample = [raw.columns for raw in islice(source.rows(), _SAMPLE) if raw.columns is not None]
    if not sample:
        return "messages" if format == "auto" else format  # any will do: no row can be read, and each reports why
    columns = list(dict.fromkeys(name for row in sample for name in row))
    if format == "fields" and fields is not None:
        check_fields(fields, columns, source.path)
        return format
    found = Counter(name for name in map(detect, sample) if name)
    if not found and (name := _turns_column(sample)) is not None:
        raise DataError(f"{source.path}: the column `{clip(name)}` holds messages; name it `messages`")
    if not found:
        raise DataError(
            f"{source.path}: the columns {columns_of(columns)} are none of the known formats (messages, "
            "prompt_completion, alpaca, sharegpt, text); "
            f"map them with templates, e.g. {suggest_fields(columns)}"
        )
    return found.most_common(1)[0][0]


def _turns_column(sample: Sequence[Mapping[str, Any]]) -> str | None:
    """A column that holds messages, if possible one of wanted answers."""
    names = dict.fromkeys(name for row in sample for name, value in row.items() if _holds_turns(value))
    return next((name for name in names if "reject" not in name.lower()), next(iter(names), None))


def _holds_turns(value: Any) -> bool:
    try:
        return turns_in(value) is not None
    except ValueError:
        return False


# -------------------------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Prompt:
    """The turns before an answer of the model, the last of them the user's or a tool's. `line` counts from 1."""

    messages: tuple[Message, ...]
    path: str
    line: int
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Content of the user's last turn."""
        return next(message.content for message in reversed(self.messages) if message.role == "user")


def read_prompts(
    path: str,
    max_prompts: int | None = None,
    *,
    split: str = "train",
    only_safe: bool = False,
    max_bad_rows: float = 0.01,
) -> list[Prompt]:
    """Read prompts, which need no answers: a `prompt`, `goal`, `instruction` (+ `input`), `question` or `text` column,
    or the turns of any row format. `harmbench:FILE` and others name a benchmark in its published form
    (safecl/data/reading/benchmarks.py).

    Args: `max_prompts` are taken evenly; `only_safe` leaves out rows with `safe: false`, as XSTest's unsafe contrasts.
    Raises: DataError, with file and line.
    """
    benchmark, path = benchmark_of(path)
    if benchmark is None:
        source = open_source(path, split)
        rows: Iterable[tuple[str, RawRow]] = ((source.path, raw) for raw in source.rows())
    else:
        rows = benchmark_rows(benchmark, path)
    bad = BadRows(path)
    prompts = []
    for file, raw in rows:
        bad.seen += 1
        try:
            columns: Mapping[str, Any] = _columns(raw)
            columns = columns if benchmark is None else as_prompt(benchmark, file, columns)
            messages = prompt_of(columns)
        except RowProblem as problem:
            bad.add(where(file, raw.line), str(problem))
            continue
        if not (only_safe and str(columns.get("safe", True)).lower() in ("false", "0", "unsafe")):
            prompts.append(Prompt(messages, file, raw.line, tags_of(columns)))
    bad.check(max_bad_rows)
    if not prompts:
        raise DataError(f"{path}: every prompt is marked `safe: false`, so none is left")
    return [prompts[i] for i in spread(len(prompts), max_prompts)]


def prompt_of(columns: Mapping[str, Any]) -> tuple[Message, ...]:
    """Return the turns before the last answer. Raises RowProblem where the row has no prompt."""
    format = detect(columns)
    if format in ("messages", "sharegpt"):
        return _before_last_answer(_read_leniently(format, columns))
    if "instruction" in columns:
        return _before_last_answer(row_reader("alpaca", None)({**columns, "output": "-"}))
    name = next((name for name in _PROMPT_COLUMNS if name in columns), None)
    if name is None:
        raise RowProblem(f"no column {', '.join(f'`{c}`' for c in _PROMPT_COLUMNS)}; the row has {columns_of(columns)}")
    if name == "prompt" and turns_of_cell(columns[name], name) is not None:
        return _before_last_answer(_read_leniently("prompt_completion", columns))
    row = {key: columns.get(key) for key in ("system", "history", "tools")}
    return _before_last_answer(
        row_reader("prompt_completion", None)({**row, "prompt": columns[name], "completion": "-"})
    )


def _read_leniently(format: str, columns: Mapping[str, Any]) -> tuple[Message, ...]:
    """Read a list of turns that may end with the user's: a prompt needs no answer."""
    key = {"messages": "messages", "sharegpt": "conversations", "prompt_completion": "prompt"}[format]
    if format == "prompt_completion":
        turns = turns_of_cell(columns[key], key) or []
    else:
        turns = read_turns(columns[key], key)
    if turns and turns[-1].role in ("user", "tool"):
        turns = [*turns, Message("assistant", "-")]
    messages = check_messages([replace(m, train=None) for m in with_system(columns, turns)])
    return with_tools(columns, messages)


def _before_last_answer(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    last = max(i for i, message in enumerate(messages) if message.role == "assistant")
    asked = messages[:last]
    if asked[-1].role not in ("user", "tool"):
        raise RowProblem("the turn before the last answer is neither the user's nor a tool's")
    return asked
