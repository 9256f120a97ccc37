"""Tasks of lm-evaluation-harness by name, with a stand-in that has the harness's published interface."""

from __future__ import annotations

import json
import math
import sys
from types import ModuleType

import pytest

from safecl.config import ConfigError
from safecl.config.model import ModelConfig
from safecl.evaluation import evaluate_target
from safecl.evaluation.harness import HarnessTasks, check_harness, measure_harness
from safecl.evaluation.results.restore import evaluation_from_dict
from safecl.report.run import write_run_report
from tests.evaluation.models import byte_tokenizer, tiny_model

FOUND = {
    "results": {
        "hellaswag": {"alias": "hellaswag", "acc,none": 0.25, "acc_stderr,none": 0.05, "acc_norm,none": 0.5,
                      "acc_norm_stderr,none": 0.1},
        "wikitext": {"alias": "wikitext", "word_perplexity,none": 12.5, "word_perplexity_stderr,none": "N/A"},
    },
    "groups": {"mmlu": {"alias": "mmlu", "acc,none": 0.75, "acc_stderr,none": 0.02}},
    "higher_is_better": {"hellaswag": {"acc": True, "acc_norm": True}, "wikitext": {"word_perplexity": False}},
    "n-samples": {"hellaswag": {"original": 100, "effective": 20}},
}  # fmt: skip


@pytest.fixture
def harness(monkeypatch):
    """Install the stand-in. Returns the arguments of each call of simple_evaluate."""
    calls = []

    def simple_evaluate(**arguments):
        calls.append(arguments)
        return FOUND

    class TaskManager:
        def match_tasks(self, names):
            return [name for name in names if name in ("hellaswag", "wikitext", "mmlu")]

    package, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    package.__spec__ = tasks.__spec__ = object()
    package.simple_evaluate, package.__version__, tasks.TaskManager = simple_evaluate, "0.4.9", TaskManager
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    return calls


def test_the_harness_is_asked_about_the_saved_model_and_its_errors_become_intervals(harness):
    tasks = HarnessTasks(["hellaswag", "wikitext", "mmlu"], limit=20)
    found = measure_harness(ModelConfig(path="runs/a/model"), "bf16", tasks)
    (call,) = harness
    assert call["model_args"] == {"pretrained": "runs/a/model", "dtype": "bfloat16", "trust_remote_code": False}
    assert (call["model"], call["tasks"], call["limit"]) == ("hf", ["hellaswag", "wikitext", "mmlu"], 20)
    assert call["apply_chat_template"] is True
    swag, wiki = found["lm-eval hellaswag"], found["lm-eval wikitext"]
    assert (swag.metric, swag.value.value, swag.value.n, swag.higher_is_better) == ("acc_norm,none", 0.5, 20, True)
    assert swag.value.high - swag.value.value == pytest.approx(1.96 * 0.1, rel=1e-3)
    assert list(swag.details) == ["acc,none"]
    assert not wiki.higher_is_better and math.isinf(wiki.value.high)
    assert found["lm-eval mmlu"].value.value == 0.75


def test_safecl_eval_adds_them_to_the_results_and_the_page(harness, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    result = evaluate_target(tmp_path / "model", output=tmp_path / "eval", harness=HarnessTasks(["hellaswag"]))
    written = json.loads((tmp_path / "eval" / "results.json").read_text())
    (moment,) = map(evaluation_from_dict, written["evaluations"])
    assert moment.tasks["lm-eval hellaswag"].value == result.evaluation.tasks["lm-eval hellaswag"].value
    assert written["provenance"]["lm_eval"] == {
        "tasks": ["hellaswag"], "limit": None, "chat_template": True, "version": "0.4.9"
    }  # fmt: skip
    assert "lm-eval hellaswag" in write_run_report(tmp_path / "eval").read_text()


def test_what_the_harness_does_not_know_is_refused_before_a_model_is_loaded(harness, monkeypatch):
    with pytest.raises(ConfigError, match="no task or group is named helaswag"):
        check_harness(HarnessTasks(["hellaswag", "helaswag"]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="runs in one process"):
        check_harness(HarnessTasks(["hellaswag"]))


def test_a_task_that_cannot_be_loaded_is_a_message(harness, monkeypatch):
    def fails(**arguments):
        raise ValueError("Couldn't reach the Hugging Face Hub for dataset 'hellaswag'")

    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", fails)
    with pytest.raises(ConfigError, match=r"lm-eval hellaswag: .*hellaswag"):
        measure_harness(ModelConfig(path="m"), "auto", HarnessTasks(["hellaswag"]))


def test_without_the_package_the_line_that_installs_it_is_named(monkeypatch):
    from safecl.evaluation import harness as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r'lm-eval is not installed: pip install -e "\.\[eval\]" in the repository of safecl'
    ):
        check_harness(HarnessTasks(["hellaswag"]))
