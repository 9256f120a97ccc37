from __future__ import annotations

import itertools
import math
from decimal import Decimal

import pytest

from safecl.evaluation.scoring.matches import (
    exact_match,
    last_number,
    reference_number,
    relaxed_match,
    rouge_l,
    strict_number,
)
from safecl.evaluation.statistics.intervals import Mean
from safecl.evaluation.task import _perplexity


@pytest.mark.parametrize(
    ("text", "strict", "last"),
    [
        ("6 * 3 = 18\n#### 18", "18", "18"),
        ("#### 1,234", "1234", "1234"),
        ("####-5", "-5", "-5"),
        ("#### $7.50 in all", "7.5", "7.5"),
        ("#### 3\n#### 4", "3", "4"),
        ("so 16-3=13.", None, "13"),
        ("from 5-10", None, "10"),
        ("it is -$12", None, "-12"),
        ("0.5", None, "0.5"),
        (".5 of it", None, "0.5"),
        ("18.0", None, "18"),
        ("the end is 1,000,000.", None, "1000000"),
        ("none", None, None),
        ("#### none, but 7", None, "7"),
        ("−4 degrees", None, "-4"),
    ],
)
def test_numbers_are_read_strictly_and_flexibly(text, strict, last):
    assert strict_number(text) == (None if strict is None else Decimal(strict))
    assert last_number(text) == (None if last is None else Decimal(last))


def test_every_gsm8k_reference_has_its_number(real_data):
    import json

    answers = [json.loads(line)["answer"] for line in (real_data / "gsm8k_test.jsonl").open(encoding="utf-8")]
    assert len(answers) == 1319
    for answer in answers:
        written = answer.split("####")[1].strip().replace(",", "")
        assert reference_number(answer) == Decimal(written) == last_number(answer)


def test_a_reference_without_the_mark_ends_on_its_last_number():
    assert reference_number("first 3, then 4") == Decimal(4)
    assert reference_number("no number") is None


def test_matches_differ_in_what_they_ignore():
    assert exact_match(" a  b\n", "a b") and not exact_match("A b", "a b")
    assert (
        relaxed_match("The Answer!", "answer") and relaxed_match("A cat’s", "cats") and not relaxed_match("dog", "cat")
    )


def longest_common(a: list[str], b: list[str]) -> int:
    """By its definition: over all subsequences of the shorter list."""
    short, long = sorted((a, b), key=len)

    def is_within(part):
        rest = iter(long)
        return all(word in rest for word in part)

    sizes = range(len(short), -1, -1)
    return next(size for size in sizes if any(map(is_within, itertools.combinations(short, size))))


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("the cat sat on the mat", "The cat is on the mat."),
        ("on the mat", "the mat on"),
        ("a b c d", "d c b a"),
        ("", "words"),
        ("...", "words"),
        ("one two", "one two"),
    ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(answer, reference):
    a, b = (text.lower().replace(".", "").split() for text in (answer, reference))
    common = longest_common(a, b)
    expected = 0.0
    if common:
        p, r = common / len(a), common / len(b)
        expected = 2 * p * r / (p + r)
    assert rouge_l(answer, reference) == pytest.approx(expected)


def test_perplexity_is_the_exponential_of_the_mean_and_of_its_ends():
    found = _perplexity(Mean(5, 50, 2.0, 1.5, 2.5))
    assert (found.value, found.low, found.high) == pytest.approx((math.exp(2.0), math.exp(1.5), math.exp(2.5)))
    assert _perplexity(Mean(1, 5, 900.0, -math.inf, math.inf)).to_dict()["value"] is None
