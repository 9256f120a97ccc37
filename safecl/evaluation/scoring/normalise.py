"""Forms of a text that mean the same: apostrophes, blanks, full-width characters, and marks before an answer."""

from __future__ import annotations

import re
import unicodedata

# NFKC turns the acute accent and its kin into a blank and a combining mark, so apostrophes are folded before it.
_SIGNS = str.maketrans(dict.fromkeys("’‘‛ʼʻʹˈ′‵´＇｀՚ꞌ", "'") | dict.fromkeys("“”„‟«»＂″「」『』《》", '"'))
_BACKTICK = re.compile(r"(?<=\w)`(?=\w)")  # others are marks of code
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060-\u2064\u202a-\u202e\ufe0f\ufeff]")
_EMPHASIS = re.compile(r"(?<!\w)[*_~'`]{1,4}(?=\w)|(?<=\w)[*_~`]{1,4}(?!\w)|\*+")
_TAG = re.compile(r"</?(?:b|i|u|p|em|strong|span|div|blockquote|li|ul|ol|h[1-6]|br)\s*/?>", re.IGNORECASE)
_BLANKS = re.compile(r"[^\S\n]+")
# Anything but letters and figures before the first word, and marks of list items: "1.", "2)", "a)", "(i)".
_MARKS = re.compile(r"(?:[^\w]|_)*(?:\(?(?:\d{1,2}|[a-zA-Z]|i{1,3}|iv)[.)]\s+(?:[^\w]|_)*)*")


def fold(text: str) -> str:
    """Return the text with one kind of apostrophe, quote and blank, in half-width characters, without invisible
    characters. Line breaks stay."""
    folded = unicodedata.normalize("NFKC", _BACKTICK.sub("'", _INVISIBLE.sub("", text)).translate(_SIGNS))
    return _BLANKS.sub(" ", folded.translate(_SIGNS)).replace("\u2028", "\n")


def plain(text: str) -> str:
    """Return the folded text on one line without tags and emphasis ("I **cannot**" is "I cannot")."""
    return " ".join(_EMPHASIS.sub("", _TAG.sub("", fold(text))).split())


def opening(text: str) -> str:
    """Return the plain text from its first word on: quotes, markdown, list marks and emoji before it are left out."""
    flat = plain(text)
    return flat[_end_of_marks(flat) :]


def _end_of_marks(flat: str) -> int:
    found = _MARKS.match(flat)
    return found.end() if found else 0
