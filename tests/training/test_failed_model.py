"""A model that did not pass the gate lies in model-failed/, and everything that reads a run's model knows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from safecl.config import ConfigError, load_config
from tests.training.test_trainer import fit, materials, tree  # noqa: F401  # a fixture

GATE = {"max_asr": 0.44}
"""Decidable with the five prompts, and failed by a random model, which never refuses."""


@pytest.fixture(scope="module")
def failed(rank_pool, materials, tmp_path_factory) -> tuple[Path, dict]:  # noqa: F811
    output = tmp_path_factory.mktemp("failed")
    config = tree(materials, output, methods={}, safety={"gate": GATE}, train={"max_steps": 2}, deepspeed={"stage": 1})
    return output, rank_pool(1).run(fit, tree=config, cache=str(materials / "cache"))[0]


def test_a_model_that_failed_is_written_to_model_failed_and_never_to_model(failed):
    folder, results = failed
    assert results["gate"]["verdict"] == "failed" and results["gate"]["exit_code"] == 3
    assert (folder / "model-failed" / "config.json").is_file() and not (folder / "model").exists()
    assert "safety gate failed" in (folder / "model-failed" / "README.md").read_text()
    assert [each["gate"]["verdict"] for each in results["evaluations"]] == ["failed", "failed"]


def test_the_same_command_reports_the_verdict_again_and_fresh_refuses_the_folder(failed, rank_pool, materials):  # noqa: F811
    from safecl.training.folder import RunFolder

    folder, results = failed
    again = rank_pool(1).run(fit, tree=load_config(folder / "config.yaml").model_dump(), cache=str(materials / "cache"))
    assert again[0] == json.loads((folder / "results.json").read_text()) == results
    with pytest.raises(ConfigError, match="model-failed"):
        RunFolder(folder).refuse_to_overwrite()


def test_eval_and_memory_show_take_the_failed_model_and_a_next_run_is_told(failed, tmp_path):
    from safecl.data.hub import refuse_missing_folder
    from safecl.evaluation.answers.folders import check_is_model, name_of
    from safecl.storage.model_folder import tuned_model

    folder, _ = failed
    assert tuned_model(folder) == folder / "model-failed" and name_of(folder / "model-failed") == folder.name
    for refuse in (check_is_model, lambda path: refuse_missing_folder("model.path", str(path))):
        with pytest.raises(ConfigError, match=r"did not pass its gate, and lies in .*model-failed"):
            refuse(folder / "model")
    with pytest.raises(ConfigError, match=r"did you mean .*model-failed"):
        check_is_model(folder)
    shutil.copytree(folder / "model-failed", tmp_path / "run" / "model")
    assert tuned_model(tmp_path / "run") == tmp_path / "run" / "model" and tuned_model(tmp_path) is None
