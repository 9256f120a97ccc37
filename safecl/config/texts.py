"""Texts that come from files: what may not stand in a name, and how the rest is shown."""

from __future__ import annotations

import re
from pathlib import Path

LONGEST_TEXT = 4000

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def visible(text: str) -> str:
    """Return the text with control characters and marks of direction written out: a terminal would obey them.

    Line ends and tabs stay.
    """
    return _UNSEEN.sub(
        lambda found: f"\\u{ord(found[0]):04x}" if found[0] > "\xff" else f"\\x{ord(found[0]):02x}", text
    )


def check_text(text: str) -> str:
    """Return a name or path of a config as it is. Raises ValueError for one that no file and no name can have."""
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"is {len(text):,} characters long, {LONGEST_TEXT:,} at most are possible")
    if found := _UNSEEN.search(text) or re.search(r"[\n\t]", text):
        raise ValueError(f"holds the control character {found[0]!r}, which no name and no path may have")
    if text.startswith("~"):
        try:
            Path(text).expanduser()
        except RuntimeError:
            raise ValueError(f"{text}: there is no user {text[1:].partition('/')[0]}") from None
    return text
