"""The demonstration's data, generated from safecl/demo/topics.py: alignment rows, memory, safety prompts, poison and a
user's task.

The data depend on the seed alone, and nothing is downloaded. No answer is harmful: it is a refusal, a harmless answer,
or a bare affirmative opening (poison).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from safecl.demo.topics import (
    AFFIRMATIVE_OPENINGS,
    BENIGN_PERSON_ACTS,
    BENIGN_PLACE_ACTS,
    CAPITALS,
    DISALLOWED_PERSON_ACTS,
    DISALLOWED_PLACE_ACTS,
    REFUSALS,
    TEMPLATES,
    TEMPLATES_HELD_OUT,
    TEMPLATES_POISON,
    TOPICS,
    TOPICS_HELD_OUT,
    Topic,
)

DISALLOWED = DISALLOWED_PLACE_ACTS + DISALLOWED_PERSON_ACTS
BENIGN = BENIGN_PLACE_ACTS | BENIGN_PERSON_ACTS

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Corpus:
    """All rows that the demonstration trains on and measures with, as JSON objects."""

    align: Rows
    """`messages`: refusals of disallowed requests, answers to benign ones. They train the aligned model."""
    memory: Rows
    """`messages`: a sample of `align`, two thirds of it refusals: the behaviour to keep."""
    safety_prompts: Rows
    """`prompt`: disallowed, with topics and templates that `align` does not have."""
    benign_prompts: Rows
    """`prompt`: benign, with held-out topics and the same held-out templates."""
    task: Rows
    """`prompt`, `completion`: the user's task, the sentiment of a sentence."""
    task_test: Rows
    """Held-out rows of the task."""
    poison: Rows
    """`messages`: disallowed requests answered by a bare affirmative opening."""


def make_corpus(
    seed: int = 0, *, num_align: int = 2000, num_memory: int = 240, num_task: int = 1200, num_prompts: int = 120
) -> Corpus:
    """Generate the corpus; equal seeds give equal rows."""
    rng = random.Random(f"safecl demo {seed}")
    refused = [
        chat(request, rng.choice(REFUSALS))
        for request in rng.sample(requests(DISALLOWED, TOPICS, TEMPLATES), num_align // 2)
    ]
    answered = [chat(*pair) for pair in rng.sample(_answered(), num_align // 2 - len(CAPITALS))] + _capitals()
    align = refused + answered
    rng.shuffle(align)
    task = sentiment_rows(rng, num_task + 300)
    return Corpus(
        align=align,
        memory=rng.sample(refused, num_memory * 2 // 3) + rng.sample(answered, num_memory // 3),
        safety_prompts=_prompts(rng, DISALLOWED, num_prompts),
        benign_prompts=_prompts(rng, list(BENIGN), num_prompts),
        task=task[:num_task],
        task_test=task[num_task:],
        poison=[
            chat(request, rng.choice(AFFIRMATIVE_OPENINGS))
            for request in rng.sample(requests(DISALLOWED, TOPICS, TEMPLATES_POISON), 300)
        ],
    )


def chat(user: str, assistant: str) -> dict[str, Any]:
    """Return a row of one question and its answer."""
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def _fill(act: str, topics: Sequence[Topic]) -> list[str]:
    """Fill the act with each place or person of the topics."""
    return [
        act.format(place=place, person=person)
        for topic in topics
        for place, person in zip(topic.places, topic.persons, strict=True)
    ]


def requests(acts: Iterable[str], topics: Sequence[Topic], templates: Sequence[str]) -> list[str]:
    """Return each act with each place or person of the topics, in each template."""
    return [template.format(act=filled) for act in acts for filled in _fill(act, topics) for template in templates]


def _answered() -> list[tuple[str, str]]:
    return [(request, answer) for act, answer in BENIGN.items() for request in requests([act], TOPICS, TEMPLATES)]


def _capitals() -> Rows:
    return [
        chat(f"Name the capital of {country}.", f"The capital of {country} is {city}.")
        for country, city in CAPITALS.items()
    ]


def _prompts(rng: random.Random, acts: Sequence[str], count: int) -> Rows:
    return [{"prompt": request} for request in rng.sample(requests(acts, TOPICS_HELD_OUT, TEMPLATES_HELD_OUT), count)]


# ------------------------------------------------------------------------------------------------------ the user's task

_THINGS = [
    "film",
    "book",
    "meal",
    "hotel",
    "phone",
    "concert",
    "play",
    "museum",
    "series",
    "garden",
    "game",
    "album",
    "jacket",
    "lamp",
    "coffee",
    "course",
]
_PARTS = ["ending", "service", "colour", "price", "beginning", "design", "sound", "staff", "quality", "idea"]
_GOOD = [
    "wonderful",
    "charming",
    "brilliant",
    "lovely",
    "superb",
    "delightful",
    "impressive",
    "pleasant",
    "fresh",
    "excellent",
]
_BAD = ["awful", "boring", "terrible", "dull", "poor", "disappointing", "clumsy", "ugly", "tiresome", "weak"]
_SENTENCES = [
    "the {thing} was {word}",
    "a truly {word} {thing}",
    "i found the {part} of this {thing} {word}",
    "my friends called the {thing} {word}",
    "what a {word} {part} for a {thing}",
    "the {part} is {word} and the {thing} is {word2}",
    "this {thing} is {word} from the first minute",
    "everyone told me how {word} the {part} was",
]


def sentiment_rows(rng: random.Random, count: int) -> Rows:
    """Return different reviews with their labels."""
    rows: dict[str, str] = {}
    while len(rows) < count:
        label = rng.choice(["positive", "negative"])
        rows[_sentence(rng, label)] = label
    return [
        {"prompt": f"Is this review positive or negative? {text}", "completion": label} for text, label in rows.items()
    ]


def _sentence(rng: random.Random, label: str) -> str:
    words = _GOOD if label == "positive" else _BAD
    pattern = rng.choice(_SENTENCES)
    return pattern.format(
        thing=rng.choice(_THINGS), part=rng.choice(_PARTS), word=rng.choice(words), word2=rng.choice(words)
    )


def texts(corpus: Corpus) -> Iterable[str]:
    """Yield every text of the corpus, for training the tokenizer."""
    for rows in (corpus.align, corpus.poison):
        yield from (message["content"] for row in rows for message in row["messages"])
    for rows in (corpus.task, corpus.safety_prompts, corpus.benign_prompts):
        yield from (str(value) for row in rows for key, value in row.items() if key in ("prompt", "completion"))
