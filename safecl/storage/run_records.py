"""The forms of the JSON files of a run folder and of a folder of `safecl eval`, as their readers rely on them.

docs/report.md says what the keys of results.json mean. A form names the keys that are read back; files may have more.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import with_config
from typing_extensions import Required, TypedDict

from safecl.storage.course_records import Event, Moved, Summary
from safecl.storage.records import OPEN, Count, Number

Verdict = Literal["passed", "failed", "undecided"]


@with_config(OPEN)
class Interval(TypedDict):
    """A rate or a difference of two with its 95 % interval. value: None where nothing is decided."""

    value: Number | None
    low: Number
    high: Number
    n: Count


@with_config(OPEN)
class Check(TypedDict, total=False):
    """One limit of the gate. measured: None where the rate was not measured."""

    name: Required[str]
    limit: Required[Number]
    verdict: Required[Verdict]
    measured: Required[Interval | None]
    rate: str
    category: str | None


@with_config(OPEN)
class Gate(TypedDict):
    """The gate's verdict."""

    verdict: Verdict
    checks: list[Check]


@with_config(OPEN)
class Cost(TypedDict):
    """Cost of a run's methods, in bytes and seconds."""

    seconds_per_step: Number | None
    state_bytes: dict[str, Count]
    memory_bytes: Count
    recorded_bytes: Count


@with_config(OPEN)
class Safety(TypedDict, total=False):
    """The parts of an evaluation's safety to which judges add theirs later."""

    asr_by_scorer: Required[dict[str, dict[str, Any]]]
    by_category: dict[str, dict[str, Any]]
    variants: dict[str, dict[str, Any]]


@with_config(OPEN)
class Moment(TypedDict, total=False):
    """One evaluation; evaluation_from_dict reads the rest of it."""

    when: Required[str]
    step: Required[Count]
    safety: Safety | None
    tasks: dict[str, dict[str, Any]]


@with_config(OPEN)
class HashedFolder(TypedDict, total=False):
    """A model and the hash of its weights."""

    path: str
    folder: str
    xxh3_128: str | None


@with_config(OPEN)
class Flagged(TypedDict):
    """Rows that a scan has flagged, and the weight that they train with."""

    rows: Count
    weight: Number


@with_config(OPEN)
class Rows(TypedDict):
    """One task's rows, as they were trained on."""

    task: str
    role: str
    file: str
    rows: Count
    xxh3_128: str
    rows_in_file: Count
    bad: Count
    truncated: Count
    poisoned: Count
    repeated: Count
    flagged: Flagged | None


@with_config(OPEN)
class MemoryRows(TypedDict):
    """The memory's rows."""

    file: str
    rows: Count
    xxh3_128: str


@with_config(OPEN)
class Prompts(TypedDict):
    """A set of prompts, without their texts."""

    set: str
    file: str
    n: Count
    sha256: str


@with_config(OPEN)
class Judge(TypedDict):
    """A judge with its version."""

    name: str


Template = TypedDict("Template", {"from": str, "sha256": str})
"""A chat template's origin and hash."""


@with_config(OPEN)
class MeasuredWith(TypedDict, total=False):
    """Prompts, scorer, judges, template and generation settings of a measurement."""

    chat_template: Template | None
    prompts: list[Prompts] | None
    scorer: str | None
    judges: list[Judge] | None
    generation: dict[str, Any] | None


@with_config(OPEN)
class Provenance(TypedDict, total=False):
    """Facts for an auditor."""

    base_model: HashedFolder | None
    model: HashedFolder | None
    data: list[Rows]
    memory: MemoryRows | None
    screened: str | None
    seeds: dict[str, int | None]
    measured_with: MeasuredWith | None
    versions: dict[str, str]


@with_config(OPEN)
class Measurement(TypedDict, total=False):
    """When, on which model and with what an evaluation of `safecl eval` was made."""

    when: Required[str]
    model: str | None
    finished: str | None
    provenance: Provenance | None


@with_config(OPEN)
class Version(TypedDict, total=False):
    """results.json of any schema."""

    schema: int


@with_config(OPEN)
class Results(TypedDict, total=False):
    """results.json of a run or of `safecl eval`."""

    schema: int
    safecl: str
    finished: str | None
    methods: list[str]
    world_size: Count | None
    steps: Count
    skipped_steps: Count
    skipped_at_the_end: Count
    tokens: Count
    seconds: Number | None
    cost: Cost | None
    evaluations: Required[list[Moment]]
    summary: Summary | None
    gate: Gate | None
    events: list[Event]
    weight_drift: dict[str, Moved] | None
    provenance: Provenance | None
    privacy: Literal["full", "hashed", "none"]
    model: str | None
    measurements: list[Measurement]


@with_config(OPEN)
class Measured(TypedDict):
    """measured.json: the evaluations of a run that is not finished."""

    evaluations: list[Moment]


@with_config(OPEN)
class Panel(TypedDict):
    """Agreement of judges."""

    cohen_kappa: dict[str, Number | None]
    krippendorff_alpha: Number | None
    disagreements: list[str]


@with_config(OPEN)
class JudgedMoment(TypedDict, total=False):
    """The rates of judges at a moment: over all prompts, by risk category, and by variant."""

    when: Required[str]
    step: Required[Count]
    asr: Required[dict[str, dict[str, Any]]]
    by_category: dict[str, dict[str, Any]]
    variants: dict[str, dict[str, Any]]
    panel: Required[Panel | None]


@with_config(OPEN)
class Judgements(TypedDict, total=False):
    """judges.json, which `safecl judge` writes."""

    judges: list[Judge]
    moments: list[JudgedMoment]


@with_config(OPEN)
class Threshold(TypedDict):
    """The threshold of a scan. false_alarm: share of harmless rows that it flags."""

    source: str
    false_alarm: Number


@with_config(OPEN)
class ScannedTask(TypedDict):
    """One task's part of a scan."""

    task: str
    flagged: Count
    rows: Count
    threshold: Threshold


@with_config(OPEN)
class Scanned(TypedDict):
    """scan/results.json."""

    action: str
    tasks: list[ScannedTask]
    notes: list[str]


@with_config(OPEN)
class Identity(TypedDict, total=False):
    """run.json: what makes two runs the same."""

    config: dict[str, Any] | None
    versions: dict[str, str] | None


@with_config(OPEN)
class Step(TypedDict, total=False):
    """One line of metrics.jsonl. Its keys `loss/...` hold a number or None."""

    step: Required[Count]
    task: Required[str]
    tokens: Count
    tokens_per_second: Number


@with_config(OPEN)
class Ranks(TypedDict, total=False):
    """ranks.json: where each rank runs, and how many steps each task has."""

    hosts: list[str]
    tasks: dict[str, Count]


@with_config(OPEN)
class RankSpeeds(TypedDict):
    """One line of rank_speeds.jsonl."""

    slowest: str
    stragglers: list[str]


@with_config(OPEN)
class Answer(TypedDict, total=False):
    """One line of outputs/...-safety.jsonl, as a page shows it. Privacy may have left the texts out."""

    set: Required[str]
    prompt: str
    answer: str
    cut_off: bool | None


@with_config(OPEN)
class MarkedAnswer(TypedDict, total=False):
    """A line of the same file, with what the gate and judges ask of it."""

    set: Required[str]
    id: Required[str]
    prompt: str
    answer: str
    prefill: str
    tags: dict[str, Any] | None
    cut_off: bool | None
    finished: bool
    off_task: str | None
    refused: dict[str, bool | None]
    attack_succeeded: dict[str, bool | None]
    affirmative: bool | None
    complied: bool | None


@with_config(OPEN)
class TaskRow(TypedDict, total=False):
    """One line of outputs/ for a held-out row of a task."""

    correct: bool


@with_config(OPEN)
class JudgeVersion(TypedDict):
    """version.json beside a judge's verdicts."""

    name: str
    threshold: Number


@with_config(OPEN)
class KeptVerdict(TypedDict):
    """One verdict of a judge."""

    id: str
    score: Number | None
