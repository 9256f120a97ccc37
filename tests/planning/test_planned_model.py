"""A model that was planned with before is not made again, as long as its files and the packages are the same."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest

from safecl.config import ConfigError, ModelConfig, RunConfig
from safecl.planning import model_checks
from safecl.planning.costs import model_shape, planned_model
from safecl.planning.costs.memory_report import MODEL_CODE_BYTES, program_bytes
from safecl.planning.costs.model_shape import ModelShape
from safecl.planning.costs.shapes import trained_model
from safecl.planning.run_plan import plan_run
from safecl.storage import model_records, sizes
from safecl.storage.cache_entries import MODELS
from safecl.storage.model_records import ModelRecords
from tests.catalogue.models import rewrite, save_model, without_head


@pytest.fixture
def made(monkeypatch):
    """Counts how often the model's structure is made, for its outline or from its settings."""
    count = mock.Mock(side_effect=planned_model.empty_model)
    monkeypatch.setattr(planned_model, "empty_model", count)
    return count


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFECL_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"what is {i} plus {i}", "completion": f"the answer is {2 * i}"} for i in range(30)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_model(tmp_path / "model")

    def write(methods: dict | None = None, max_length: int = 256, **model) -> RunConfig:
        tree = {
            "model": {"path": str(tmp_path / "model"), "dtype": "fp32"} | model,
            "tasks": [{"name": "t", "train": str(tmp_path / "t.jsonl")}],
            "train": {"allow_few_steps": True, "max_steps": 2, "max_length": max_length},
            "output": str(tmp_path / "out"),
        }
        return RunConfig.model_validate(tree | ({} if methods is None else {"methods": methods}))

    return write


def test_a_second_plan_makes_no_model_and_says_the_same(config, made, tmp_path):
    rewrite(tmp_path / "model", lambda tensors: tensors | {"v_head.weight": tensors["lm_head.weight"].clone()})
    first = plan_run(config())
    assert made.call_count == 1
    assert plan_run(config()).notes == first.notes != []
    assert ModelShape.without_activations(trained_model(config()).outline) == ModelShape.without_activations(
        planned_model.PlannedModel.of(trained_model(config()).structure()).outline
    )
    assert made.call_count == 2, "the test itself asks for one"


def _longer_table(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 8}))


def _without_unused(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors | {"v_head.weight": tensors["lm_head.weight"].clone()})


@pytest.mark.parametrize(
    ("change", "note"), [(_longer_table, "the model positions for 8"), (_without_unused, "1 unused tensor")]
)
def test_changed_settings_and_weights_are_seen_again(config, made, tmp_path, change, note):
    assert not any(note in told for told in plan_run(config()).notes)
    change(tmp_path / "model")
    for _ in range(2):
        assert any(note in told for told in plan_run(config()).notes)
    assert made.call_count == 2


def test_another_version_of_a_package_makes_the_model_again(config, made, monkeypatch):
    plan_run(config())
    monkeypatch.setattr(model_records, "package_versions", lambda: ["another"])
    plan_run(config())
    assert made.call_count == 2


def test_a_refused_model_is_refused_again_in_the_same_words(config, tmp_path):
    rewrite(tmp_path / "model", without_head)
    told = []
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"tensor lm_head\.weight is missing") as refused:
            plan_run(config())
        told.append(str(refused.value))
    assert told[0] == told[1] and "outline" not in (tmp_path / "cache" / "artifacts" / MODELS).read_text()


def test_weights_that_are_damaged_after_a_check_are_refused(config, tmp_path):
    plan_run(config())
    rewrite(tmp_path / "model", without_head)
    with pytest.raises(ConfigError, match=r"tensor lm_head\.weight is missing"):
        plan_run(config())


def test_a_folder_that_no_library_may_read_is_refused_though_its_model_is_known(config, tmp_path):
    (tmp_path / "elsewhere.json").write_text("{}")
    trained_model(config()).keep(())
    (tmp_path / "model" / "generation_config.json").unlink()
    (tmp_path / "model" / "generation_config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ConfigError, match="outside of the folder"):
        trained_model(config())


@pytest.mark.parametrize("value", [None, 1, {}, {"notes": []}, {"notes": [], "outline": {"layers": []}}])
def test_a_damaged_record_is_made_again(config, made, value):
    plan_run(config())
    known = trained_model(config())
    records, name = ModelRecords.of(config()), f"outline {config().model.path}"
    whole = records.find(name, known.counts.basis)
    records.keep(name, known.counts.basis, value)
    plan_run(config())
    assert made.call_count == 2 and records.find(name, known.counts.basis) == whole


def test_code_that_is_trusted_decides_a_model_each_time(config, made, tmp_path):
    for _ in range(2):
        plan_run(config(trust_remote_code=True))
    assert made.call_count == 2 and not (tmp_path / "cache" / "artifacts" / MODELS).exists()


def test_adapters_are_made_and_checked_though_the_model_is_known(config, made):
    lora = {"r": 2, "target_modules": ["q_proj", "embed_tokens"]}
    notes = [plan_run(config(methods={"l2_sp": {}}, lora=lora)).notes for _ in range(2)]
    assert notes[0] == notes[1] and any("is not pulled" in note for note in notes[0])
    with pytest.raises(ConfigError, match="no module is named q_porj; did you mean q_proj"):
        plan_run(config(lora={"r": 2, "target_modules": ["q_porj"]}))
    assert made.call_count == 3


def test_bytes_of_passes_are_counted_once_for_each_shape_and_way_to_train(config, monkeypatch):
    counted = mock.Mock(side_effect=model_shape.activation_bytes)
    monkeypatch.setattr(model_shape, "activation_bytes", counted)
    plan_run(config())

    def activations(**changes) -> int:
        return ModelShape.of(trained_model(config(**changes)), config(**changes)).activations

    ways = [{}, {"max_length": 64}, {"gradient_checkpointing": False}, {"lora": {"r": 2}}, {"dtype": "bf16"}]
    ways.append({"attention": "eager"})
    found = [activations(**way) for way in ways]
    assert counted.call_count == len(ways) and len(set(found)) > 4
    assert [activations(**way) for way in ways] == found and counted.call_count == len(ways)
    monkeypatch.setattr(model_records, "package_versions", lambda: ["another"])
    assert activations() == found[0] and counted.call_count == len(ways) + 1


def test_an_evaluation_is_counted_once(config, monkeypatch):
    from safecl.planning.passes import Inference, Passes

    counted = mock.Mock(side_effect=model_shape.inference_bytes)
    monkeypatch.setattr(model_shape, "inference_bytes", counted)
    plan_run(config())

    def evaluation(*sizes: int) -> int:
        return ModelShape.of(trained_model(config()), config(), Passes((1, 8), scored=Inference(*sizes))).evaluation

    found = [evaluation(2, 8), evaluation(2, 16), evaluation(4, 8), evaluation(2, 8, 4)]
    assert len(set(found)) == 3 and counted.call_count == 4
    assert [evaluation(2, 8), evaluation(2, 16), evaluation(4, 8), evaluation(2, 8, 4)] == found
    assert counted.call_count == 4


def test_only_so_many_counts_of_a_model_are_kept(config, monkeypatch):
    monkeypatch.setattr(planned_model, "MOST_COUNTS", 2)
    counts, model = trained_model(config()).counts, ModelConfig(path="unused")

    def found(number: int, value: int) -> int:
        return counts.of(model, [number], lambda: value)

    assert [found(number, number) for number in range(3)] == [0, 1, 2]
    assert [found(number, 9) for number in (1, 2, 0)] == [1, 2, 9]


def test_without_kept_data_the_records_lie_in_the_run_folder(config, tmp_path):
    private = config().model_copy(update={"privacy": config().privacy.model_copy(update={"keep_prepared": False})})
    plan_run(private)
    assert (tmp_path / "out" / "artifacts" / MODELS).exists() and not (tmp_path / "cache").exists()


def test_a_process_without_the_code_of_models_plans_for_it(monkeypatch):
    import sys

    import transformers.modeling_utils  # noqa: F401

    monkeypatch.setattr("safecl.planning.costs.memory_report.resident_bytes", lambda: 100)
    assert program_bytes() == 100
    monkeypatch.delitem(sys.modules, "transformers.modeling_utils")
    assert program_bytes() == 100 + MODEL_CODE_BYTES


def test_finite_weights_are_still_found_out_once(config, monkeypatch):
    work = mock.Mock()
    monkeypatch.setattr(model_checks, "_check_weights_are_finite", work)
    for _ in range(2):
        model_checks.check_weights_are_finite(config())
    assert work.call_count == 1 and sizes.resident_bytes() > 0
