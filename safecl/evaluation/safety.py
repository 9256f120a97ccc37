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
from dataclasses import replace
from typing import Any

from safecl.config import ConfigError, SafetyConfig
from safecl.config.safety import JUDGE
from safecl.config.variants import VariantConfig
from safecl.data.reading.rows import Prompt
from safecl.evaluation.answers.model import EvalModel, gather_in_order, shard_of
from safecl.evaluation.answers.prompts import Answer, answer_prompts
from safecl.evaluation.answers.texts import place_of, text_of
from safecl.evaluation.categories import rates_by_category
from safecl.evaluation.judges.in_run import add_judge, panel_in
from safecl.evaluation.records import cut_off_rate, given, is_disallowed, whole_answer
from safecl.evaluation.results.safety import OVER_REFUSAL_SCORER, SafetyResult, ThoughtScores
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
from safecl.evaluation.variants import asked_in, prefills_of


def over_refusal_scorer_of(scorer: str) -> str:
    """Return the scorer behind over-refusal: prefix:xstest, or the rules of a language where these are the headline."""
    return scorer if scorer in LANGUAGE_SCORERS else OVER_REFUSAL_SCORER


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
    records = _ask(model, tokenizer, safety, prompts, benign, labels)
    for variant in safety.variants:
        asked = asked_in(variant, safety, prompts, benign)
        records += _ask(model, tokenizer, safety, asked[: len(prompts)], asked[len(prompts) :], labels, variant)
    for judge in safety.judges:
        add_judge(model, judge, records)
    if safety.scorer not in KEYWORD_SCORERS and not safety.scorer.startswith(JUDGE):
        _add_verdicts(model, imported, safety.scorer, [record for record in records if is_disallowed(record)])
    variants = {variant.title: _summarise(safety, records, f"{variant.title}/") for variant in safety.variants}
    return replace(_summarise(safety, records), outputs=records, variants=variants)


def _ask(
    model: EvalModel,
    tokenizer: Any,
    safety: SafetyConfig,
    prompts: Sequence[Prompt],
    benign: Sequence[Prompt],
    labels: Collection[str],
    variant: VariantConfig | None = None,
) -> list[dict[str, Any]]:
    """Put all prompts to the model and return the records of the answers, scored by keywords."""
    both, scorers = [*prompts, *benign], _keyword_scorers(safety.scorer)
    prefills = prefills_of(variant, tokenizer, both) if variant is not None else None
    answers = answer_prompts(
        model,
        tokenizer,
        both,
        max_new_tokens=safety.max_new_tokens,
        batch_size=safety.batch_size,
        prefills=prefills,
    )
    before = "" if variant is None else f"{variant.title}/"
    numbered = [("disallowed", i) for i in range(len(prompts))] + [("benign", i) for i in range(len(benign))]
    records = [
        _record(f"{before}{kind}", number, prompt, answer, labels, scorers)
        for (kind, number), prompt, answer in zip(numbered, both, answers, strict=True)
    ]
    if safety.thoughts == "report":
        _add_thoughts(records, answers, scorers)
    return records


def _keyword_scorers(headline: str) -> tuple[str, ...]:
    """Return the published lists, and the headline's where it is another one by keywords."""
    return (*SCORERS, headline) if headline in LANGUAGE_SCORERS else SCORERS


def _record(
    kind: str, number: int, prompt: Prompt, answer: Answer, labels: Collection[str], scorers: Sequence[str]
) -> dict[str, Any]:
    cut_off, asked, text = answer.get("cut_off", False), text_of(prompt), answer["text"]
    off_task = None if cut_off else off_task_reason(text, labels)
    # behind a prefill the answer has begun to comply already
    complies = not refused(text, "keyword:auto", asked) if answer.get("prefill") else complied(text, asked)
    return {
        "id": f"{kind}-{number}",
        "set": kind,
        "source": place_of(prompt),
        "tags": dict(prompt.tags),
        "prompt": asked,
        **given(answer),
        **_marks(kind, text, asked, scorers, cut_off),
        "complied": None if cut_off else off_task is None and complies,
        "off_task": off_task,
        "language": None if cut_off else language_of_answer(text, asked),
    }


def _marks(kind: str, text: str, prompt: str, scorers: Sequence[str], cut_off: bool = False) -> dict[str, Any]:
    """Score a text by the keyword lists. Every mark of an answer that was cut off is None: it is undecided."""
    marks: dict[str, Any] = {
        "refused": {scorer: None if cut_off else refused(text, scorer, prompt) for scorer in scorers},
        "affirmative": None if cut_off else opens_affirmatively(text),
    }
    if kind.endswith("disallowed"):
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
    _judge(model, judge, name, [(record["prompt"], whole_answer(record), record) for record in with_answer])
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


def _summarise(safety: SafetyConfig, every: Sequence[dict[str, Any]], before: str = "") -> SafetyResult:
    """Sum up the records of a variant, whose sets begin with `before`, or the plain ones."""
    scorer, over_refusal_scorer = safety.scorer, over_refusal_scorer_of(safety.scorer)
    disallowed = [record for record in every if record["set"] == f"{before}disallowed"]
    benign = [record for record in every if record["set"] == f"{before}benign"]
    records = [*disallowed, *benign]
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
        complied=rate_of_decided(record["complied"] for record in disallowed),
        over_refusal_scorer=over_refusal_scorer,
        notes=notes_on(disallowed + benign, safety) if not before else (),
        cut_off=cut_off_rate(records),
        thoughts=_thoughts(scorer, records),
        by_category=rates_by_category(disallowed, scorer, safety.gate.category if safety.gate else "category"),
        panel=panel_in(disallowed),
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
