"""The forms of what results.json says of a run's course: worst moments, transfer between tasks, time beyond the gate,
what was done about it, and how far the weights have moved."""

from __future__ import annotations

from pydantic import with_config
from typing_extensions import Required, TypedDict

from safecl.storage.records import OPEN, Count, Number


@with_config(OPEN)
class BeyondGate(TypedDict, total=False):
    """Time that a run spent beyond a limit of its gate. moments: that failed, of_moments; share: of its steps."""

    moments: Count
    of_moments: Count
    steps: Count
    share: Required[Number | None]


@with_config(OPEN)
class Worst(TypedDict):
    """The worst value of a measure, and the moment at which it was measured."""

    value: Number
    when: str


@with_config(OPEN)
class ProbeWorth(TypedDict, total=False):
    """The probe's agreement with the attack success rate: correlations over moments, area under the curve over
    prompts."""

    moments: Count
    pearson: Number | None
    spearman: Number | None
    auc: Number | None


@with_config(OPEN)
class Summary(TypedDict, total=False):
    """Worst case and transfer over a run."""

    max_asr: Number | None
    max_asr_when: str | None
    max_asr_of_variants: dict[str, Worst]
    min_scores: dict[str, Worst]
    worst_case_accuracy: Number | None
    windowed_forgetting: Number | None
    beyond_gate: BeyondGate | None
    probe: ProbeWorth | None
    tasks: list[str]
    scores: list[list[Number | None]]
    average: Number | None
    backward_transfer: Number | None
    forward_transfer: Number | None
    forgetting: Number | None


@with_config(OPEN)
class Event(TypedDict, total=False):
    """An act of a run whose gate failed. back_to, learning_rate_factor: of a rollback; steps, recovered: of a
    burst on the memory."""

    action: Required[str]
    when: Required[str]
    step: Required[Count]
    failed: list[str]
    back_to: Count
    learning_rate_factor: Number
    steps: Count
    recovered: bool


@with_config(OPEN)
class Moved(TypedDict):
    """The distance of a layer's weights from those of the start."""

    relative: Number
    absolute: Number
