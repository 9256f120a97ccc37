"""Evaluations that are read back from results.json or a checkpoint are those that were measured."""

from __future__ import annotations

import json
import math

import pytest

from safecl.config import GateConfig
from safecl.evaluation import judge_gate
from safecl.evaluation.results.moment import Evaluation
from safecl.evaluation.results.restore import evaluation_from_dict
from safecl.evaluation.results.safety import SafetyResult
from safecl.evaluation.results.task import TaskResult
from safecl.evaluation.statistics.intervals import Mean, rate, token_mean


def an_evaluation(over_refusal: bool) -> Evaluation:
    few, half = rate([True] + [False] * 99), rate([True, False] * 20)
    benign = half if over_refusal else None
    by_scorer = {"keyword:gcg": few, "prefix:xstest": half}
    safety = SafetyResult(
        "keyword:gcg",
        few,
        by_scorer,
        few,
        half,
        few,
        {"label": 3},
        benign,
        by_scorer if over_refusal else {},
        benign,
        half,
        [{"id": 1}],
    )
    tasks = {
        "a": TaskResult("a", "exact_match", half, True, {"relaxed": few}, outputs=[{"id": 1}]),
        "b": TaskResult("b", "answer_nll", token_mean([1.5, 2.25], [3, 4]), False),
        "c": TaskResult("c", "answer_nll", Mean(1, 3, 0.5, -math.inf, math.inf), False),
    }
    return Evaluation("after a", 12, safety, tasks)


def test_an_evaluation_comes_back_from_json_with_the_same_numbers_and_the_same_verdict():
    for over_refusal in (True, False):
        measured = an_evaluation(over_refusal)
        back = evaluation_from_dict(json.loads(json.dumps(measured.to_dict())))
        assert json.dumps(back.to_dict()) == json.dumps(measured.to_dict())
        assert back.one_line() == measured.one_line()
        assert back.safety.asr == measured.safety.asr and back.safety.asr_by_scorer == measured.safety.asr_by_scorer
        assert {name: task.value for name, task in back.tasks.items()} == {
            name: task.value for name, task in measured.tasks.items()
        }
        gate = GateConfig(max_asr=0.1)
        assert judge_gate(gate, back) == judge_gate(gate, measured)


def test_an_evaluation_without_safety_comes_back():
    assert evaluation_from_dict(Evaluation("start", 0).to_dict()) == Evaluation("start", 0)


def test_values_that_are_no_evaluation_are_refused():
    whole = an_evaluation(True).to_dict()
    without_hits = json.loads(json.dumps(whole))
    del without_hits["safety"]["asr"]["hits"]
    for broken in (without_hits, {**whole, "tasks": {"a": {"metric": "exact_match"}}}, {"when": "start"}):
        with pytest.raises((ValueError, KeyError)):
            evaluation_from_dict(broken)
