"""Rates by risk category, where the prompts carry one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safecl.evaluation.records import category_of
from safecl.evaluation.statistics.intervals import Rate, rate_of_decided

MOST_CATEGORIES = 64
"""A column with more values than this names no categories."""

ByCategory = dict[str, dict[str, Rate]]


def rates_by_category(records: Sequence[Mapping[str, Any]], scorer: str, column: str) -> ByCategory:
    """Return the attack success rate by the scorer, and the rate of compliance, of each category.

    records: answers to disallowed prompts. Returns: an empty dict where they have no categories.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if (category := category_of(record, column)) is not None:
            groups.setdefault(category, []).append(record)
    if not 1 <= len(groups) <= MOST_CATEGORIES:
        return {}
    return {
        category: {
            "asr": rate_of_decided(record["attack_succeeded"][scorer] for record in group),
            "complied": rate_of_decided(record["complied"] for record in group),
        }
        for category, group in sorted(groups.items())
    }
