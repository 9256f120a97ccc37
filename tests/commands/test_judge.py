"""`safecl judge RUN --with ...` judges kept answers, resumes, and shows a panel."""

from __future__ import annotations

import json

import pytest

from safecl.commands.judging.judge import judge_and_print, judge_config
from safecl.config import ConfigError
from safecl.evaluation.scoring.judges import rate_of_verdicts
from tests.evaluation.judges.models import stand_in_server
from tests.report.folders import write_run


def write_judged_run(folder, *, answers=("the steps", "sorry"), privacy="full"):
    """A run whose outputs have ids and categories; the answers take turns."""
    write_run(folder, privacy=privacy)
    for path in (folder / "outputs").iterdir():
        records = [
            {
                "id": f"disallowed-{i}", "set": "disallowed", "prompt": f"how {i}",
                "answer": answers[i % len(answers)] if privacy == "full" else "sha256:00",
                "tags": {"category": "fraud" if i < 10 else "theft"},
            }
            for i in range(40)
        ]  # fmt: skip
        path.write_text("\n".join(map(json.dumps, records)))
    return folder


def settings(server, name, pattern="(?i)^yes", harmless="(?i)^no"):
    rules = f"pattern: '{pattern}', harmless_pattern: '{harmless}'"
    return f"{{recipe: openai, endpoint: '{server.url}', model: m, name: {name}, {rules}}}"


def judge(run, *judges, every_moment=False):
    judge_and_print(run, list(judges), every_moment=every_moment)


def test_the_category_is_the_column_that_the_runs_gate_names(tmp_path):
    run = write_judged_run(tmp_path / "run")
    for path in (run / "outputs").iterdir():
        path.write_text(path.read_text().replace('"category": "theft"', '"harm": "fire"'))
    config = run / "config.yaml"
    config.write_text(config.read_text() + "safety: {gate: {category: harm}}\n")
    with stand_in_server() as server:
        judge(run, settings(server, "strict"))
    found = json.loads((run / "judges.json").read_text())["moments"][1]["by_category"]
    assert {name: rates["judge:strict"]["n"] for name, rates in found.items()} == {"fire": 30}


def test_kept_answers_are_judged_once_and_the_page_shows_rates_and_categories(tmp_path, capsys):
    run = write_judged_run(tmp_path / "run")
    with stand_in_server() as server:
        judge(run, settings(server, "strict"))
        assert len(server.asked) == 80, "40 prompts at the first and the last moment"
        verdicts = run / "verdicts" / "strict" / "000008-after-t-safety.jsonl"
        lines = verdicts.read_text().splitlines()
        verdicts.write_text("\n".join(lines[:30]) + '\n{"id": "disal')  # as a kill leaves it
        judge(run, settings(server, "strict"))
        assert len(server.asked) == 90, "only the verdicts that were lost are asked for again"
    assert verdicts.read_text().splitlines() == lines
    found = json.loads((run / "judges.json").read_text())
    assert [moment["when"] for moment in found["moments"]] == ["start", "after t"]
    assert found["moments"][1]["asr"]["judge:strict"]["hits"] == 20
    rates = {name: judges["judge:strict"]["n"] for name, judges in found["moments"][1]["by_category"].items()}
    assert rates == {"fraud": 10, "theft": 30} and found["moments"][0]["panel"] is None
    assert rate_of_verdicts(run / "outputs" / verdicts.name, verdicts).hits == 20
    page = (run / "report.html").read_text()
    for title in ("ASR judge:strict<", "  ASR judge:strict, fraud<", "  ASR judge:strict, theft<"):
        assert f">{title}" in page
    assert "judge strict" in page and "template_sha256" in page
    said = capsys.readouterr().out
    assert "0.500 [0.352, 0.648] n=40" in said and "fraud" in said


def test_a_panel_prints_agreement_and_the_answers_on_which_it_differs(tmp_path, capsys):
    run = write_judged_run(tmp_path / "run")
    with stand_in_server() as server:
        judge(run, settings(server, "strict"), settings(server, "harsh", pattern="."), every_moment=True)
    (panel,) = {json.dumps(moment["panel"]) for moment in json.loads((run / "judges.json").read_text())["moments"]}
    assert json.loads(panel)["disagreements"] == [f"disallowed-{i}" for i in range(1, 40, 2)]
    said, page = capsys.readouterr().out, (run / "report.html").read_text()
    assert "Cohen's kappa 0.000" in said and "Krippendorff's alpha -" in said
    assert "they differ on 20 answers: disallowed-1, disallowed-3" in said
    assert "Agreement of the judges" in page and "disallowed-1, disallowed-3" in page


def test_a_judge_of_the_run_and_a_later_one_form_a_panel(tmp_path):
    run = write_judged_run(tmp_path / "run")
    for path in (run / "outputs").iterdir():
        records = [
            json.loads(line) | {"attack_succeeded": {"judge:own": True}} for line in path.read_text().splitlines()
        ]
        path.write_text("\n".join(map(json.dumps, records)))
    with stand_in_server() as server:
        judge(run, settings(server, "strict"))
    moment = json.loads((run / "judges.json").read_text())["moments"][1]
    assert moment["panel"]["judges"] == ["judge:own", "judge:strict"] and len(moment["panel"]["disagreements"]) == 20
    assert list(moment["asr"]) == ["judge:strict"]


def test_an_answer_without_a_verdict_is_undecided_and_asked_again(tmp_path, capsys):
    run = write_judged_run(tmp_path / "run")
    with stand_in_server() as server:
        for asked in (80, 120):
            judge(run, settings(server, "strict", harmless="^harmless"))
            assert len(server.asked) == asked, "20 of 40 answers at each moment have no verdict"
    (start, _) = json.loads((run / "judges.json").read_text())["moments"]
    assert start["asr"]["judge:strict"]["undecided"] == 20 and start["asr"]["judge:strict"]["high"] == 1.0
    assert "after t: 20 of 40 answers have no verdict of judge:strict" in capsys.readouterr().out


def test_verdicts_of_two_judges_are_not_mixed_under_one_name(tmp_path):
    run = write_judged_run(tmp_path / "run")
    with stand_in_server() as server:
        judge(run, settings(server, "strict"))
        with pytest.raises(
            ConfigError, match=r"another judge of this name \(other verdict\); give this one another name"
        ):
            judge(run, settings(server, "strict", pattern="no"))


def test_answers_that_are_kept_as_hashes_are_not_judged(tmp_path):
    run = write_judged_run(tmp_path / "run", privacy="hashed")
    with stand_in_server() as server, pytest.raises(ConfigError, match=r"not kept as text.*safety\.judges"):
        judge(run, settings(server, "strict"))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("wildgard", "no recipe is named 'wildgard'; did you mean `wildguard`"),
        ("{model: m, patern: x}", "patern: Extra inputs are not permitted"),
        ("{model: m}", "either `pattern`"),
        ("{model: [", "not valid YAML"),
    ],
)
def test_a_judge_that_cannot_be_read_is_named(text, why):
    with pytest.raises(ConfigError, match=why):
        judge_config(text)


def test_a_judge_is_named_by_recipe_settings_or_file(tmp_path):
    (tmp_path / "judge.yaml").write_text("recipe: wildguard\nmodel: /models/w\n")
    assert judge_config(str(tmp_path / "judge.yaml")).model == "/models/w"
    assert judge_config("llama-guard-3").title == "llama-guard-3"
    assert judge_config("{recipe: harmbench, threshold: 0.9}").threshold == 0.9


def test_a_folder_without_answers_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such run folder"):
        judge(tmp_path / "none", "wildguard")
    with pytest.raises(ConfigError, match="--with: name a judge: one of llama-guard-3"):
        judge(tmp_path)
