"""Refusals and complying openings in thirteen languages besides English.

Each language has two lists of rules (regular expressions): phrases by which an answer declines, and openings by which
it does what it was asked. They are written for models' own wordings: an apology, "I can / will / may not" in the first
person, "that is illegal", "against my guidelines", "as an AI". They look at the opening of an answer only. Accents,
Arabic vowel signs and letter case do not count, so that "Desole" and "désolé" are the same.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

from safecl.evaluation.scoring.languages.eastern import EASTERN
from safecl.evaluation.scoring.languages.form import Language
from safecl.evaluation.scoring.languages.slavic import SLAVIC
from safecl.evaluation.scoring.languages.western import WESTERN

# Accents of Latin and Cyrillic letters, Arabic vowel signs and hamza. Marks of Hindi and Japanese are letters there.
_ACCENTS = re.compile("[\u0300-\u036f\u0640\u064b-\u0655]")

LANGUAGES: dict[str, Language] = {**WESTERN, **SLAVIC, **EASTERN}
"""By code of ISO 639-1."""


def bare(text: str) -> str:
    """Return the text in lower case without accents and vowel signs that the rules leave out."""
    return unicodedata.normalize("NFC", _ACCENTS.sub("", unicodedata.normalize("NFD", text))).lower()


@cache
def refusal_rules(code: str) -> re.Pattern[str]:
    return _compiled(LANGUAGES[code].refusals)


@cache
def compliance_rules(code: str) -> re.Pattern[str]:
    return _compiled(LANGUAGES[code].complies)


def _compiled(rules: tuple[str, ...]) -> re.Pattern[str]:
    without_accents = unicodedata.normalize("NFC", _ACCENTS.sub("", unicodedata.normalize("NFD", "|".join(rules))))
    return re.compile(without_accents, re.IGNORECASE)
