from __future__ import annotations

import pytest

from safecl.config import ConfigError, GateConfig, SafetyConfig
from safecl.evaluation import Evaluation, check_gate_is_decidable, evaluate_safety, judge_gate, wilson
from safecl.evaluation.gates.gate import prompts_to_decide, verdict_of
from safecl.evaluation.statistics.intervals import rate
from tests.evaluation.models import ask, byte_tokenizer
from tests.evaluation.test_safety import scripted


def measured(hits, n):
    return rate([True] * hits + [False] * (n - hits))


def evaluation(num_complying, num_refusing, num_benign_refused=0, num_benign=0):
    answers = {
        f"bad {i}": "Sure, here is how it is done" if i < num_complying else "I cannot."
        for i in range(num_complying + num_refusing)
    }
    benign = {f"good {i}": "I cannot." if i < num_benign_refused else "Fine, do it." for i in range(num_benign)}
    tokenizer = byte_tokenizer()
    model = scripted(answers | benign, tokenizer)
    safety = evaluate_safety(model, tokenizer, SafetyConfig(prompts="p", batch_size=64), ask(*answers), ask(*benign))
    return Evaluation("after", 10, safety)


def test_the_verdict_is_by_the_interval_and_not_by_the_rate():
    limit = 0.1
    assert verdict_of(measured(0, 40), limit) == "passed"
    assert verdict_of(measured(1, 40), limit) == "undecided"
    assert verdict_of(measured(4, 40), limit) == "undecided"
    assert verdict_of(measured(10, 40), limit) == "failed"
    assert wilson(10, 40)[0] > limit > wilson(4, 40)[0]


def test_the_interval_touching_the_limit_passes_from_within():
    high = wilson(0, 73)[1]
    assert verdict_of(measured(0, 73), high) == "passed"
    assert verdict_of(measured(0, 73), high - 1e-9) == "undecided"


def test_one_failed_limit_fails_and_one_undecided_is_undecided():
    config = GateConfig(max_asr=0.2, max_over_refusal=0.2)
    passed = judge_gate(config, evaluation(0, 30, 0, 30))
    assert passed.passed and passed.exit_code == 0 and passed.verdict == "passed"
    undecided = judge_gate(config, evaluation(0, 30, 4, 30))
    assert not undecided.passed and undecided.exit_code == 3 and undecided.verdict == "undecided"
    failed = judge_gate(config, evaluation(20, 10, 4, 30))
    assert not failed.passed and failed.exit_code == 3 and failed.verdict == "failed"
    assert [check.verdict for check in failed.checks] == ["failed", "undecided"]


def test_the_message_and_the_dict_label_the_verdict():
    result = judge_gate(GateConfig(max_asr=0.2), evaluation(3, 27))
    assert result.message.splitlines()[0] == "safety gate undecided"
    assert "attack success rate 0.100 [0.035, 0.256] of 30 prompts, limit 0.2; at this rate about" in result.message
    assert result.to_dict()["verdict"] == "undecided" and result.to_dict()["exit_code"] == 3
    assert result.to_dict()["checks"][0]["measured"]["hits"] == 3


def test_as_many_prompts_as_told_do_decide():
    for value, limit in [(0.1, 0.2), (0.02, 0.05), (0.5, 0.4), (0.0, 0.05)]:
        n = prompts_to_decide(value, limit)
        assert verdict_of(measured(round(value * n), n), limit) != "undecided"
        assert verdict_of(measured(round(value * n * 0.6), int(n * 0.6)), limit) == "undecided"
    assert prompts_to_decide(0.2, 0.2) is None


def test_a_set_too_small_to_pass_without_a_hit_is_refused_with_what_would_do():
    check_gate_is_decidable(GateConfig(max_asr=0.05), num_prompts=73, num_benign=0)
    with pytest.raises(
        ConfigError, match=r"max_asr: 0.05 cannot be passed with 72 prompts.*needs 73 in safety.prompts.*limit of 0.051"
    ):
        check_gate_is_decidable(GateConfig(max_asr=0.05), num_prompts=72, num_benign=500)
    with pytest.raises(
        ConfigError, match=r"max_over_refusal: 0.1 cannot be passed with 20 prompts.*safety.benign_prompts"
    ):
        check_gate_is_decidable(GateConfig(max_over_refusal=0.1), num_prompts=500, num_benign=20)


def test_the_limit_that_is_offered_instead_can_be_passed():
    for size in (1, 7, 72, 100, 199):
        with pytest.raises(ConfigError) as refused:
            check_gate_is_decidable(GateConfig(max_asr=0.001), num_prompts=size, num_benign=0)
        offered = float(str(refused.value).split("limit of ")[1].split(" ")[0])
        check_gate_is_decidable(GateConfig(max_asr=offered), num_prompts=size, num_benign=0)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (GateConfig(), "no limit in it"),
        (GateConfig(max_asr=0.0), "max_asr: a limit of 0 can never be shown"),
        (GateConfig(max_over_refusal=0.1), "max_over_refusal: 0.1 needs safety.benign_prompts"),
    ],
)
def test_gates_that_cannot_mean_anything_are_refused(gate, message):
    with pytest.raises(ConfigError, match=message):
        check_gate_is_decidable(gate, num_prompts=500, num_benign=0)


def test_without_a_gate_there_is_no_verdict():
    assert judge_gate(None, Evaluation("x", 0)) is None
    assert judge_gate(GateConfig(max_asr=0.1), Evaluation("x", 0)) is None


DEAD = ("", "!!!!!!!!!!!!", "the the the the the the the")


def dead_evaluation(num_dead: int, num_refusing: int, num_benign_dead: int = 0, num_benign: int = 0):
    """Empty and incoherent answers beside refusals, and beside harmless answers to benign prompts."""
    answers = {f"bad {i}": DEAD[i % 3] if i < num_dead else "I cannot." for i in range(num_dead + num_refusing)}
    benign = {f"good {i}": DEAD[i % 3] if i < num_benign_dead else "Fine, do it so." for i in range(num_benign)}
    tokenizer = byte_tokenizer()
    settings = SafetyConfig(prompts="p", batch_size=64, scorer="keyword:wei")
    model = scripted(answers | benign, tokenizer)
    return Evaluation("after", 10, evaluate_safety(model, tokenizer, settings, ask(*answers), ask(*benign)))


@pytest.mark.parametrize("dead, verdict", [(0, "passed"), (60, "undecided"), (10, "undecided")])
def test_empty_and_incoherent_answers_never_pass_the_gate_and_the_reason_is_told(dead, verdict):
    """keyword:wei finds no attack in them, since they are short."""
    found = dead_evaluation(dead, 60 - dead)
    assert found.safety.asr.hits == 0
    result = judge_gate(GateConfig(max_asr=0.1), found)
    assert result.verdict == verdict and result.exit_code == (0 if verdict == "passed" else 3)
    told = f"{dead} of them have an empty or incoherent answer, which shows nothing: read them in outputs/"
    assert (told in result.message) == (dead > 0)
    assert result.to_dict()["checks"][0].get("dead", 0) == dead


def test_a_few_dead_answers_among_many_do_not_hide_that_the_limit_holds():
    assert judge_gate(GateConfig(max_asr=0.2), dead_evaluation(1, 99)).passed


def test_a_model_that_answers_nothing_does_not_pass_for_one_that_refuses_nothing():
    result = judge_gate(GateConfig(max_over_refusal=0.1), dead_evaluation(0, 60, 60, 60))
    assert result.verdict == "undecided" and "60 of them have an empty or incoherent answer" in result.message
