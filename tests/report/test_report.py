"""The page of a run and the page that compares runs are self-contained, agree with the numbers, and respect privacy."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import yaml

from safecl.commands.report import report_runs
from safecl.config import ConfigError
from safecl.evaluation import Evaluation
from safecl.evaluation.results.task import TaskResult
from safecl.evaluation.statistics.intervals import rate
from safecl.report import charts
from safecl.report.answers import answers_of, side_by_side
from safecl.report.comparison import comparison_page, read_runs, warnings_of
from safecl.report.folder import read_run
from safecl.report.run import run_report, write_run_report
from tests.report.folders import (
    ANSWER,
    DIGEST,
    SECRET,
    gate,
    provenance,
    safety,
    share,
    task,
    write_run,
    write_unfinished,
)

VOID = ("meta", "line", "circle", "path", "rect", "polyline", "br")


class Checked(HTMLParser):
    """Every tag that is opened is closed, in order, and nothing is loaded. `folded` is the text inside of <details>."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.text, self.folded = [], "", ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "img", "iframe", "object"), tag
        assert not {name for name, _ in attributes} & {"src", "href", "onload", "onclick"}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open or not data.strip():
            return
        self.text += " " + data.strip()
        if "details" in self.open and "summary" not in self.open:
            self.folded += " " + data.strip()


def page_of(folder) -> Checked:
    return Checked(run_report(read_run(folder)))


def test_the_page_of_a_run_loads_nothing_and_shows_every_value_with_its_interval_and_number(tmp_path):
    path = write_run_report(write_run(tmp_path / "mine", methods=["der", "ema"]))
    page = path.read_text()
    text = Checked(page).text
    assert path.name == "report.html" and "url(" not in page and "@import" not in page
    for expected in (
        "mine", "der + ema", "0.750", "0.598 to 0.858, n = 40", "0.025", "exact_match", "0.900", "1.5 MB", "ema 4.0 kB",
        "0.02 s",
    ):  # fmt: skip
        assert expected in text, expected
    assert 'aria-label="0.750, 95 % interval 0.598 to 0.858"' in page
    said = r"After t 25\.0% \(14\.\d% to 40\.\d%\) of 40 disallowed requests are refused, before training 97\.5%"
    assert "Refusals were lost" in text and re.search(said, text)
    assert "T: exact match 0.900 (0.769 to 0.960), before training 0.100." in text


@pytest.mark.parametrize(("verdict", "tone"), [("passed", "good"), ("failed", "bad"), ("undecided", "open")])
def test_the_badge_with_limit_and_interval_stands_above_everything_else(tmp_path, verdict, tone):
    folder = write_run(tmp_path / "a", gate=gate(30, 0.1, verdict), provenance=provenance())
    page = run_report(read_run(folder))
    assert (
        f"{verdict.upper()} Disallowed requests that are not refused: 75.0% (59.8% to 85.8%), limit 10% Safety."
        in Checked(page).text
    )
    assert f'<main>\n<header>\n<div class="verdict {tone}">\n<h1 class="badge">{verdict.upper()}</h1>' in page
    assert f"<title>{verdict.upper()}: a" in page


def test_several_limits_each_have_their_verdict(tmp_path):
    both = gate(30, 0.1, "failed")
    both["checks"] += gate(2, 0.15, "undecided", "max_over_refusal")["checks"]
    text = page_of(write_run(tmp_path / "a", gate=both)).text
    assert "limit 10%: failed" in text and "Harmless requests that are refused: 5.0%" in text
    assert "limit 15%: undecided" in text


def test_a_run_without_a_gate_says_that_nobody_judged_it(tmp_path):
    text = page_of(write_run(tmp_path / "a")).text
    assert "NOT JUDGED No limit was set, so there is no verdict." in text and "PASSED" not in text


def test_three_sentences_follow_the_badge_on_safety_the_task_and_what_was_left_out(tmp_path):
    text = page_of(write_run(tmp_path / "a", provenance=provenance())).text
    places = [text.index(label) for label in ("NOT JUDGED", "Safety. ", "Task. ", "Upload. ", "For the auditor")]
    assert places == sorted(places)
    assert (
        "40 of 1,200 uploaded rows were left out: 30 flagged by the screen, 3 that cannot be used, "
        "7 that repeat safety prompts." in text
    )


def test_nothing_left_out_no_screen_and_poison_are_said_as_they_were_in_this_run(tmp_path):
    data = {"flagged": None, "bad": 0, "repeated": 0, "rows": 1320, "poisoned": 120}
    text = page_of(write_run(tmp_path / "a", provenance=provenance(screened=None, data=data))).text
    said = (
        "Nothing was left out of the upload of 1,200 rows. The upload was not screened. 120 harmful rows were mixed in"
    )
    assert said in text and "none: this run did not screen its rows" in text and "120 rows in task t" in text
    lowered = {"flagged": {"rows": 30, "weight": 0.1}, "bad": 0, "repeated": 0, "rows": 900}
    text = page_of(write_run(tmp_path / "b", provenance=provenance(screened="downweight", data=lowered))).text
    assert "300 of 1,200 uploaded rows were left out: 300 beyond max_rows." in text and "not screened" not in text
    assert "scan with action downweight" in text and "poison mixed in none" in text


def test_the_auditor_finds_date_hashes_prompts_scorers_templates_seeds_and_versions(tmp_path):
    text = page_of(write_run(tmp_path / "a", provenance=provenance(), finished="2026-01-31T12:00:00Z")).text
    for expected in (
        "2026-01-31T12:00:00Z", f"XXH3-128 {DIGEST}", DIGEST[::-1], "the-base", "keep.jsonl, 300 rows", "train 17",
        "disallowed.jsonl, n = 40, for attack success", "benign.jsonl, n = 40, for over-refusal", "ab" * 32, "cd" * 32,
        "keyword:gcg for the headline; the keyword lists are those of safecl 0.1.0", "max new tokens 64", "2.9.0",
        "1,160 rows trained on of 1,200 in the file, 5 of them shortened",
    ):  # fmt: skip
        assert expected in text, expected


def test_asr_is_explained_before_its_first_number_and_each_rate_says_which_way_is_better(tmp_path):
    page = page_of(write_run(tmp_path / "a"))
    explained = page.text.index("ASR, the attack success rate, is the share of disallowed prompts")
    assert page.text.index("ASR") == explained < page.text.index("ASR keyword:gcg lower is better")
    assert "t exact_match higher is better" in page.text


def test_the_page_says_what_a_sequence_of_tasks_has_kept(tmp_path):
    scores = {"start": {"a": 4, "b": 2}, "after a": {"a": 36, "b": 2}, "after b": {"a": 24, "b": 38}}
    moments = [
        Evaluation(
            when, 8 * i, None, {name: TaskResult(name, "exact_match", share(n), True, {}) for name, n in hits.items()}
        )
        for i, (when, hits) in enumerate(scores.items())
    ]
    text = page_of(write_run(tmp_path / "mine", moments=moments)).text
    assert "A: exact match 0.600" in text and "just after this task 0.900, before training 0.100" in text
    assert "b: exact match 0.950" in text and text.count("just after this task") == 1
    assert "over the sequence of tasks average score 0.775, backward transfer -0.300, forgetting 0.300." in text
    matrix = text[text.index("Scores over the sequence") :]
    assert re.search(r"measured after a b\s+a 0\.900 0\.050\s+b 0\.600 0\.950", " ".join(matrix.split()))
    assert "forgetting 0.300 (lower is better)" in " ".join(matrix.split())


def test_the_page_of_an_older_run_says_what_it_can(tmp_path):
    folder = write_run(tmp_path / "mine")
    assert "What was left out of the upload is not recorded in this run." in page_of(folder).text
    tree = {
        "model": {"path": "the-base"},
        "tasks": [{"name": "t", "train": "up.jsonl"}],
        "memory": {"source": "keep.jsonl"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree | {"privacy": {"examples": "full"}}))
    scanned = {"task": "t", "rows": 1200, "flagged": 30, "threshold": {"source": "benign", "false_alarm": 0.01}}
    (folder / "scan").mkdir()
    (folder / "scan" / "results.json").write_text(
        json.dumps({"action": "drop", "tasks": [scanned], "notes": ["a note"]})
    )
    text = page_of(folder).text
    for expected in ("the-base", "up.jsonl", "keep.jsonl", "plain fine-tuning", "a note", "not recorded by the safecl"):
        assert expected in text, expected
    assert "t: 30 of 1,200 rows flagged and left out; at most 1.0% of harmless rows are flagged, too." in text


def test_refusal_is_not_said_to_be_lost_where_the_intervals_overlap(tmp_path):
    text = page_of(write_run(tmp_path / "a", hits=3)).text
    assert "Refusals were lost" not in text and "No loss of refusals is seen" in text


def test_what_a_model_has_said_is_folded_text_and_never_markup(tmp_path):
    folder = write_run(tmp_path / "a")
    page = run_report(read_run(folder))
    assert "<script>" not in page and "<img" not in page and "<details open" not in page
    checked = Checked(page)
    assert SECRET in checked.folded and ANSWER in checked.folded
    assert checked.text.count(SECRET) == checked.folded.count(SECRET) == 6
    compared = Checked(comparison_page(read_runs([folder, folder])))
    assert compared.text.count(SECRET) == compared.folded.count(SECRET) == 6


def test_hostile_names_of_folders_files_and_tasks_are_text(tmp_path):
    facts = provenance(data={"task": SECRET, "file": SECRET})
    folder = write_run(
        tmp_path / "<b>&amp;", provenance=facts, moments=[Evaluation(SECRET, 0, safety(3), task("<i>", 3))]
    )
    page = run_report(read_run(folder))
    assert "<b>&" not in page and "<i>" not in page and "<script>" not in page and SECRET in Checked(page).text


def test_a_changed_answer_comes_first(tmp_path):
    shown = answers_of(read_run(write_run(tmp_path / "a")))
    assert shown.prompts[0][0].endswith(" 3") and len(shown.prompts) == 6 and shown.num_prompts == 40
    assert side_by_side([{"p": "x" * 1000}])[0][1][0].endswith(" ...")


@pytest.mark.parametrize("privacy", ["hashed", "none"])
def test_no_text_of_prompts_and_answers_is_shown_unless_privacy_allows_it(tmp_path, privacy):
    private, open_ = write_run(tmp_path / "private", privacy=privacy), write_run(tmp_path / "open")
    for page in (run_report(read_run(private)), comparison_page(read_runs([private, open_]))):
        assert "alert" not in page and "example.org" not in page
        assert "privacy.examples" in page
    assert "alert" in comparison_page(read_runs([open_, write_run(tmp_path / "open2")]))


def test_a_run_whose_config_cannot_be_read_shows_no_text(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "config.yaml").unlink()
    assert "alert" not in run_report(read_run(folder))


def test_a_run_without_anything_measured_has_a_page_too(tmp_path):
    folder = write_run(tmp_path / "a")
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results | {"evaluations": [], "summary": {}}))
    text = page_of(folder).text
    assert "nothing is said about it here" in text and "The task was not measured" in text
    assert report_runs([folder], None).is_file()


def test_an_unfinished_run_has_a_page_with_what_it_has_measured_so_far(tmp_path):
    folder = write_unfinished(tmp_path / "a", [Evaluation("start", 0, safety(1), task("t", 4))])
    text = Checked(report_runs([folder], None).read_text()).text
    assert "UNFINISHED Step 5 of 20, 25%, task t. A verdict is given at the end of a run." in text
    assert "97.5% (87.1% to 99.6%) of 40 disallowed requests are refused." in text and "der" in text
    assert "stopped by a signal; the same command resumes it" in text and "PASSED" not in text
    both = comparison_page(read_runs([folder, write_run(tmp_path / "b")]))
    assert "a is not finished." in both and "UNFINISHED" in both
    (folder / "measured.json").unlink()
    assert "Safety was not measured" in page_of(folder).text


def test_the_folder_of_an_evaluation_has_a_page(tmp_path):
    folder = write_run(tmp_path / "run" / "eval", moments=[Evaluation("model", 0, safety(2), task("t", 30))])
    results = json.loads((folder / "results.json").read_text())
    kept = {key: results[key] for key in ("safecl", "evaluations", "gate")}
    kept |= {"model": "runs/run/model", "privacy": "full", "finished": "2026-01-31T12:00:00Z"}
    (folder / "results.json").write_text(json.dumps(kept))
    (folder / "config.yaml").unlink()
    text = page_of(folder).text
    assert "evaluation eval" in text and "Nothing was trained here: the model was measured as it is." in text
    assert "95.0% (83.5% to 98.6%) of 40 disallowed requests are refused." in text and "2026-01-31" in text
    assert "poison" not in text.lower() and "runs/run/model" in text


def test_runs_are_compared_by_column_with_verdicts_differences_and_forgetting(tmp_path, capsys):
    plain = write_run(tmp_path / "plain", gate=gate(30, 0.1, "failed"), provenance=provenance())
    kept = write_run(tmp_path / "kept", hits=2, methods=["der"], steps=9, gate=gate(2, 0.2, "passed"))
    for folder, forgetting in ((plain, 0.3), (kept, 0.1)):
        results = json.loads((folder / "results.json").read_text())
        results["summary"] = {"tasks": ["t", "u"], "scores": [], "forgetting": forgetting}
        (folder / "results.json").write_text(json.dumps(results))
    page = report_runs([plain, kept], tmp_path / "page.html").read_text()
    text = " ".join(Checked(page).text.split())
    assert text.index("FAILED") < text.index("PASSED") < text.index("Measured at the end")
    assert "-0.700 (-0.814 to -0.509)" in text and '<small class="change good"><b>-0.700</b>' in page
    assert "forgetting lower is better 0.300 0.100 -0.200" in text and DIGEST in Checked(page).folded
    assert "beyond the gate" not in text
    assert text.index("0.750") < text.index("0.050") and "different numbers of steps" in text and "4.0 kB" in text
    printed = capsys.readouterr().out
    assert "plain" in printed and "kept" in printed and "different numbers of steps" in printed and "passed" in printed
    assert warnings_of(read_runs([plain, plain])) == []


def test_runs_with_other_prompts_are_not_compared_without_a_warning(tmp_path):
    facts = provenance()
    other = json.loads(json.dumps(facts))
    other["measured_with"]["prompts"][0]["sha256"] = "ef" * 32
    runs = [write_run(tmp_path / "a", provenance=facts), write_run(tmp_path / "b", provenance=other)]
    assert warnings_of(read_runs(runs)) == ["Safety was measured with other prompts."]


def test_no_name_and_no_figure_is_cut_away_on_a_narrow_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    report_runs([write_run(tmp_path / "a-long-name-of-a-run", methods=["der", "ema"])], tmp_path / "page.html")
    said = capsys.readouterr().out
    assert "a-long-name-of-a-run" in said and "0.60-0.86" in said and "…" not in said


def test_two_folders_of_one_name_are_told_apart(tmp_path):
    runs = read_runs([write_run(tmp_path / "x" / "kept"), write_run(tmp_path / "y" / "kept")])
    assert str(tmp_path / "x" / "kept") in comparison_page(runs)


def test_folders_without_a_run_are_all_named(tmp_path):
    (tmp_path / "other").mkdir()
    for name, text in {"cut": '{"eval', "list": "[]", "newer": '{"evaluations": [], "schema": 99}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(text)
    write_unfinished(tmp_path / "begun", [])
    with pytest.raises(ConfigError) as error:
        read_runs([tmp_path / name for name in ("none", "other", "cut", "list", "newer", "begun")])
    said = str(error.value).splitlines()
    assert [line.partition(": ")[2].split(";")[0][:22] for line in said] == [
        "no such run folder", "not a run folder, ther", "not JSON: Unterminated", "Input should be a vali",
        "has schema 99, and thi", "nothing was measured i",
    ]  # fmt: skip


def test_a_file_that_safecl_did_not_make_is_not_overwritten(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    (tmp_path / "page.html").write_text("<html>mine</html>")
    for folders in (runs, runs[:1]):
        with pytest.raises(ConfigError, match="was not made by `safecl report`"):
            report_runs(folders, tmp_path / "page.html")
    assert report_runs(runs, tmp_path / "own.html") == report_runs(runs, tmp_path / "own.html")
    assert "NOT JUDGED" in report_runs(runs[:1], tmp_path / "own.html").read_text()


def test_a_curve_is_thinned_and_says_its_ends():
    drawn = charts.curves({"task": [(i, 1.0 / (i + 1)) for i in range(5000)], "broken": [(0, float("nan"))]})
    assert 250 <= drawn.count(",") <= 320 and 'aria-label="loss over steps: task from 1 to 0.0002"' in drawn
    assert charts.curves({}) == ""


def test_answers_that_were_cut_off_and_warnings_are_told(tmp_path):
    """A rate without a single answer has no value, and a page shows it as undecided."""
    unknown = rate([], undecided=40)
    verdict = gate(0, 0.1, "undecided")
    verdict["checks"][0]["measured"] = unknown.to_dict()
    folder = write_run(tmp_path / "a", gate=verdict)
    results = json.loads((folder / "results.json").read_text())
    last = results["evaluations"][-1]
    last["safety"] |= {name: unknown.to_dict() for name in ("asr", "over_refusal", "affirmative")}
    last["safety"]["asr_by_scorer"] = {"keyword:gcg": unknown.to_dict()}
    last["safety"]["cut_off"] = share(40).to_dict()
    last["warnings"] = ["safety: 40 of 40 answers open with the same word or mark"]
    (folder / "results.json").write_text(json.dumps(results))
    (outputs,) = (folder / "outputs").glob("*after-t-safety.jsonl")
    records = [json.loads(line) | {"answer": "", "cut_off": True} for line in outputs.read_text().splitlines()]
    outputs.write_text("\n".join(map(json.dumps, records)))
    page = page_of(folder)
    for said in (
        "an unknown share",
        "undecided",
        "not refused: unknown (0.0% to 100.0%)",
        "40 of 40 prompts have no answer, because the thought does not end",
        "Warning, after t: safety: 40 of 40 answers open with the same word or mark",
        "(no answer: the thought does not end)",
    ):
        assert said.lower() in page.text.lower()
    assert "nan" not in re.findall(r"\w+", page.text.lower())
