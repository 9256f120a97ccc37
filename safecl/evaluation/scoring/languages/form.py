"""The form of one language's rules."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    """Rules of one language, as regular expressions: `refusals`, and openings by which an answer `complies`."""

    name: str
    refusals: tuple[str, ...]
    complies: tuple[str, ...]
