"""A summary of prepared data for the terminal: sizes, the share of supervised tokens, and one example with its mask.

Trained tokens are green and enclosed in {+braces with plus signs+}, as in a word diff, so that they also show without
colours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Group
from rich.panel import Panel
from rich.text import Text

from safecl.data.reading.files import where
from safecl.data.tokens import Report, Row, TokenDataset
from safecl.terminal import plain

_SHOWN_TOKENS = 400


def decode_marked(tokenizer: Any, row: Row, max_tokens: int = _SHOWN_TOKENS) -> Text:
    """Decode the row, with every run of trained tokens green and inside {+ +}."""
    text = Text()
    for trained, ids in _runs(row, max_tokens):
        decoded = "".join(
            c if c.isprintable() or c == "\n" else "?"
            for c in tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        )
        text.append("{+" + decoded + "+}" if trained else decoded, "bold green" if trained else "dim")
    if len(row) > max_tokens:
        text.append(f" ... ({len(row) - max_tokens} more tokens)", "italic")
    return text


def _runs(row: Row, max_tokens: int) -> list[tuple[bool, np.ndarray]]:
    """Split the row into runs of equal mask. Of a long row, keep the part around the first trained token."""
    first = int(np.argmax(row.loss_mask))
    start = max(0, min(first - max_tokens // 2, len(row) - max_tokens))
    ids, mask = row.input_ids[start : start + max_tokens], row.loss_mask[start : start + max_tokens]
    cuts = np.flatnonzero(np.diff(mask)) + 1
    return [(bool(m[0]), i) for i, m in zip(np.split(ids, cuts), np.split(mask, cuts), strict=True) if len(m)]


def describe(dataset: TokenDataset, tokenizer: Any, *, examples: str = "full", title: str = "data") -> Group:
    """Summarise a data set for rich: rows, tokens, their supervised share, lengths, bad and cut rows, one example.

    Args: `examples` as `privacy.examples`: "full" shows the example, "hashed" only its id, "none" nothing, and bad rows
    only as a count.
    """
    left_out = (line for report in dataset.reports for line in _left_out(report, examples))
    parts: list[Any] = [_sizes(dataset), plain(_lengths(dataset)), *left_out]
    i = int(np.argsort(dataset.lengths, kind="stable")[len(dataset) // 2])
    place = where(dataset.path(i), int(dataset.lines[i]))
    if examples == "full":
        heading = plain(f"{title}: one row, {{+trained+}}, the rest is given")
        parts.append(Panel(decode_marked(tokenizer, dataset.row(i)), title=heading, subtitle=plain(place)))
    elif examples == "hashed":
        sizes = f"{dataset.lengths[i]} tokens, {dataset.num_targets[i]} of them trained"
        parts.append(Text(f"one row: id {int(dataset.row_ids[i]):016x}, {sizes}"))
    return Group(*parts)


def _sizes(dataset: TokenDataset) -> Text:
    sizes = f"{len(dataset):,} rows, {dataset.num_tokens:,} tokens, {dataset.total_targets:,} of them supervised ("
    share = plain(f"{100 * dataset.supervised_share:.1f} %", "bold")
    return Text.assemble(sizes, share, plain(f"); chat template: {dataset.reports[0].template}"))


def _lengths(dataset: TokenDataset) -> str:
    low, middle, high = np.percentile(dataset.lengths, [5, 50, 95]).astype(int)
    return f"tokens per row: 5 % {low}, median {middle}, 95 % {high}, longest {int(dataset.lengths.max())}"


def _left_out(report: Report, examples: str) -> list[Text]:
    lines = []
    if report.truncated:
        cut = f"{report.truncated:,} rows of {report.path} were cut to max_length {report.max_length}"
        lines.append(plain(cut, "yellow"))
    if report.bad:
        left_out = f"{report.bad:,} of {report.seen:,} rows of {report.path} cannot be used and are skipped"
        lines.append(plain(left_out, "yellow"))
        lines += [] if examples == "none" else [plain(f"  {line}") for line in report.examples]
    return [*lines, *(plain(line, "yellow") for line in report.notes)]
