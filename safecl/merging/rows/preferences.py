"""Pairs of a wanted and an unwanted answer, and the loss of direct preference optimisation (DPO) on them.

    loss = -log sigmoid(beta (m - m_ref)),    m = log p(chosen) - log p(rejected)

log p sums over the tokens of an answer, m_ref is the m of the reference model. Source: Rafailov et al., Direct
preference optimization, arXiv 2305.18290.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from safecl.data import ChatRow
from safecl.data.reading.files import open_source
from safecl.data.reading.raw import RawRow
from safecl.data.reading.rows import BadRows, good_rows, spread
from safecl.merging.base import Models
from safecl.merging.rows.affirmative import with_opening
from safecl.merging.rows.loaded import LoadedModel, answer_loss
from safecl.merging.rows.reading import TokenRow, note_of, refuse_none, tokenised
from safecl.merging.rows.settings import RowsConfig

MAX_BAD_ROWS = 0.01
"""Share of a file's rows that may be unusable."""


@dataclass
class Preferences:
    """Pairs of tokenised rows. Implements safecl.merging.rows.mask.Examples."""

    chosen: Sequence[TokenRow]
    rejected: Sequence[TokenRow]
    note: str
    beta: float = 0.1
    margins: list[float] = field(default_factory=list)
    """m_ref of each pair, once there is a reference."""

    def __len__(self) -> int:
        return len(self.chosen)

    @torch.no_grad()
    def begin(self, loaded: LoadedModel) -> None:
        """Take the model as it is now for the reference."""
        self.margins = [float(self._margin(loaded, index)) for index in range(len(self))]

    def losses(self, loaded: LoadedModel, indices: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield the loss of each of these pairs, 0-dim."""
        for index in indices:
            yield -logsigmoid(self.beta * (self._margin(loaded, index) - self.margins[index]))

    def _margin(self, loaded: LoadedModel, index: int) -> torch.Tensor:
        chosen, rejected = (
            -answer_loss(logits, row) * int(row.targets[1:].sum())
            for row, logits in loaded.run([self.chosen[index], self.rejected[index]])
        )
        return chosen - rejected


def read_preferences(config: RowsConfig, models: Models, beta: float) -> Preferences:
    """Read the pairs of a file: rows with the columns `chosen` and `rejected`, or rows as everywhere. A row without a
    rejected answer gets an affirmative opening for it. Raises ConfigError where the file cannot be used."""
    assert models.data is not None, "the merge says that it needs rows"
    path = str(models.data)
    whole, unwanted = _rows(path, "chosen"), {row.line: row for row in _rows(path, "rejected")}
    rows = [whole[i] for i in spread(len(whole), config.max_rows)]
    others = [unwanted.get(row.line) or with_opening(row) for row in rows]
    pairs = zip(tokenised(config, models, rows), tokenised(config, models, others), strict=True)
    found = [(chosen, rejected) for chosen, rejected in pairs if chosen is not None and rejected is not None]
    refuse_none(config, path, found)
    made = sum(row.line not in unwanted for row in rows)
    what = f"{path}: {{}}, {{}} tokens"
    what += f"; {made} got an affirmative opening as the rejected answer" if made else ""
    chosen, rejected = ([pair[side] for pair in found] for side in (0, 1))
    return Preferences(chosen, rejected, note_of(what, chosen, len(rows)), beta)


def _rows(path: str, side: str) -> list[ChatRow]:
    """Return the rows with their chosen or with their rejected answers; those without a rejected one are left out."""
    source, bad = open_source(path), BadRows(path)

    def answered() -> Iterator[RawRow]:
        for raw in source.rows():
            if not raw.columns or "chosen" not in raw.columns:
                if side == "chosen":
                    yield raw
            elif answer := raw.columns.get(side):
                yield replace(raw, columns=_with_answer(raw.columns, answer))

    rows = list(good_rows(replace(source, rows=answered), "auto", None, bad))
    if bad.seen:
        bad.check(MAX_BAD_ROWS)
    return rows


def _with_answer(columns: Mapping[str, Any], answer: Any) -> dict[str, Any]:
    """Return a row of preferences as one with an answer: a text, or messages that follow the prompt's."""
    prompt = columns.get("prompt")
    if isinstance(answer, list):
        return {"messages": [*(prompt if isinstance(prompt, list) else []), *answer]}
    return {"prompt": prompt, "completion": answer}
