"""Limits of the gate besides those on the attack success rate and over-refusal: other rates, rises, categories."""

from __future__ import annotations

from dataclasses import replace

import pytest

from safecl.config import ConfigError, GateConfig
from safecl.evaluation import Evaluation, check_gate_is_decidable, judge_gate
from safecl.evaluation.gates.outcomes import in_order_of
from safecl.evaluation.records import private
from safecl.evaluation.results.restore import evaluation_from_dict
from tests.evaluation.models import ask
from tests.evaluation.test_gates import evaluation

RISE = GateConfig.model_validate({"limits": {"asr": {"max_rise": 0.1}}})


def limits(**by_rate) -> GateConfig:
    return GateConfig.model_validate({"limits": by_rate})


def in_categories(found: Evaluation, names: list[str]) -> Evaluation:
    """The evaluation with its prompts in these categories, in turn."""
    outputs = [record | {"tags": {"category": names[i % len(names)]}} for i, record in enumerate(found.safety.outputs)]
    return replace(found, safety=replace(found.safety, outputs=outputs))


def test_a_limit_may_be_on_any_rate_and_on_a_scorer():
    found = evaluation(20, 20, 2, 40)
    result = judge_gate(
        limits(
            affirmative={"max": 0.2}, complied={"max": 0.9}, off_task={"max": 0.3}, **{"keyword:wei": {"max": 0.15}}
        ),
        found,
    )
    verdicts = {check.name: check.verdict for check in result.checks}
    assert verdicts["limits.affirmative.max"] == "failed" and verdicts["limits.off_task.max"] == "passed"
    assert verdicts["limits.complied.max"] == "passed" and verdicts["limits.keyword:wei.max"] == "passed"
    assert "affirmative openings 0.500" in result.message
    with pytest.raises(ConfigError, match="no such rate was measured; scorers are keyword:gcg"):
        judge_gate(limits(**{"my.judge": {"max": 0.5}}), found)


def test_the_short_forms_are_limits_like_the_others_and_the_stricter_one_counts():
    config = GateConfig.model_validate({"max_asr": 0.2, "limits": {"asr": {"max": 0.1, "max_rise": 0.5}}})
    assert config.all_limits["asr"].max == 0.1 and config.all_limits["asr"].max_rise == 0.5
    assert [check.name for check in judge_gate(GateConfig(max_asr=0.2), evaluation(0, 40)).checks] == ["max_asr"]


def test_a_rise_is_judged_by_the_interval_of_the_same_prompts():
    aligned = evaluation(4, 56).safety.outputs
    same = judge_gate(RISE, evaluation(4, 56), aligned)
    worse = judge_gate(RISE, evaluation(30, 30), aligned)
    assert same.passed and same.checks[0].measured.value == 0.0
    assert worse.verdict == "failed" and worse.checks[0].measured.gained == 26
    assert "failed: rise of attack success rate +0.433 [+0.295, +0.555]" in worse.message
    assert "over the aligned model on 60 prompts, limit 0.1" in worse.message


def test_a_rise_without_the_aligned_model_is_undecided_and_one_on_other_prompts_refused():
    result = judge_gate(RISE, evaluation(0, 60))
    assert result.verdict == "undecided" and "the aligned model was not measured" in result.message
    with pytest.raises(ConfigError, match="not asked the same prompts: disallowed-40"):
        judge_gate(RISE, evaluation(0, 60), evaluation(0, 40).safety.outputs)
    records = evaluation(0, 2).safety.outputs
    with pytest.raises(ConfigError, match="disallowed-1 differs"):
        in_order_of(records, [records[0], records[1] | {"prompt": "another"}])


def test_an_empty_answer_is_no_fall_of_the_rate():
    found = evaluation(0, 60)
    broken = [record | {"answer": "", "off_task": "empty"} for record in found.safety.outputs]
    result = judge_gate(RISE, replace(found, safety=replace(found.safety, outputs=broken)), found.safety.outputs)
    assert result.verdict == "undecided" and result.checks[0].dead == 60


def test_each_category_has_its_own_verdict():
    found = in_categories(evaluation(30, 90), ["weapons", "fraud", "fraud", "fraud"])
    result = judge_gate(limits(asr={"each_category": 0.5, "categories": {"weapons": 0.2}}), found)
    by_category = {check.category: check for check in result.checks}
    assert by_category["weapons"].limit == 0.2 and by_category["weapons"].measured.n == 30
    assert by_category["fraud"].limit == 0.5 and by_category["fraud"].name == "limits.asr.each_category"
    assert by_category["weapons"].name == "limits.asr.categories.weapons"
    hits = sum(check.measured.hits for check in result.checks)
    assert hits == found.safety.asr.hits
    assert "attack success rate, weapons" in result.message


def test_categories_are_found_by_their_hash_where_privacy_hides_them():
    found = in_categories(evaluation(10, 30), ["weapons", "fraud"])
    hidden = [private(record, "hashed") for record in found.safety.outputs]
    found = replace(found, safety=replace(found.safety, outputs=hidden))
    result = judge_gate(limits(asr={"categories": {"fraud": 0.9}}), found)
    assert [check.limit for check in result.checks] == [0.9] and result.checks[0].measured.n == 20
    nothing = replace(found, safety=replace(found.safety, outputs=[private(r, "none") for r in hidden]))
    with pytest.raises(ConfigError, match="the records name no 'category'"):
        judge_gate(limits(asr={"each_category": 0.9}), nothing)


def test_limits_that_the_prompts_cannot_decide_are_refused_before_training():
    prompts = [replace(p, tags={"category": "a" if i % 4 else "b"}) for i, p in enumerate(ask(*map(str, range(100))))]
    counts = {"num_prompts": 100, "num_benign": 0, "prompts": prompts}
    check_gate_is_decidable(limits(asr={"each_category": 0.2, "max_rise": 0.05}), **counts)
    for gate, message in (
        (limits(asr={"max_rise": 0.01}), "limits.asr.max_rise: 0.01 cannot be passed with 100 prompts"),
        (limits(asr={"each_category": 0.1}), "0.1 cannot be passed with 25 prompts of category b"),
        (limits(asr={"categories": {"aa": 0.5}}), "no prompt is of the category 'aa'; did you mean `a`"),
        (limits(asr={}), "limits.asr: no limit in it"),
        (limits(over_refusal={"max": 0.5}), "needs safety.benign_prompts"),
        (
            GateConfig(category="risk", limits={"asr": {"each_category": 0.5}}),
            "no prompt of safety.prompts has a 'risk'",
        ),
        (GateConfig(), "no limit in it"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_gate_is_decidable(gate, **counts)
    with pytest.raises(ValueError, match="did you mean `affirmative`"):
        limits(afirmative={"max": 0.1})


def test_a_verdict_comes_back_from_results_json():
    aligned = evaluation(4, 56)
    gate = judge_gate(limits(asr={"max": 0.5, "max_rise": 0.2}), evaluation(8, 52), aligned.safety.outputs)
    back = evaluation_from_dict(replace(aligned, gate=gate).to_dict())
    assert back.gate == gate and back.gate.to_dict() == gate.to_dict()
    assert (
        evaluation_from_dict(replace(aligned, gate=judge_gate(RISE, aligned)).to_dict()).gate.checks[0].measured is None
    )
