"""Reads the rows of a merge and tokenises them with the first tuned model's tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from safecl.config import ConfigError, ModelConfig
from safecl.data import ChatRow, load_tokenizer, read_prompts, read_rows
from safecl.data.reading.files import open_source
from safecl.data.reading.formats import detect
from safecl.data.templates.masks import Encoded, tokenize_rows
from safecl.merging.base import Models
from safecl.merging.rows.affirmative import affirmative_rows, own_requests
from safecl.merging.rows.settings import RowsConfig


@dataclass(frozen=True)
class TokenRow:
    """One row. ids: int64 [length]. targets: bool [length], True for the tokens of the answer; False at 0."""

    ids: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class Rows:
    """The rows of a merge, and a line about them for the report."""

    rows: Sequence[TokenRow]
    note: str


def harmful_rows(config: RowsConfig, models: Models) -> Rows:
    """Return harmful rows: those of the file; where it has no answers, or there is no file, with affirmative openings.

    Raises ConfigError where the file cannot be used.
    """
    if models.data is None:
        return _tokenised(config, models, affirmative_rows(own_requests()), "safecl's own requests, {}, {} tokens")
    path = str(models.data)
    if _has_answers(models.data):
        return rows_with_answers(config, models)
    prompts = read_prompts(path, config.max_rows)
    what = f"{path}: {{}} without answers, so each got an affirmative opening; {{}} tokens"
    return _tokenised(config, models, affirmative_rows(prompts), what)


def rows_with_answers(config: RowsConfig, models: Models) -> Rows:
    """Return the rows of the file, which must have answers. Raises ConfigError where it cannot be used."""
    assert models.data is not None, "the merge says that it needs rows"
    rows, _ = read_rows(str(models.data), max_rows=config.max_rows)
    return _tokenised(config, models, rows, f"{models.data}: {{}}, {{}} tokens")


def _has_answers(path: Path) -> bool:
    columns = [raw.columns for raw in islice(open_source(path).rows(), 1)]
    return bool(columns and columns[0]) and detect(columns[0] or ()) not in (None, "text")


def _tokenised(config: RowsConfig, models: Models, rows: Sequence[ChatRow], what: str) -> Rows:
    """Tokenise rows. what: the line about them, with places for their number and that of their tokens."""
    made = [row for row in tokenised(config, models, rows) if row is not None]
    refuse_none(config, rows[0].path, made)
    return Rows(made, note_of(what, made, len(rows)))


def tokenised(config: RowsConfig, models: Models, rows: Sequence[ChatRow]) -> list[TokenRow | None]:
    """Tokenise rows; None in the place of one that has no answer within the length."""
    path = models.folders["tuned"]
    tokenizer = load_tokenizer(ModelConfig(path=path, trust_remote_code=config.trust_remote_code), "tuned")
    return [
        TokenRow(torch.from_numpy(row.ids).long(), torch.from_numpy(row.loss_mask.copy()).bool())
        if isinstance(row, Encoded)
        else None
        for row in tokenize_rows(tokenizer, rows, config.max_length)
    ]


def refuse_none(config: RowsConfig, path: str, rows: Sequence[object]) -> None:
    """Raise ConfigError where no row is left."""
    if not rows:
        raise ConfigError(f"{path}: no row has an answer within {config.max_length} tokens (max_length)")


def note_of(what: str, rows: Sequence[TokenRow], count: int) -> str:
    """Return the line about rows that were used, of so many. what: has places for their number and their tokens'."""
    left_out = f" ({count - len(rows)} more cannot be used)" if len(rows) < count else ""
    number = f"{len(rows)} row{'s' * (len(rows) != 1)}{left_out}"
    return what.format(number, f"{sum(len(row.ids) for row in rows):,}")
