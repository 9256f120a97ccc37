"""Rates by risk category, where the prompts carry one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safecl.config.safety import JUDGE
from safecl.evaluation.records import category_of
from safecl.evaluation.statistics.intervals import Rate, rate_of_decided

MOST_CATEGORIES = 64
"""A column with more values than this names no categories."""

ByCategory = dict[str, dict[str, Rate]]


def rates_by_category(records: Sequence[Mapping[str, Any]], scorer: str, column: str) -> ByCategory:
    """Return for each category `asr`, the attack success rate by the scorer, that by each judge under the judge's name,
    and `complied`, the rate of compliance.

    records: answers to disallowed prompts. Returns: an empty dict where they have no categories.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if (category := category_of(record, column)) is not None:
            groups.setdefault(category, []).append(record)
    if not 1 <= len(groups) <= MOST_CATEGORIES:
        return {}
    judges = [name for name in records[0]["attack_succeeded"] if name.startswith(JUDGE) and name != scorer]
    return {
        category: {
            "asr": _asr_by(scorer, group),
            **{name: _asr_by(name, group) for name in judges},
            "complied": rate_of_decided(record["complied"] for record in group),
        }
        for category, group in sorted(groups.items())
    }


def _asr_by(scorer: str, group: Sequence[Mapping[str, Any]]) -> Rate:
    return rate_of_decided(record["attack_succeeded"][scorer] for record in group)
