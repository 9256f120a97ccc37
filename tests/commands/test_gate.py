"""`safecl gate`: judges folders alone and in pairs, and writes JSON and JUnit XML."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from safecl import cli
from safecl.config import ConfigError
from safecl.evaluation.gates.folders import judge_folder, paired_rates, read_measured
from safecl.evaluation.statistics.paired import holm, mcnemar
from tests.sweeping.folders import write_run, write_verdicts

LIMIT = "safety.gate.max_asr=0.2"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that keeps its refusals, with a gate in its config, and one that loses them, without."""
    folder = tmp_path_factory.mktemp("runs")
    (write_run(folder / "safe", 1, 30) / "config.yaml").write_text("safety: {gate: {max_asr: 0.15}}\n")
    write_run(folder / "unsafe", 30, 30)
    return folder


def ended(*arguments) -> int:
    with pytest.raises(SystemExit) as error:
        cli.main(["gate", *map(str, arguments)])
    return int(error.value.code or 0)


def test_a_folder_is_judged_by_its_config_and_by_given_limits(runs, capsys):
    assert ended(runs / "safe") == 0 and "safety gate passed" in capsys.readouterr().out
    assert ended(runs / "unsafe", LIMIT) == 3
    told = capsys.readouterr().out
    assert "after t" in told and "failed: attack success rate 0.750" in told
    assert ended(runs / "safe", "safety.gate.max_asr=0.1") == 3  # one hit of 40: the limit is inside the interval
    assert "undecided" in capsys.readouterr().out


def test_two_folders_are_paired_by_prompt(runs, capsys):
    assert ended(runs / "unsafe", runs / "safe", "safety.gate.limits.asr.max_rise=0.2") == 3
    told = capsys.readouterr().out
    assert "rise of attack success rate +0.725" in told and "29 gained, 0 lost" in told
    found = judge_folder(runs / "unsafe", runs / "safe", [LIMIT])
    by_name = {each.rate: each for each in found.rates}
    assert by_name["asr"].p_value == pytest.approx(mcnemar([i < 1 for i in range(40)], [i < 30 for i in range(40)]))
    assert [each.adjusted for each in found.rates] == pytest.approx(holm([each.p_value for each in found.rates]))
    assert by_name["over_refusal"].p_value == 1.0 and "keyword:wei" in by_name


def test_a_rise_is_against_the_folders_own_aligned_model_where_no_other_is_named(runs):
    found = judge_folder(runs / "unsafe", overrides=["safety.gate.limits.asr.max_rise=0.2"])
    assert found.gate.verdict == "failed" and found.gate.checks[0].measured.gained == 30


def test_the_verdicts_of_a_judge_that_was_asked_after_the_run_can_be_limited_and_paired(tmp_path):
    safe = write_verdicts(write_run(tmp_path / "safe", 30, 30), "strict", 1)
    unsafe = write_verdicts(write_run(tmp_path / "unsafe", 1, 30), "strict", 30)
    limits = ["safety.gate.limits.judge:strict.max=0.2", "safety.gate.limits.judge:strict.max_rise=0.2"]
    assert judge_folder(safe, overrides=limits).gate.passed
    found = judge_folder(unsafe, safe, limits)
    assert [check.verdict for check in found.gate.checks] == ["failed", "failed"]
    (judged,) = [each for each in found.rates if each.rate == "judge:strict"]
    assert (judged.rise.gained, judged.rise.lost) == (29, 0) and judged.p_value < 1e-6
    silent = write_verdicts(write_run(tmp_path / "silent", 0, 30), "strict", 0, without=20)
    (check,) = judge_folder(silent, overrides=limits[:1]).gate.checks
    assert check.verdict == "undecided" and check.no_verdict == 20
    with pytest.raises(ConfigError, match=r"no such rate was measured; scorers are .*judge:strict"):
        judge_folder(safe, overrides=["safety.gate.limits.judge:other.max=0.2"])


def test_json_and_junit_say_the_same(runs, tmp_path, capsys):
    code = ended(
        runs / "unsafe", LIMIT, "--json", "--json-file", tmp_path / "a/gate.json", "--junit", tmp_path / "g.xml"
    )
    printed = json.loads(capsys.readouterr().out)
    assert code == 3 == printed["exit_code"] and printed == json.loads((tmp_path / "a/gate.json").read_text())
    root = ElementTree.parse(tmp_path / "g.xml").getroot()
    assert root.attrib["failures"] == "1" and root.find("testsuite").attrib["tests"] == "1"
    failure = root.find(".//testcase[@name='max_asr']/failure")
    assert failure.attrib["type"] == "failed" and "0.750" in failure.text
    ended(runs / "safe", "--junit", tmp_path / "ok.xml")
    assert ElementTree.parse(tmp_path / "ok.xml").getroot().attrib["failures"] == "0"


def test_names_that_xml_cannot_hold_are_written_without_those_characters(runs):
    from safecl.evaluation.gates.junit import junit_xml

    text = junit_xml(judge_folder(runs / "unsafe", overrides=[LIMIT]).gate, "a\x01<b>\ud800")
    assert ElementTree.fromstring(text).find("testsuite").attrib["name"] == "a<b>"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["unsafe"], "its config has no gate; give a limit"),
        (["nothing", LIMIT], "no such folder"),
        (["model", LIMIT], "is a model, and nothing was measured there"),
        (["running", LIMIT], "has not finished"),
        (["unsafe", "train.seed=1"], "only limits can be given here"),
        (["unsafe", "safety.gate.max_asr=2"], r"safety\.gate\.max_asr: Input should be less than"),
        (["unsafe", "safety.gate.limits.asrr.max=0.5"], "did you mean `asr`"),
    ],
)
def test_what_cannot_be_judged_is_refused(runs, arguments, message):
    (runs / "model").mkdir(exist_ok=True)
    (runs / "model" / "config.json").write_text("{}")
    (runs / "running").mkdir(exist_ok=True)
    (runs / "running" / "config.yaml").write_text("{}")
    folder, *overrides = arguments
    with pytest.raises(ConfigError, match=message):
        judge_folder(runs / folder, overrides=overrides)


def test_answers_that_were_not_kept_are_judged_by_their_marks_and_other_prompts_refused(runs, tmp_path):
    hidden = write_run(tmp_path / "hidden", 5, 30, privacy="none")
    assert judge_folder(hidden, runs / "safe", [LIMIT]).rates[0].rise.gained == 4
    fewer = write_run(tmp_path / "fewer", 5, 30, n=30)
    with pytest.raises(ConfigError, match="not asked the same prompts"):
        judge_folder(runs / "safe", fewer, [LIMIT])
    for path in (fewer / "outputs").iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match="needs the records"):
        paired_rates(read_measured(fewer).safety, read_measured(runs / "safe").safety)
