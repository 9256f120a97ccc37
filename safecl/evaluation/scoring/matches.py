"""Comparison of generated answers with references.

exact_match   equal to the reference, where runs of white space count as one blank; `relaxed` also drops case,
              punctuation and English articles (the normaliser of SQuAD, Rajpurkar et al. 2016)
gsm8k         final number (Cobbe et al. 2021): `strict` is the number after the first `####`, `flexible` the last
              number of the answer, as in lm-eval's two filters; commas and currency signs are stripped. The headline
              counts an answer that is right by either.
rouge_l       F1 of the longest common subsequence of words (Lin 2004): with l its length, m and n the words of answer
              and reference, p = l / m, r = l / n, 2 p r / (p + r). Words are runs of letters and digits in lower case,
              without stemming; 0 without words
"""

from __future__ import annotations

import re
import string
from decimal import Decimal, InvalidOperation

# A minus is a sign only where no word or bracket ends right before it: the last number of "5-10" is 10.
_NUMBER = r"(?:(?<![\w)])[-−])?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_STRICT = re.compile(r"####\s*(" + _NUMBER + ")")
_ANY_NUMBER = re.compile(_NUMBER)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation + "’‘“”…")


def exact_match(answer: str, reference: str) -> bool:
    """Whether the texts are equal, apart from white space."""
    return " ".join(answer.split()) == " ".join(reference.split())


def relaxed_match(answer: str, reference: str) -> bool:
    """Whether the texts are equal, apart from white space, case, punctuation and English articles."""
    return _relaxed(answer) == _relaxed(reference)


def _relaxed(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.casefold().translate(_PUNCTUATION)).split())


def strict_number(text: str) -> Decimal | None:
    """Return the number after the first `####`; None where there is none."""
    match = _STRICT.search(text)
    return _number(match.group(1)) if match else None


def last_number(text: str) -> Decimal | None:
    """Return the last number in the text; None where there is none."""
    found = _ANY_NUMBER.findall(text)
    return _number(found[-1]) if found else None


def reference_number(completion: str) -> Decimal | None:
    """Return a reference's number: that after `####` where there is one, else the last."""
    strict = strict_number(completion)
    return strict if strict is not None else last_number(completion)


def _number(text: str) -> Decimal | None:
    try:
        return Decimal(re.sub(r"[,$]", "", text).replace("−", "-"))
    except InvalidOperation:
        return None


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L of an answer, in [0, 1]."""
    a, b = (re.findall(r"\w+", text.lower()) for text in (answer, reference))
    lengths = [0] * (len(b) + 1)  # of the longest common subsequence with each beginning of b
    for word in a:
        before = 0
        for i, other in enumerate(b, start=1):
            before, lengths[i] = lengths[i], before + 1 if word == other else max(lengths[i], lengths[i - 1])
    common = lengths[-1]
    return 2 * common / (len(a) + len(b)) if common else 0.0
