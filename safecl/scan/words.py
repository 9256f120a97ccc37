"""The words of users in a row, which a report of flagged rows shows: no system message, tool, thought or answer, and
nothing that the chat template writes."""

from __future__ import annotations

from safecl.config import RunConfig
from safecl.data.config_rows import read_training_rows
from safecl.data.messages import ChatRow
from safecl.evaluation.answers.texts import place_of


def words_by_place(config: RunConfig) -> dict[str, str]:
    """Read the rows that the run trains on. Returns the users' words by the row's place (`file:line`)."""
    return {place_of(row): users_words(row) for row in read_training_rows(config)}


def users_words(row: ChatRow) -> str:
    """The users' turns before the row's last answer, separated by a slash; the text of a row of plain text."""
    answers = [i for i, message in enumerate(row.messages) if message.role == "assistant"]
    before = row.messages[: answers[-1]] if answers else row.messages
    return " / ".join(m.content.strip() for m in before if m.role in ("user", "text"))
