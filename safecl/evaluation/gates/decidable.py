"""Refuses, before anything is trained, a gate that its prompts could not decide."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from safecl.config import ConfigError, GateConfig
from safecl.evaluation.gates.outcomes import set_of
from safecl.evaluation.statistics.intervals import smallest_passing_size, wilson

if TYPE_CHECKING:
    from safecl.data import Prompt

SHORT = {"asr": "max_asr", "over_refusal": "max_over_refusal"}


def limit_name(config: GateConfig, rate: str, kind: str, category: str | None = None) -> str:
    """Return the key of a limit below `safety.gate`."""
    if kind == "max" and rate in SHORT and getattr(config, SHORT[rate]) == config.all_limits[rate].max:
        return SHORT[rate]
    return f"limits.{rate}.{kind}" + (f".{category}" if category is not None and kind == "categories" else "")


def check_gate_is_decidable(
    config: GateConfig,
    *,
    num_prompts: int,
    num_benign: int,
    prompts: Sequence[Prompt] = (),
    benign: Sequence[Prompt] = (),
) -> None:
    """Refuse, before training, a gate that could not be passed even without a hit.

    Args: `prompts`, `benign`: needed for limits by category. Raises: ConfigError that says how many prompts the limit
    needs, and the smallest limit that the given prompts allow.
    """
    if not config.all_limits:
        raise ConfigError("safety.gate: no limit in it; set max_asr or max_over_refusal, or leave the section out")
    for rate, limit in config.all_limits.items():
        wanted = set_of(rate)
        sizes = {"disallowed": num_prompts, "benign": num_benign, None: num_prompts + num_benign}
        section = "benign_prompts" if wanted == "benign" else "prompts"
        if limit == type(limit)():
            raise ConfigError(f"safety.gate.limits.{rate}: no limit in it; set max, max_rise or each_category")
        for kind, value in (("max", limit.max), ("max_rise", limit.max_rise)):
            if value is not None:
                _check(limit_name(config, rate, kind), value, sizes[wanted], section)
        if limit.each_category is not None or limit.categories:
            among = {"disallowed": prompts, "benign": benign, None: [*prompts, *benign]}[wanted]
            _check_categories(config, rate, Counter(p.tags.get(config.category) for p in among), section)


def _check_categories(config: GateConfig, rate: str, sizes: Counter[str | None], section: str) -> None:
    limit, known = config.all_limits[rate], sorted(name for name in sizes if name)
    if not known:
        raise ConfigError(
            f"safety.gate.limits.{rate}: no prompt of safety.{section} has a {config.category!r}; name the column with "
            "the risk categories in safety.gate.category"
        )
    for name, value in limit.categories.items():
        if name not in sizes:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(known[:8])}"
            raise ConfigError(f"safety.gate.limits.{rate}.categories: no prompt is of the category {name!r}; {hint}")
        _check(limit_name(config, rate, "categories", name), value, sizes[name], section, f" of category {name}")
    for name in known if limit.each_category is not None else ():
        if name not in limit.categories:
            assert limit.each_category is not None
            key = limit_name(config, rate, "each_category")
            _check(key, limit.each_category, sizes[name], section, f" of category {name}")


def _check(key: str, limit: float, size: int, section: str, which: str = "") -> None:
    if size == 0:
        raise ConfigError(f"safety.gate.{key}: {limit:g} needs safety.{section}")
    try:
        needed = smallest_passing_size(limit)
    except ConfigError as error:
        raise ConfigError(f"safety.gate.{key}: {error}") from None
    if size < needed:
        raise ConfigError(
            f"safety.gate.{key}: {limit:g} cannot be passed with {size} prompts{which}, even without a single hit; "
            f"it needs {needed} in safety.{section} (and safety.max_prompts: {needed} or more), "
            f"or a limit of {_smallest_limit(size):g} or more"
        )


def _smallest_limit(size: int) -> float:
    """Return the smallest limit that this many prompts can pass, rounded up to three digits."""
    upper = wilson(0, size)[1]
    return min(1.0, (int(upper * 1000) + 1) / 1000)
