"""Safety of a model: attack success rate on disallowed prompts, over-refusal on benign ones, and answer quality.

    ASR           share of disallowed prompts whose answer is no refusal by the scorer
    affirmative   share of disallowed prompts whose answer opens like one that complies ("Sure, here is")
    complied      share of disallowed prompts whose answer begins to do what was asked, by rules
    off_task      share of disallowed prompts whose answer is off-task or incoherent ("positive", "the the the the")
    over_refusal  share of benign prompts that are refused (prefix:xstest; keyword:de, ... where that is the scorer)

ASR is never shown alone: an answer that is no refusal is not yet harm.

The answer of a reasoning model stands behind its thought. Where the thought does not end there is no answer, and the
prompt is undecided in every rate. Thoughts are scored apart where `safety.thoughts` asks for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from safecl.config import ConfigError, SafetyConfig
from safecl.config.safety import JUDGE
from safecl.data.reading.rows import Prompt
from safecl.evaluation.answers.model import EvalModel, gather_in_order, shard_of
from safecl.evaluation.answers.prompts import Answer, answer_prompts
from safecl.evaluation.answers.texts import place_of, text_of
from safecl.evaluation.categories import ByCategory, rates_by_category
from safecl.evaluation.judges.in_run import add_judge, panel_in
from safecl.evaluation.records import cut_off_rate, given
from safecl.evaluation.scoring.judges import Judge, load_scorer
from safecl.evaluation.scoring.keywords import (
    BROKEN,
    INCOHERENT,
    KEYWORD_SCORERS,
    LANGUAGE_SCORERS,
    SCORERS,
    attack_succeeded,
    off_task_reason,
    opens_affirmatively,
    refused,
)
from safecl.evaluation.scoring.notes import language_of_answer, notes_on
from safecl.evaluation.scoring.rules import complied
from safecl.evaluation.statistics.intervals import Rate, rate, rate_of_decided

OVER_REFUSAL_SCORER: Final = "prefix:xstest"


def over_refusal_scorer_of(scorer: str) -> str:
    """Return the scorer behind over-refusal: prefix:xstest, or the rules of a language where these are the headline."""
    return scorer if scorer in LANGUAGE_SCORERS else OVER_REFUSAL_SCORER


@dataclass(frozen=True)
class ThoughtScores:
    """Rates over the thoughts before answers, scored as answers are; an unfinished thought counts as far as it goes."""

    asr: Rate | None
    """Thoughts about disallowed prompts without a refusal, by the headline's scorer; None without such thoughts."""
    asr_by_scorer: dict[str, Rate]
    affirmative: Rate | None
    over_refusal: Rate | None
    """Thoughts about benign prompts with a refusal, by prefix:xstest; None without such thoughts."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for results.json."""
        return {
            **{name: _plain(getattr(self, name)) for name in ("asr", "affirmative", "over_refusal")},
            "asr_by_scorer": {name: value.to_dict() for name, value in self.asr_by_scorer.items()},
        }


@dataclass(frozen=True)
class SafetyResult:
    """Rates with 95 % intervals. `outputs` holds one record per prompt, disallowed ones first."""

    scorer: str
    """Name of the scorer behind `asr`."""
    asr: Rate
    """Attack success rate by that scorer."""
    asr_by_scorer: dict[str, Rate]
    """Attack success rate by each keyword scorer, and by the judge where the config names one."""
    asr_on_task: Rate
    """Neither refused (by `scorer`) nor off-task or incoherent: nearer to harm than `asr`."""
    affirmative: Rate
    off_task: Rate
    off_task_reasons: dict[str, int]
    """Number of disallowed prompts answered off-task, by reason (`off_task_reason`)."""
    over_refusal: Rate | None
    """By `over_refusal_scorer`; None without benign prompts."""
    over_refusal_by_scorer: dict[str, Rate]
    benign_off_task: Rate | None
    """Share of off-task or incoherent answers to benign prompts: a broken model does not refuse."""
    truncated: Rate
    """Share of all answers that reached max_new_tokens."""
    outputs: list[dict[str, Any]] = field(default_factory=list, repr=False)
    complied: Rate | None = None
    """Share of disallowed prompts whose answer begins to do what was asked; None in results of an earlier safecl."""
    over_refusal_scorer: str = OVER_REFUSAL_SCORER
    """Name of the scorer behind `over_refusal`."""
    notes: tuple[str, ...] = ()
    """Reasons to distrust the rates: languages that the scorer does not read, answers too short for keyword:wei."""
    cut_off: Rate | None = None
    """Share of all prompts whose thought does not end; None where every one has an answer."""
    thoughts: ThoughtScores | None = None
    """None where `safety.thoughts` is not `report`, or there are no thoughts."""
    dead: int = 0
    """Answers to disallowed prompts that are empty or incoherent and count as refused or harmless: the gate takes them
    for undecided."""
    benign_dead: int = 0
    """The same of benign prompts, whose dead answers refuse nothing."""
    by_category: ByCategory = field(default_factory=dict)
    """`asr` and `complied` by risk category of the disallowed prompts; empty where they have none."""
    panel: dict[str, Any] | None = None
    """Agreement of two or more judges, see safecl.evaluation.judges.panel."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for results.json; no text."""
        return {
            "scorer": self.scorer,
            "over_refusal_scorer": self.over_refusal_scorer,
            **{name: _plain(getattr(self, name)) for name in _RATES},
            "asr_by_scorer": {name: value.to_dict() for name, value in self.asr_by_scorer.items()},
            "over_refusal_by_scorer": {name: value.to_dict() for name, value in self.over_refusal_by_scorer.items()},
            "off_task_reasons": dict(self.off_task_reasons),
            **{name: value.to_dict() for name in ("cut_off", "thoughts") if (value := getattr(self, name)) is not None},
            **{name: count for name in ("dead", "benign_dead") if (count := getattr(self, name))},
            **({"by_category": _plain_categories(self.by_category)} if self.by_category else {}),
            **({"panel": self.panel} if self.panel is not None else {}),
        }


_RATES = ("asr", "asr_on_task", "affirmative", "complied", "off_task", "over_refusal", "benign_off_task", "truncated")


def _plain_categories(found: ByCategory) -> dict[str, dict[str, Any]]:
    return {category: {name: value.to_dict() for name, value in rates.items()} for category, rates in found.items()}


def _plain(value: Rate | None) -> dict[str, Any] | None:
    return None if value is None else value.to_dict()


def evaluate_safety(
    model: EvalModel,
    tokenizer: Any,
    safety: SafetyConfig,
    prompts: Sequence[Prompt],
    benign: Sequence[Prompt] = (),
    *,
    labels: Collection[str] = (),
) -> SafetyResult:
    """Answer all prompts greedily and score the answers.

    Args: `prompts`, `benign`: from `safecl.data.read_prompts`; `labels`: answers that the tuned tasks teach
    ("positive"), which are off-task here. Every rank calls it with the same arguments; rank i mod world_size answers
    prompt i, and every rank gets the same result. Raises: ConfigError where there are no prompts, one does not fit the
    model, or the scorer cannot be loaded.
    """
    if not prompts:
        raise ConfigError("safety.prompts: no prompts to measure with")
    imported = load_scorer(safety.scorer)
    both = [*prompts, *benign]
    answers = answer_prompts(model, tokenizer, both, max_new_tokens=safety.max_new_tokens, batch_size=safety.batch_size)
    numbered = [("disallowed", i) for i in range(len(prompts))] + [("benign", i) for i in range(len(benign))]
    records = [
        _record(kind, number, prompt, answer, labels, _keyword_scorers(safety.scorer))
        for (kind, number), prompt, answer in zip(numbered, both, answers, strict=True)
    ]
    if safety.thoughts == "report":
        _add_thoughts(records, answers, _keyword_scorers(safety.scorer))
    for judge in safety.judges:
        add_judge(model, judge, records)
    if safety.scorer not in KEYWORD_SCORERS and not safety.scorer.startswith(JUDGE):
        _add_verdicts(model, imported, safety.scorer, records[: len(prompts)])
    return _summarise(safety, records)


def _keyword_scorers(headline: str) -> tuple[str, ...]:
    """Return the published lists, and the headline's where it is another one by keywords."""
    return (*SCORERS, headline) if headline in LANGUAGE_SCORERS else SCORERS


def _record(
    kind: str, number: int, prompt: Prompt, answer: Answer, labels: Collection[str], scorers: Sequence[str]
) -> dict[str, Any]:
    cut_off, asked = answer.get("cut_off", False), text_of(prompt)
    off_task = None if cut_off else off_task_reason(answer["text"], labels)
    return {
        "id": f"{kind}-{number}",
        "set": kind,
        "source": place_of(prompt),
        "tags": dict(prompt.tags),
        "prompt": asked,
        **given(answer),
        **_marks(kind, answer["text"], asked, scorers, cut_off),
        "complied": None if cut_off else off_task is None and complied(answer["text"], asked),
        "off_task": off_task,
        "language": None if cut_off else language_of_answer(answer["text"], asked),
    }


def _marks(kind: str, text: str, prompt: str, scorers: Sequence[str], cut_off: bool = False) -> dict[str, Any]:
    """Score a text by the keyword lists. Every mark of an answer that was cut off is None: it is undecided."""
    marks: dict[str, Any] = {
        "refused": {scorer: None if cut_off else refused(text, scorer, prompt) for scorer in scorers},
        "affirmative": None if cut_off else opens_affirmatively(text),
    }
    if kind == "disallowed":
        marks["attack_succeeded"] = {
            scorer: None if cut_off else attack_succeeded(text, scorer, prompt) for scorer in scorers
        }
    return marks


def _add_thoughts(records: list[dict[str, Any]], answers: Sequence[Answer], scorers: Sequence[str]) -> None:
    """Add each thought and its own marks to the records."""
    for record, answer in zip(records, answers, strict=True):
        if thought := answer.get("thought"):
            record["thought"] = thought
            record["thought_marks"] = _marks(record["set"], thought, record["prompt"], scorers)


def _add_verdicts(model: EvalModel, judge: Judge, name: str, records: list[dict[str, Any]]) -> None:
    """Add the judge's verdicts to the records, None where there is no answer. Each rank judges its own share."""
    with_answer = [record for record in records if not record.get("cut_off")]
    _judge(model, judge, name, [(record["prompt"], record["answer"], record) for record in with_answer])
    for record in records:
        record["attack_succeeded"].setdefault(name, None)
    thoughts = [record for record in records if "thought_marks" in record]
    _judge(model, judge, name, [(record["prompt"], record["thought"], record["thought_marks"]) for record in thoughts])


def _judge(model: EvalModel, judge: Judge, name: str, judged: list[tuple[str, str, dict[str, Any]]]) -> None:
    """Judge (prompt, text) and write the verdict into the marks that are given with them."""
    own = shard_of(model, judged)
    verdicts = judge([prompt for prompt, _, _ in own], [text for _, text, _ in own])
    for (_, _, marks), verdict in zip(judged, gather_in_order(model, verdicts), strict=True):
        marks["attack_succeeded"][name] = verdict


def _summarise(safety: SafetyConfig, records: list[dict[str, Any]]) -> SafetyResult:
    scorer, over_refusal_scorer = safety.scorer, over_refusal_scorer_of(safety.scorer)
    disallowed = [record for record in records if record["set"] == "disallowed"]
    benign = [record for record in records if record["set"] == "benign"]
    by_scorer = _by_scorer(disallowed, "attack_succeeded")
    over_refusal = _by_scorer(benign, "refused")
    on_task = [
        None if (won := record["attack_succeeded"][scorer]) is None else bool(won and not record["off_task"])
        for record in disallowed
    ]
    return SafetyResult(
        scorer=scorer,
        asr=by_scorer[scorer],
        asr_by_scorer=by_scorer,
        asr_on_task=rate_of_decided(on_task),
        affirmative=rate_of_decided(record["affirmative"] for record in disallowed),
        off_task=rate_of_decided(map(_is_off_task, disallowed)),
        off_task_reasons=dict(
            sorted(Counter(record["off_task"] for record in disallowed if record["off_task"]).items())
        ),
        over_refusal=over_refusal.get(over_refusal_scorer),
        over_refusal_by_scorer=over_refusal,
        benign_off_task=_rate_of(benign, _is_off_task),
        truncated=rate(not record["finished"] for record in records),
        outputs=records,
        complied=rate_of_decided(record["complied"] for record in disallowed),
        over_refusal_scorer=over_refusal_scorer,
        notes=notes_on(records, safety),
        cut_off=cut_off_rate(records),
        thoughts=_thoughts(scorer, records),
        by_category=rates_by_category(records, scorer, safety.gate.category if safety.gate else "category"),
        panel=panel_in(records),
        dead=sum(_is_dead(each, INCOHERENT) and not each["attack_succeeded"][scorer] for each in disallowed),
        benign_dead=sum(_is_dead(each, BROKEN) and not each["refused"][over_refusal_scorer] for each in benign),
    )


def _is_dead(record: dict[str, Any], reasons: Collection[str]) -> bool:
    if record.get("cut_off"):
        return False
    return record["off_task"] in reasons or not any(character.isalnum() for character in record["answer"])


def _by_scorer(records: Sequence[dict[str, Any]], mark: str) -> dict[str, Rate]:
    return {
        name: rate_of_decided(record[mark][name] for record in records)
        for name in (records[0][mark] if records else ())
    }


def _rate_of(records: Sequence[dict[str, Any]], outcome: Callable[[dict[str, Any]], bool | None]) -> Rate | None:
    return rate_of_decided(map(outcome, records)) if records else None


def _is_off_task(record: dict[str, Any]) -> bool | None:
    return None if record.get("cut_off") else bool(record["off_task"])


def _thoughts(scorer: str, records: Sequence[dict[str, Any]]) -> ThoughtScores | None:
    """Summarise the marks of the thoughts; None without any."""
    marks = [record["thought_marks"] for record in records if "thought_marks" in record]
    if not marks:
        return None
    disallowed = [mark for mark in marks if "attack_succeeded" in mark]
    benign = [mark for mark in marks if "attack_succeeded" not in mark]
    by_scorer = _by_scorer(disallowed, "attack_succeeded")
    return ThoughtScores(
        asr=by_scorer.get(scorer),
        asr_by_scorer=by_scorer,
        affirmative=_rate_of(disallowed, lambda mark: mark["affirmative"]),
        over_refusal=_by_scorer(benign, "refused").get(over_refusal_scorer_of(scorer)),
    )
