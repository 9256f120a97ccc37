"""A run of two ranks whose answers a trained classifier judges, and `safecl judge` with the same classifier on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from safecl.cli import app
from safecl.config.judges import JudgeConfig
from safecl.evaluation.judges.loading import load_judge
from tests.evaluation.judges.models import TEMPLATE, save_classifier
from tests.training.test_trainer import fit, materials, tree  # noqa: F401  # a fixture

END = "000006-after-sentiment-safety.jsonl"


def judge(classifier: Path, **more) -> dict:
    own = {"kind": "classifier", "model": str(classifier), "template": TEMPLATE, "label": "harm", "dtype": "fp32"}
    return own | more


@pytest.fixture(scope="module")
def judged(rank_pool, materials, tmp_path_factory) -> tuple[Path, dict, Path]:  # noqa: F811
    folder = tmp_path_factory.mktemp("judged")
    classifier = save_classifier(folder / "classifier")
    safety = {"judges": [judge(classifier, name="own", where="run")], "scorer": "judge:own"}
    config = tree(materials, folder / "run", deepspeed={"stage": 1}, safety=safety) | {"methods": {}, "memory": None}
    results = rank_pool(2).run(fit, tree=config, cache=str(materials / "cache"))[0]
    return folder / "run", results, classifier


def answers_of(run: Path) -> list[dict]:
    lines = (run / "outputs" / END).read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["set"] == "disallowed"]


def test_a_run_reports_the_rate_by_its_judge_and_keeps_each_verdict(judged):
    run, results, classifier = judged
    answers = answers_of(run)
    pairs = [row["prompt"] for row in answers], [row["answer"] for row in answers]
    expected = [verdict.score >= 0.5 for verdict in load_judge(JudgeConfig(**judge(classifier))).judge(*pairs)]
    assert [row["attack_succeeded"]["judge:own"] for row in answers] == expected and len(expected) == 5
    safety = results["evaluations"][-1]["safety"]
    assert safety["scorer"] == "judge:own" and safety["asr"] == safety["asr_by_scorer"]["judge:own"]
    assert (safety["asr"]["hits"], safety["asr"]["n"]) == (sum(expected), 5)
    assert "ASR judge:own" in (run / "report.html").read_text()


def test_the_same_classifier_asked_afterwards_gives_the_same_verdicts(judged):
    run, results, classifier = judged
    later = json.dumps(judge(classifier, name="later"))
    done = CliRunner().invoke(app, ["judge", str(run), "--with", later])
    assert done.exit_code == 0, done.output
    kept = (run / "verdicts" / "later" / END).read_text().splitlines()
    verdicts = {line["id"]: line["harmful"] for line in map(json.loads, kept)}
    assert verdicts == {row["id"]: row["attack_succeeded"]["judge:own"] for row in answers_of(run)}
    (_, last) = json.loads((run / "judges.json").read_text())["moments"]
    assert last["asr"]["judge:later"] == results["evaluations"][-1]["safety"]["asr"]
    assert last["panel"]["judges"] == ["judge:own", "judge:later"] and last["panel"]["disagreements"] == []
    assert "judge:later" in done.output and "Krippendorff's alpha" in done.output
    assert "ASR judge:later" in (run / "report.html").read_text()
