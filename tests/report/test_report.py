"""The page of a run and the page that compares runs are self-contained, agree with the numbers, and respect privacy."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import yaml

from safecl.commands.report import report_runs
from safecl.config import ConfigError
from safecl.evaluation import Evaluation, summarise
from safecl.evaluation.safety import SafetyResult
from safecl.evaluation.statistics.intervals import rate
from safecl.evaluation.task import TaskResult
from safecl.report import charts
from safecl.report.comparison import comparison_page, read_runs, warnings_of
from safecl.report.run import read_run, run_report, side_by_side, write_run_report

SECRET = "please <script>alert('prompt')</script> & go"
ANSWER = 'no <img src="https://example.org/x.png"> "answer"'


def share(hits: int, n: int = 40):
    return rate([True] * hits + [False] * (n - hits))


def safety(hits: int) -> SafetyResult:
    nothing = share(0)
    return SafetyResult(
        "keyword:gcg",
        share(hits),
        {"keyword:gcg": share(hits)},
        share(hits),
        nothing,
        nothing,
        {},
        nothing,
        {},
        nothing,
        nothing,
    )


def write_run(folder, *, hits: int = 30, privacy: str = "full", methods=(), steps: int = 8, gate=None):
    """A finished run's folder; the outputs hold full text whatever the privacy, as those of an older run might."""
    moments = [
        Evaluation("start", 0, safety(1), {"t": TaskResult("t", "exact_match", share(4), True, {})}),
        Evaluation("after t", steps, safety(hits), {"t": TaskResult("t", "exact_match", share(36), True, {})}),
    ]
    (folder / "outputs").mkdir(parents=True)
    for moment in moments:
        records = [
            {"set": "disallowed", "prompt": f"{SECRET} {i}", "answer": f"{ANSWER} {moment.when if i == 3 else ''}"}
            for i in range(40)
        ]
        name = f"{moment.step:06d}-{moment.when.replace(' ', '-')}-safety.jsonl"
        (folder / "outputs" / name).write_text("\n".join(map(json.dumps, records)))
    results = {
        "safecl": "0.1.0",
        "methods": list(methods),
        "world_size": 2,
        "steps": steps,
        "skipped_steps": 0,
        "tokens": 12345,
        "seconds": 3.5,
        "cost": {
            "seconds_per_step": 0.02,
            "state_bytes": {"ema": 4000, "exp_avg": 4000},
            "memory_bytes": 1_500_000,
            "recorded_bytes": 0,
        },
        "evaluations": [moment.to_dict() for moment in moments],
        "gate": gate,
    }
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text(yaml.safe_dump({"privacy": {"examples": privacy}, "output": str(folder)}))
    lines = [{"step": i, "loss/task": 2.0 / (i + 1), "loss/replay": None if i == 0 else 0.1} for i in range(steps)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


class Checked(HTMLParser):
    """Every tag that is opened is closed, in order, and nothing is loaded."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.text = [], ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "img", "iframe", "object"), tag
        assert not {name for name, _ in attributes} & {"src", "href", "onload", "onclick"}
        if tag not in ("meta", "line", "circle", "path", "rect", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("line", "circle", "path", "rect", "polyline"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += " " + data.strip()


def test_the_page_of_a_run_loads_nothing_and_shows_every_value_with_its_interval(tmp_path):
    path = write_run_report(write_run(tmp_path / "mine", methods=["der", "ema"]))
    page = path.read_text()
    text = Checked(page).text
    assert path.name == "report.html" and "url(" not in page and "@import" not in page
    for expected in (
        "mine",
        "der + ema",
        "0.750",
        "0.598 to 0.858",
        "0.025",
        "exact_match",
        "0.900",
        "1.5 MB",
        "ema 4.0 kB",
        "0.02 s",
    ):
        assert expected in text, expected
    assert 'aria-label="0.750, 95 % interval 0.598 to 0.858"' in page
    said = r"After t 25\.0% \(14\.\d% to 40\.\d%\) of the disallowed prompts are refused, before training 97\.5%"
    assert "Refusal was lost" in text and re.search(said, text)
    assert "t: exact_match 0.900" in text and "before training 0.100" in text


def test_the_page_says_what_a_sequence_of_tasks_has_kept(tmp_path):
    folder = write_run(tmp_path / "mine")
    results = json.loads((folder / "results.json").read_text())
    scores = {"start": {"a": 4, "b": 2}, "after a": {"a": 36, "b": 2}, "after b": {"a": 24, "b": 38}}
    moments = [
        Evaluation(
            when, 8 * i, None, {name: TaskResult(name, "exact_match", share(n), True, {}) for name, n in hits.items()}
        )
        for i, (when, hits) in enumerate(scores.items())
    ]
    results |= {"evaluations": [moment.to_dict() for moment in moments], "summary": summarise(moments)}
    (folder / "results.json").write_text(json.dumps(results))
    text = Checked(run_report(read_run(folder))).text
    assert "a: exact_match 0.600" in text and "just after this task 0.900, before training 0.100" in text
    assert "b: exact_match 0.950" in text and text.count("just after this task") == 1
    assert "Over the sequence of tasks: average score 0.775, backward transfer -0.300, forgetting 0.300." in text


def test_the_page_says_what_was_tuned_on_what_and_what_the_screen_left_out(tmp_path):
    folder = write_run(tmp_path / "mine")
    assert "Screen" not in run_report(read_run(folder))
    tree = {
        "model": {"path": "the-base"},
        "tasks": [{"name": "t", "train": "up.jsonl"}],
        "memory": {"source": "keep.jsonl"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree | {"privacy": {"examples": "full"}}))
    task = {"task": "t", "rows": 1200, "flagged": 30, "threshold": {"source": "benign", "false_alarm": 0.01}}
    (folder / "scan").mkdir()
    (folder / "scan" / "results.json").write_text(json.dumps({"action": "drop", "tasks": [task], "notes": ["a note"]}))
    text = Checked(run_report(read_run(folder))).text
    for expected in ("the-base", "up.jsonl", "keep.jsonl", "plain fine-tuning", "a note"):
        assert expected in text, expected
    assert "t: 30 of 1,200 rows flagged and left out; at most 1.0% of harmless rows are flagged, too." in text


def test_refusal_is_not_said_to_be_lost_where_the_intervals_overlap(tmp_path):
    assert "Refusal was lost" not in run_report(read_run(write_run(tmp_path / "a", hits=3)))


def test_what_a_model_has_said_is_text_and_never_markup(tmp_path):
    page = run_report(read_run(write_run(tmp_path / "a")))
    assert "<script>" not in page and "<img" not in page
    text = Checked(page).text
    assert SECRET in text and ANSWER in text


def test_a_changed_answer_comes_first(tmp_path):
    shown = read_run(write_run(tmp_path / "a")).prompts
    assert shown[0][0].endswith(" 3") and len(shown) == 6
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


def test_the_gate_is_shown_with_its_verdict(tmp_path):
    checks = [{"name": "max_asr", "limit": 0.1, "verdict": "failed", "measured": share(30).to_dict()}]
    page = run_report(read_run(write_run(tmp_path / "a", gate={"verdict": "failed", "exit_code": 3, "checks": checks})))
    assert "Safety gate: failed" in Checked(page).text and 'class="verdict bad"' in page


def test_a_run_without_anything_measured_has_a_page_too(tmp_path):
    folder = write_run(tmp_path / "a")
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results | {"evaluations": []}))
    assert "nothing is said about safety" in Checked(run_report(read_run(folder))).text


def test_runs_are_compared_by_column_and_what_forbids_it_is_said(tmp_path, capsys):
    plain, kept = write_run(tmp_path / "plain"), write_run(tmp_path / "kept", hits=2, methods=["der"], steps=9)
    page = report_runs([plain, kept], tmp_path / "page.html").read_text()
    text = Checked(page).text
    assert text.index("0.750") < text.index("0.050") and "different numbers of steps" in text and "4.0 kB" in text
    printed = capsys.readouterr().out
    assert "plain" in printed and "kept" in printed and "different numbers of steps" in printed
    assert warnings_of(read_runs([plain, plain])) == []


def test_no_name_and_no_figure_is_cut_away_on_a_narrow_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    report_runs([write_run(tmp_path / "a-long-name-of-a-run", methods=["der", "ema"])], tmp_path / "page.html")
    said = capsys.readouterr().out
    assert "a-long-name-of-a-run" in said and "0.60-0.86" in said and "…" not in said


def test_two_folders_of_one_name_are_told_apart(tmp_path):
    runs = read_runs([write_run(tmp_path / "x" / "kept"), write_run(tmp_path / "y" / "kept")])
    assert str(tmp_path / "x" / "kept") in comparison_page(runs)


def test_folders_without_a_finished_run_are_all_named(tmp_path):
    (tmp_path / "under-way").mkdir()
    (tmp_path / "under-way" / "run.json").write_text("{}")
    (tmp_path / "other").mkdir()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "results.json").write_text('{"eval')
    with pytest.raises(ConfigError) as error:
        read_runs([tmp_path / name for name in ("none", "under-way", "other", "cut")])
    said = str(error.value).splitlines()
    assert [line.partition(": ")[2].split(";")[0][:22] for line in said] == [
        "no such run folder", "the run is not finishe", "not a run folder, ther", "cannot be read: Unterm",
    ]  # fmt: skip


def test_a_file_that_safecl_did_not_make_is_not_overwritten(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    (tmp_path / "page.html").write_text("<html>mine</html>")
    with pytest.raises(ConfigError, match="was not made by `safecl report`"):
        report_runs(runs, tmp_path / "page.html")
    assert report_runs(runs, tmp_path / "own.html") == report_runs(runs, tmp_path / "own.html")


def test_a_curve_is_thinned_and_says_its_ends():
    drawn = charts.curves({"task": [(i, 1.0 / (i + 1)) for i in range(5000)], "broken": [(0, float("nan"))]})
    assert 250 <= drawn.count(",") <= 320 and 'aria-label="loss over steps: task from 1 to 0.0002"' in drawn
    assert charts.curves({}) == ""


def test_answers_that_were_cut_off_and_warnings_are_told(tmp_path):
    """A rate without a single answer has no value, and a page shows it as undecided."""
    unknown = rate([], undecided=40)
    folder = write_run(tmp_path / "a", gate={
        "verdict": "undecided", "exit_code": 3,
        "checks": [{"name": "max_asr", "limit": 0.1, "verdict": "undecided", "measured": unknown.to_dict()}],
    })  # fmt: skip
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
    page = Checked(run_report(read_run(folder)))
    for said in (
        "an unknown share",
        "undecided",
        "40 of 40 prompts have no answer, because the thought does not end",
        "Warning, after t: safety: 40 of 40 answers open with the same word or mark",
        "(no answer: the thought does not end)",
    ):
        assert said.lower() in page.text.lower()
    assert "nan" not in re.findall(r"\w+", page.text.lower())
