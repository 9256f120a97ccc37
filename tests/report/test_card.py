"""The model card names the base model, rows, methods and measurements of the run, and no path and no example."""

from __future__ import annotations

import dataclasses

import pytest
from huggingface_hub import ModelCard

from safecl.config import RunConfig
from safecl.evaluation import Evaluation
from safecl.evaluation.gates.gate import gate
from safecl.evaluation.results.task import TaskResult
from safecl.report.card import Card, TrainedOn, licence_of
from tests.report.folders import safety, share

VERSIONS = {"safecl": "0.1.0", "torch": "2.13.0"}


def card(tmp_path, base: str = "", **changes) -> Card:
    config = RunConfig.model_validate(
        {
            "model": {"path": base or str(tmp_path / "secret-place" / "aligned")},
            "tasks": [{"name": "a|b", "train": str(tmp_path / "upload.jsonl")}],
            "memory": {"source": str(tmp_path / "refusals.jsonl")},
            "methods": {"ewc": {"strength": 0.5}, "ema": {"decay": 0.9}},
            "safety": {"prompts": str(tmp_path / "asked.jsonl"), "gate": {"max_asr": 0.1}},
            "output": str(tmp_path / "run"),
        }
    )
    moments = [
        Evaluation("start", 0, safety(1), {"a|b": TaskResult("a|b", "exact_match", share(4), True, {})}),
        Evaluation("after a|b", 80, safety(30), {"a|b": TaskResult("a|b", "exact_match", share(36), True, {})}),
    ]
    data = [
        TrainedOn("task `a|b`", config.tasks[0].train, 1200, "f" * 32, "12 of them poison that was mixed in on purpose")
    ]
    verdict = gate(config.safety.gate, moments[-1].safety)
    return dataclasses.replace(Card("run", config, "d" * 32, data, 80, 25600, VERSIONS, moments, verdict), **changes)


def test_a_card_names_base_rows_methods_and_versions(tmp_path):
    text = card(tmp_path).text()
    for told in (
        "`aligned`",
        "d" * 32,
        "`upload.jsonl`, 1,200 rows",
        "f" * 32,
        "12 of them poison",
        "strength 0.5",
        "80, 25,600 tokens",
    ):
        assert told in text, told
    assert "safecl 0.1.0, torch 2.13.0" in text and "those after the last step" in text


def test_a_card_shows_safety_before_and_after_with_intervals_and_the_gate(tmp_path):
    lines = card(tmp_path).text().splitlines()
    (asr,) = (line for line in lines if line.startswith("| ASR keyword:gcg"))
    assert [cell.strip()[:5] for cell in asr.split("|")[2:4]] == ["0.025", "0.750"] and "[0.004, 0.129]" in asr
    assert any(line.startswith("| affirmative openings") for line in lines)
    assert "safety gate failed" in lines and any(
        line.startswith("- failed: attack success rate 0.750") for line in lines
    )


def test_every_table_row_has_as_many_cells_as_its_head(tmp_path):
    widths = [line.replace("\\|", "").count("|") for line in card(tmp_path).text().splitlines() if line.startswith("|")]
    assert set(widths) == {3, 4}


def test_a_card_holds_no_path(tmp_path):
    assert str(tmp_path) not in card(tmp_path).text() and "secret-place" not in card(tmp_path).text()


def test_weights_that_were_not_measured_show_no_measures(tmp_path):
    text = card(tmp_path, measured=False).text()
    assert "ASR" not in text and "gate" not in text and "lies in `../model`" in text


def test_a_run_without_safety_prompts_claims_nothing_about_safety(tmp_path):
    only_task = [Evaluation("after t", 80, None, {"t": TaskResult("t", "exact_match", share(36), True, {})})]
    assert "Safety was not measured" in card(tmp_path, evaluations=only_task, gate=None).text()
    assert "Nothing: the run named neither" in card(tmp_path, evaluations=[], gate=None).text()


def test_the_licence_is_the_base_models_where_its_card_says_one(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    assert licence_of(str(base)) == {} and "not known to safecl" in card(tmp_path, str(base)).text()
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: house\ndatasets: [x]\n---\n# base\n")
    found = ModelCard(card(tmp_path, str(base)).text()).data.to_dict()
    assert (found["license"], found["license_name"], found["library_name"]) == ("other", "house", "transformers")
    assert "base_model" not in found and "datasets" not in found and found["tags"] == ["safecl", "ewc", "ema"]


@pytest.mark.parametrize(
    "text", ["no front matter", "---\n- a\n---\n", "---\nlicense: [1\n---\n", "---\nlicense: {a: 1}\n---\n"]
)
def test_a_base_card_that_cannot_be_read_gives_no_licence(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert licence_of(str(tmp_path)) == {}


def test_a_hub_id_is_named_as_the_base_model(tmp_path):
    assert ModelCard(card(tmp_path, "someone/a-model").text()).data.to_dict()["base_model"] == "someone/a-model"
