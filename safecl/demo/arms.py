"""The arms of the demonstration: the ways to fine-tune the aligned model that it compares. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune the aligned model. All arms see the same rows in the same order and make the same number of
    steps."""

    name: str
    """Name of the folder and of the config file."""
    title: str
    """Name in the table."""
    methods: dict[str, dict[str, Any]] | str
    """As in a run config; empty for plain fine-tuning."""
    poison: float = 0.0
    """Share of the task's rows that are poisoned."""


EMA = {"ema": {"horizon": 0.1}}
EWC = {"ewc": {"strength": 10.0, "sign_batches": 64, "rows_per_batch": 8}}
DER = {"der": {"alpha": 2.0, "beta": 1.0}}

PLAIN, KEPT = "plain", "der"
"""The arms that the verdict compares."""

ARMS = [
    Arm(PLAIN, "plain fine-tuning", {}),
    Arm("ewc-ema", "EWC + EMA", EWC | EMA),
    Arm(KEPT, "DER", DER),
]

EVERY_ARM = [
    ARMS[0],
    Arm("ema", "EMA", EMA),
    Arm("psmt", "PSMT", {"psmt": {"horizon": 0.1, "protected": 0.1, "sign_batches": 64, "rows_per_batch": 8}}),
    Arm("l2-sp", "L2-SP", {"l2_sp": {"strength": 0.1}}),
    Arm("l2-sp-attention", "L2-SP, attention", {"l2_sp": {"strength": 0.1, "modules": "attention"}}),
    Arm("ewc", "EWC", EWC),
    Arm("online-ewc", "online EWC", {"online_ewc": EWC["ewc"] | {"rows": "memory"}}),
    ARMS[1],
    Arm("lwf-hidden", "LwF, hidden", {"lwf": {"form": "hidden", "weight": 1.0}}),
    Arm("lwf-output", "LwF, output", {"lwf": {"form": "output", "weight": 1.0}}),
    Arm("agem", "A-GEM", {"agem": {}}),
    Arm("er", "ER", {"er": {"weight": 1.0}}),
    ARMS[2],
    Arm("derpp", "DER++", {"derpp": {"alpha": 2.0, "beta": 1.0}}),
    Arm("der-ewc-ema", "DER + EWC + EMA", DER | EWC | EMA),
]
"""Ten methods alone, one of them in two more forms, and two combinations."""

PRETRAINED_ARMS = [
    ARMS[0],
    Arm("balanced", "preset balanced", "balanced"),
    Arm("strict", "preset strict", "strict"),
]
"""Arms of the demonstration on a pretrained model."""

POISON = 0.1


def poisoned(arms: list[Arm], share: float = POISON) -> list[Arm]:
    """Return the same arms with a share of poisoned rows."""
    return [replace(arm, name=f"{arm.name}-poisoned", poison=share) for arm in arms]
