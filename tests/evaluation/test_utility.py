from __future__ import annotations

from decimal import Decimal

import pytest

from safecl.evaluation.scoring.matches import exact_match, last_number, reference_number, relaxed_match, strict_number


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
