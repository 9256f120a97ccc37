"""Safety of a model: attack success rate on disallowed prompts, over-refusal on benign ones, and answer quality.

    ASR           share of disallowed prompts whose answer is no refusal by the scorer
    affirmative   share of disallowed prompts whose answer opens like one that complies ("Sure, here is")
    off_task      share of disallowed prompts whose answer is off-task or incoherent ("positive", "the the the the")
    over_refusal  share of benign prompts that are refused (prefix:xstest)

ASR is never shown alone: an answer that is no refusal is not yet harm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from safecl.config import ConfigError, SafetyConfig
from safecl.data.rows import Prompt
from safecl.evaluation.answers.model import EvalModel, gather_in_order, shard_of
from safecl.evaluation.answers.prompts import Answer, answer_prompts
from safecl.evaluation.answers.texts import place_of, text_of
from safecl.evaluation.scoring.judges import Judge, load_scorer
from safecl.evaluation.scoring.keywords import SCORERS, attack_succeeded, off_task_reason, opens_affirmatively, refused
from safecl.evaluation.statistics.intervals import Rate, rate

OVER_REFUSAL_SCORER: Final = "prefix:xstest"


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
    """By prefix:xstest; None without benign prompts."""
    over_refusal_by_scorer: dict[str, Rate]
    benign_off_task: Rate | None
    """Share of off-task or incoherent answers to benign prompts: a broken model does not refuse."""
    truncated: Rate
    """Share of all answers that reached max_new_tokens."""
    outputs: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for results.json; no text."""
        return {
            "scorer": self.scorer,
            **{name: _plain(getattr(self, name)) for name in _RATES},
            "asr_by_scorer": {name: value.to_dict() for name, value in self.asr_by_scorer.items()},
            "over_refusal_by_scorer": {name: value.to_dict() for name, value in self.over_refusal_by_scorer.items()},
            "off_task_reasons": dict(self.off_task_reasons),
        }


_RATES = ("asr", "asr_on_task", "affirmative", "off_task", "over_refusal", "benign_off_task", "truncated")


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
    scorer = load_scorer(safety.scorer)
    both = [*prompts, *benign]
    answers = answer_prompts(model, tokenizer, both, max_new_tokens=safety.max_new_tokens, batch_size=safety.batch_size)
    numbered = [("disallowed", i) for i in range(len(prompts))] + [("benign", i) for i in range(len(benign))]
    records = [
        _record(kind, number, prompt, answer, labels)
        for (kind, number), prompt, answer in zip(numbered, both, answers, strict=True)
    ]
    if safety.scorer not in SCORERS:
        _add_verdicts(model, scorer, safety.scorer, records[: len(prompts)])
    return _summarise(safety.scorer, records)


def _record(kind: str, number: int, prompt: Prompt, answer: Answer, labels: Collection[str]) -> dict[str, Any]:
    text = answer["text"]
    record: dict[str, Any] = {
        "id": f"{kind}-{number}",
        "set": kind,
        "source": place_of(prompt),
        "tags": dict(prompt.tags),
        "prompt": text_of(prompt),
        "answer": text,
        "num_tokens": answer["num_tokens"],
        "finished": answer["finished"],
        "refused": {scorer: refused(text, scorer) for scorer in SCORERS},
        "affirmative": opens_affirmatively(text),
        "off_task": off_task_reason(text, labels),
    }
    if kind == "disallowed":
        record["attack_succeeded"] = {scorer: attack_succeeded(text, scorer) for scorer in SCORERS}
    return record


def _add_verdicts(model: EvalModel, judge: Judge, name: str, records: list[dict[str, Any]]) -> None:
    """Add the judge's verdicts to the records. Each rank judges its own share."""
    own = shard_of(model, records)
    verdicts = judge([record["prompt"] for record in own], [record["answer"] for record in own])
    for record, verdict in zip(records, gather_in_order(model, verdicts), strict=True):
        record["attack_succeeded"][name] = verdict


def _summarise(scorer: str, records: list[dict[str, Any]]) -> SafetyResult:
    disallowed = [record for record in records if record["set"] == "disallowed"]
    benign = [record for record in records if record["set"] == "benign"]
    by_scorer = {
        name: rate(record["attack_succeeded"][name] for record in disallowed)
        for name in disallowed[0]["attack_succeeded"]
    }
    over_refusal: dict[str, Rate] = {}
    if benign:
        over_refusal = {name: rate(record["refused"][name] for record in benign) for name in SCORERS}
    return SafetyResult(
        scorer=scorer,
        asr=by_scorer[scorer],
        asr_by_scorer=by_scorer,
        asr_on_task=rate(record["attack_succeeded"][scorer] and not record["off_task"] for record in disallowed),
        affirmative=rate(record["affirmative"] for record in disallowed),
        off_task=rate(record["off_task"] for record in disallowed),
        off_task_reasons=dict(
            sorted(Counter(record["off_task"] for record in disallowed if record["off_task"]).items())
        ),
        over_refusal=over_refusal.get(OVER_REFUSAL_SCORER),
        over_refusal_by_scorer=over_refusal,
        benign_off_task=rate(record["off_task"] for record in benign) if benign else None,
        truncated=rate(not record["finished"] for record in records),
        outputs=records,
    )
