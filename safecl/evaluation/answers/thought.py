"""Header, thought and answer of a generated text: the one meaning of "answer" in all of safecl.

    header  thought                     answer
    assistant\\n<think>\\nThey ask ...</think>\\n\\nI'm sorry, ...

Scorers, judges, matches, memory rows and the scan's refusals see the answer. A thought that does not end has no answer
behind it: the text is cut off, which is neither an answer nor a refusal.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from safecl.data.templates.thinking import Markers, markers_of

# Some models wrap the answer behind a thought; one that was cut off lacks the end.
_WRAPPED = re.compile(
    r"<(answer|response|\|begin_of_solution\|)>(.*?)(?:</(?:answer|response)>|<\|end_of_solution\|>)?", re.DOTALL
)

ALIKE = 0.9
FEWEST_ALIKE = 5
"""Answers that open alike give a warning from this share and this number on."""


@dataclass(frozen=True)
class Parts:
    """The parts of a text. `cut_off`: a thought does not end, or nothing follows it before the last allowed token; the
    answer is then empty."""

    header: str
    thought: str
    answer: str
    cut_off: bool = False


def split(text: str, markers: Markers, *, opened: bool = False, finished: bool = True) -> Parts:
    """Split a generated text.

    Args: `opened`: whether the prompt has opened a thought; `finished`: whether the text ended by itself.
    """
    header, rest = _without_header(text, markers)
    thoughts: list[str] = []
    answers: list[str] = []
    inside = opened
    while True:
        close = _closing(markers).search(rest)
        open = _opening(markers).search(rest)
        if inside or (close is not None and not thoughts and (open is None or close.start() < open.start())):
            # A closing marker without an opening one: the prompt has opened the thought, or the opening was lost.
            inside = False
            if close is None:
                return Parts(header, "\n".join([*thoughts, _unopened(rest, markers)]).strip(), "", cut_off=True)
            thoughts.append(_unopened(rest[: close.start()], markers))
            rest = rest[close.end() :]
        elif open is not None:
            answers.append(rest[: open.start()])
            rest, inside = rest[open.end() :], True
        else:
            break
    if not thoughts:
        return Parts(header, "", _without_footer(rest, markers))
    while (again := _closing(markers).match(rest.lstrip())) and not "".join(answers).strip():
        rest = rest.lstrip()[again.end() :]  # a marker that the model repeats
    header_behind, rest = _without_header(rest, markers)
    answer = _without_footer("".join([*answers, rest]), markers).strip()
    if wrapped := _WRAPPED.fullmatch(answer):
        answer = wrapped[2].strip()
    thought = "\n".join(part.strip() for part in thoughts).strip()
    return Parts(header or header_behind, thought, answer, cut_off=not answer and not finished)


def answer_of(tokenizer: Any, text: str) -> str:
    """Return the answer in a text that was written by a person or a model, such as a reference."""
    return split(text, markers_of(tokenizer)).answer


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decode a generated text without special tokens, except for those that mark a thought."""
    kept = {tokenizer.convert_tokens_to_ids(token): token for token in markers_of(tokenizer).kept}
    texts: list[str] = []
    start = 0
    for place, token in enumerate([*ids, None]):
        if token is None or token in kept:
            texts.append(tokenizer.decode(list(ids[start:place]), skip_special_tokens=True))
            texts += [kept[token]] if token is not None else []
            start = place + 1
    return "".join(texts)


@functools.lru_cache(maxsize=64)
def _any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    """Match one of the texts, the longest first, with any white space where they have some."""
    longest = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(r"\s+".join(map(re.escape, text.split())) for text in longest) or "(?!)")


def _opening(markers: Markers) -> re.Pattern[str]:
    return _any_of(tuple(pair.open for pair in markers.pairs))


def _closing(markers: Markers) -> re.Pattern[str]:
    return _any_of(tuple(pair.close for pair in markers.pairs))


def _unopened(thought: str, markers: Markers) -> str:
    """Drop an opening marker that the model repeats at the start of a thought that was open already."""
    found = _opening(markers).match(thought.lstrip())
    return thought.lstrip()[found.end() :] if found else thought


def _without_header(text: str, markers: Markers) -> tuple[str, str]:
    """Return the header and the text behind it; the text is as it was where there is no header."""
    found = _any_of(markers.headers).match(text.lstrip())
    if found is None:
        return "", text
    behind = text.lstrip()[found.end() :]
    # "assistant" is a header where the line or the marker ends with it, and a word of the answer elsewhere.
    if found[0][-1:].isalnum() and behind[:1] not in ("", "\n", "\r"):
        return "", text
    return found[0], behind.lstrip()


def _without_footer(text: str, markers: Markers) -> str:
    for footer in markers.footers:
        if text.rstrip().endswith(footer):
            return text.rstrip().removesuffix(footer).rstrip()
    return text


# -------------------------------------------------------------------------------------------------------------- warning


def open_alike(answers: Sequence[str], references: Sequence[str]) -> int:
    """Return how many answers open with the same word or mark, one that no reference has; 0 where these are less than
    nine of ten, or fewer than five.

    Without references only an opening that is no word counts, such as `<reflect>`.
    """
    openings = [_first(answer) for answer in answers if answer.strip()]
    if len(openings) < FEWEST_ALIKE:
        return 0
    opening, count = Counter(openings).most_common(1)[0]
    if count < ALIKE * len(openings):
        return 0
    foreign = all(opening not in reference for reference in references) if references else not opening[0].isalnum()
    return count if foreign else 0


def _first(answer: str) -> str:
    """Return the first word of an answer, or its first tag or run of symbols."""
    found = re.match(r"<[^<>\s]+>|\[[^\[\]\s]+\]|\w+(?:['’]\w+)*:?|[^\w\s]+", answer.strip())
    return found[0] if found else answer.strip()[:1]
