from __future__ import annotations

import json
import sys
import types
from dataclasses import replace

import pytest
from rich.console import Console

from safecl.config import ConfigError, EvalConfig, SafetyConfig
from safecl.evaluation import (
    Evaluation,
    Mean,
    SafetyResult,
    TaskResult,
    evaluate,
    evaluate_safety,
    load_scorer,
    rate_of_verdicts,
    results_table,
    summarise,
    write_outputs,
)
from safecl.evaluation.measure import short_answers
from safecl.evaluation.records import outputs_file
from safecl.evaluation.scoring.judges import read_outputs
from safecl.evaluation.statistics.intervals import rate
from tests.evaluation.models import ask, byte_tokenizer
from tests.evaluation.test_safety import HARM, scripted
from tests.evaluation.test_task import rows_of

TEXTS = {"is it good": "positive", "is it bad": "negative"}


def measure(answers, when="start", step=0):
    tokenizer = byte_tokenizer()
    model = scripted(answers | TEXTS, tokenizer)
    rows = rows_of([("is it good", "positive"), ("is it bad", "positive"), ("is it good", "positive")])
    return evaluate(
        model,
        tokenizer,
        when=when,
        step=step,
        safety=SafetyConfig(prompts="p", max_new_tokens=200),
        prompts=ask(*answers),
        benign=ask("is it good"),
        tasks=[("films", EvalConfig(path="e"), rows)],
    )


@pytest.fixture(scope="module")
def evaluation():
    return measure(HARM)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_set_of_answers_has_its_own_file_named_by_step_and_moment(evaluation, tmp_path):
    paths = evaluation.write_outputs(tmp_path / "outputs")
    assert [path.name for path in paths] == ["000000-start-safety.jsonl", "000000-start-films.jsonl"]
    assert [record["answer"] for record in lines(paths[0])] == [*HARM.values(), "positive"]
    assert [record["correct"] for record in lines(paths[1])] == [True, False, True]
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == sorted(path.name for path in paths), (
        "no partial file is left"
    )


def test_a_moment_with_any_name_is_a_file_name(tmp_path):
    paths = measure(HARM, when="after ../a b/ü", step=7).write_outputs(tmp_path)
    assert paths[0].parent == tmp_path and paths[0].name == "000007-after-..-a-b-ü-safety.jsonl"


@pytest.mark.parametrize("privacy", ["hashed", "none"])
def test_no_text_is_kept_unless_privacy_says_full(evaluation, tmp_path, privacy):
    for path in evaluation.write_outputs(tmp_path, privacy):
        text = path.read_text(encoding="utf-8")
        for secret in [*HARM, *(answer for answer in HARM.values() if answer), "is it good", "positive", "negative"]:
            assert f'"{secret}"' not in text
        for record in lines(path):
            assert ("answer" in record) == ("tags" in record) == (privacy == "hashed")
            assert record["source"] and "id" in record


def test_hashed_texts_are_equal_where_the_texts_are_and_only_there(evaluation, tmp_path):
    hashed = lines(evaluation.write_outputs(tmp_path, "hashed")[1])
    assert hashed[0]["prompt"] == hashed[2]["prompt"] != hashed[1]["prompt"]
    assert hashed[0]["reference"] == hashed[0]["answer"] != hashed[1]["answer"]
    assert hashed[0]["answer"].startswith("sha256:") and len(hashed[0]["answer"]) == 7 + 16


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path):
    path = write_outputs(tmp_path / "a.jsonl", [{"id": 1}])
    with pytest.raises(TypeError):
        write_outputs(path, [{"id": 2}, {"id": object()}])
    assert lines(path) == [{"id": 1}]


def test_an_unknown_privacy_is_refused_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="full, hashed, none"):
        write_outputs(tmp_path / "a.jsonl", [{"id": 1}], "secret")
    assert not (tmp_path / "a.jsonl").exists()


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_short_answers_of_the_tasks_are_off_task_among_answers_to_disallowed_prompts(evaluation):
    assert evaluation.safety.off_task_reasons == {"empty": 1, "label": 1, "repetition": 1}


def test_labels_are_few_and_short_answers():
    assert short_answers(rows_of([(str(i), ["good", "bad"][i % 2]) for i in range(20)])) == {"good", "bad"}
    assert short_answers(rows_of([(str(i), str(i)) for i in range(40)])) == set()
    assert short_answers(rows_of([("a", "this is one whole sentence"), ("b", "no")])) == set()


def test_the_log_line_never_shows_attack_success_alone(evaluation):
    assert evaluation.one_line() == (
        "start: ASR 0.667 (keyword:gcg), affirmative 0.167, complied 0.167, off-task 0.500, over-refusal 0.000, "
        "films exact_match 0.667"
    )


def moment(when, asr_hits, **scores):
    safety = SafetyResult(
        "keyword:gcg",
        rate([True] * asr_hits + [False] * (10 - asr_hits)),
        {},
        None,
        None,
        None,
        {},
        None,
        {},
        None,
        None,
    )
    tasks = {}
    for name, value in scores.items():
        value_of = Mean(5, 50, value, value - 1, value + 1)
        tasks[name] = (
            TaskResult(name, "answer_nll", value_of, False)
            if name == "nll"
            else TaskResult(name, "exact_match", value_of, True)
        )
    return Evaluation(when, 0, safety, tasks)


def test_the_summary_tells_the_worst_moment_and_the_transfer_between_tasks():
    moments = [
        moment("start", 0, a=0.1, nll=3.0),
        moment("a step 10", 9, a=0.5),
        moment("after a", 2, a=0.9, nll=2.5),
        moment("after nll", 1, a=0.6, nll=1.0),
    ]
    summary = summarise(moments)
    assert (summary["max_asr"], summary["max_asr_when"]) == (0.9, "a step 10")
    assert summary["tasks"] == ["a", "nll"] and summary["scores"] == [[0.9, -2.5], [0.6, -1.0]]
    assert summary["average"] == pytest.approx((0.6 - 1.0) / 2)
    assert summary["backward_transfer"] == pytest.approx(0.6 - 0.9) == -summary["forgetting"]
    assert summary["forward_transfer"] == pytest.approx(3.0 - 2.5)
    assert summarise([moment("start", 3)])["max_asr"] == 0.3
    assert summarise([])["max_asr"] is None


def test_the_summary_tells_lowest_scores_time_beyond_the_gate_and_what_the_probe_is_worth():
    from dataclasses import replace

    from safecl.evaluation.results.checks import GateResult
    from safecl.evaluation.results.probed import ProbeResult

    def at(when, step, hits, margin, verdict, **scores):
        found = moment(when, hits, **scores)
        probe = ProbeResult(margin, rate([False] * 4), rate([True] * hits + [False] * (10 - hits)), 0.75)
        return replace(found, step=step, gate=GateResult(verdict), probe=probe)

    moments = [
        at("start", 0, 0, 3.0, "passed", a=0.2, nll=3.0),
        at("a step 10", 10, 9, -2.0, "failed", a=0.5, nll=3.2),
        at("rolled back 1: after a", 20, 8, -1.0, "failed", a=0.1, nll=3.4),
        at("after a", 20, 2, 2.0, "undecided", a=0.9, nll=2.5),
        at("after nll", 40, 1, 2.5, "passed", a=0.6, nll=1.0),
        at("corrected nll", 40, 1, 2.5, "passed", a=0.7, nll=1.5),
    ]
    summary = summarise(moments)
    assert summary["tasks"] == ["a", "nll"] and summary["scores"] == [[0.9, -2.5], [0.7, -1.5]]
    assert summary["min_scores"]["a"] == {"value": 0.1, "when": "rolled back 1: after a"}
    assert summary["min_scores"]["nll"] == {"value": 3.4, "when": "rolled back 1: after a"}
    assert summary["beyond_gate"] == {"moments": 2, "of_moments": 6, "steps": 10, "share": 0.25}
    assert summary["min_accuracy"] == {"a": 0.6, "nll": None}
    assert summary["worst_case_accuracy"] == pytest.approx((-1.5 + 0.6) / 2)
    assert summary["windowed_forgetting"] == pytest.approx((0.4 + 0.5) / 2)
    assert summary["probe"]["pearson"] > 0.95 and summary["probe"]["auc"] == 0.75


def table_of(evaluations, width=160):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    console.print(results_table(evaluations))
    return console.export_text()


def test_the_table_sets_moments_side_by_side_with_intervals_and_all_scorers(evaluation):
    text = table_of([evaluation, measure(dict.fromkeys(HARM, "I cannot help."), when="after films", step=20)])
    for title in (
        "ASR keyword:gcg",
        "ASR keyword:wei",
        "ASR prefix:xstest",
        "affirmative openings",
        "off-task or incoherent",
        "over-refusal",
    ):
        assert title in text
    assert "films exact_match" in text and "relaxed" in text and "step 20" in text
    row = next(line for line in text.splitlines() if "ASR keyword:gcg" in line)
    assert "0.667" in row and "0.000" in row
    assert "[0.300, 0.903]" in text


def test_of_many_moments_the_table_keeps_the_ends_and_the_worst(evaluation):
    calm = measure(dict.fromkeys(HARM, "I cannot help."), when="calm")
    moments = [calm, calm, calm, evaluation, *[calm] * 6]
    text = table_of(moments)
    assert "5 of 10 moments shown" in text and "0.667" in text
    narrow = table_of([replace(each, when="support-tickets step 400") for each in moments], width=80)
    assert "…" not in narrow and narrow.count("0.00-0.39") >= 5 and "0.30-0.90" in narrow
    assert all(len(line) <= 80 for line in narrow.splitlines())


# --------------------------------------------------------------------------------------------------------------- judges


def add_module(monkeypatch, **functions):
    module = types.ModuleType("judge_for_test")
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, "judge_for_test", module)


def test_a_judge_named_in_the_config_gives_the_headline_rate_beside_the_keywords(monkeypatch):
    seen = []

    def judge(prompts, answers):
        seen.append((list(prompts), list(answers)))
        return [0.5 if "lock" in prompt or "poison" in prompt else 0.49 for prompt in prompts]

    add_module(monkeypatch, judge=judge)
    tokenizer = byte_tokenizer()
    safety = SafetyConfig(prompts="p", scorer="judge_for_test:judge", max_new_tokens=200)
    result = evaluate_safety(scripted(HARM, tokenizer), tokenizer, safety, ask(*HARM))
    assert seen == [(list(HARM), list(HARM.values()))]
    assert (result.scorer, result.asr.hits, result.asr_by_scorer["keyword:gcg"].hits) == ("judge_for_test:judge", 2, 4)
    assert result.outputs[0]["attack_succeeded"]["judge_for_test:judge"] is True
    assert result.asr_on_task.hits == 2, "by the judge, which does not take a keyword for a refusal"


@pytest.mark.parametrize(
    ("name", "functions", "message"),
    [
        ("judge_for_test:other", {}, "has no function `other`"),
        ("no_such_package.judge", {}, "cannot be imported"),
        ("keyword:gcq", {}, "did you mean keyword:gcg"),
    ],
)
def test_judges_that_cannot_be_had_are_refused(monkeypatch, name, functions, message):
    add_module(monkeypatch, **functions)
    with pytest.raises(ConfigError, match=message):
        load_scorer(name)


@pytest.mark.parametrize(("scores", "message"), [([True], "1 scores for 2 answers"), ([0.2, 7], "the score 7")])
def test_a_judge_must_give_one_score_from_0_to_1_per_answer(monkeypatch, scores, message):
    add_module(monkeypatch, judge=lambda prompts, answers: scores)
    with pytest.raises(ConfigError, match=message):
        load_scorer("judge_for_test:judge")(["a", "b"], ["c", "d"])


def test_verdicts_made_later_on_the_kept_file_give_a_rate(evaluation, tmp_path):
    outputs = evaluation.write_outputs(tmp_path)[0]
    asked = [record for record in read_outputs(outputs) if record["set"] == "disallowed"]
    verdicts = tmp_path / "verdicts.jsonl"
    verdicts.write_text(
        "\n".join(json.dumps({"id": r["id"], "score": 0.9 if "lock" in r["prompt"] else 0.1}) for r in asked) + "\n\n"
    )
    result = rate_of_verdicts(outputs, verdicts)
    assert (result.hits, result.n) == (1, len(HARM))
    verdicts.write_text("\n".join(json.dumps({"id": r["id"], "harmful": True}) for r in asked))
    assert rate_of_verdicts(outputs, verdicts).value == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "disallowed-0", "score": 0.1}', r"5 of 6 answers have no verdict, first 'disallowed-1'"),
        ('{"id": "a", "score": 0.1}\n{"id": "a", "score": 0.2}', r"verdicts.jsonl:2: the id 'a' was judged twice"),
        ('{"id": "a"}', r"verdicts.jsonl:1: not a verdict"),
        ('{"id": "a", "score": 3}', r"verdicts.jsonl:1: not a verdict"),
        ("\n[1", r"verdicts.jsonl:2: not a verdict"),
    ],
)
def test_verdicts_that_are_incomplete_or_broken_are_refused(evaluation, tmp_path, text, message):
    outputs = evaluation.write_outputs(tmp_path)[0]
    (tmp_path / "verdicts.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        rate_of_verdicts(outputs, tmp_path / "verdicts.jsonl")


def test_a_long_name_makes_a_file_that_the_file_system_takes_and_two_long_names_two_files(tmp_path):
    first, other = (outputs_file(tmp_path, "after " + "\u00e9" * 500 + end, 7) for end in "ab")
    first.write_text("")
    assert first != other and not other.exists() and first.name.startswith("000007-after-\u00e9")
    assert outputs_file(tmp_path, "after task", 7).name == "000007-after-task-safety.jsonl"
