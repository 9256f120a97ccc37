"""`safecl cache ls` and `clean` show and remove what is kept; `privacy.keep_prepared: false` keeps nothing."""

from __future__ import annotations

import json
import os
import time

import pytest
import yaml

from safecl.commands.cache.clean import clean_cache, list_cache
from safecl.commands.check import leaving_nothing_prepared
from safecl.config import ConfigError, validate_tree
from safecl.config.training import ArtifactsConfig
from safecl.data.config_rows import prepare_task
from safecl.engine.artifacts.store import ArtifactStore, obtain
from safecl.storage.cache_entries import cache_entries, declare_texts
from safecl.storage.model_records import ModelRecords
from safecl.training.output.results import remove_what_only_an_unfinished_run_needs
from tests.evaluation.models import byte_tokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with rows of two uploads, an artifact, and what a killed process has left."""
    monkeypatch.setenv("SAFECL_CACHE", str(tmp_path / "cache"))
    data, artifacts = tmp_path / "cache" / "data", tmp_path / "cache" / "artifacts"
    for name, source in {"rows-a": "mine.jsonl", "rows-b": "other.jsonl"}.items():
        (data / name).mkdir(parents=True)
        (data / name / "meta.json").write_text(json.dumps({"path": source}))
        (data / name / "tokens").write_bytes(b"x" * 1000)
        (data / f"{name}.lock").touch()
    (data / "rows-c.part-host-1").mkdir()
    (artifacts / "fisher" / "3f2a").mkdir(parents=True)
    (artifacts / "fisher" / "3f2a" / "artifact.json").write_text("{}")
    declare_texts(artifacts / "fisher" / "3f2a", ())
    long_ago = time.time() - 40 * 86400
    os.utime(data / "rows-b" / "meta.json", (long_ago, long_ago))
    return data


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_everything_that_is_kept_is_listed_with_what_holds_text(cache, capsys):
    list_cache(as_json=True)
    found = {entry["of"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert {name: entry["kind"] for name, entry in found.items()} == {
        "mine.jsonl": "rows", "other.jsonl": "rows", "fisher": "artifact", "rows-c.part-host-1": "unfinished",
    }  # fmt: skip
    assert found["mine.jsonl"]["holds_text"] and not found["fisher"]["holds_text"]
    assert found["other.jsonl"]["unused_seconds"] > 39 * 86400 and found["mine.jsonl"]["bytes"] > 1000
    list_cache(as_json=False)
    assert "4 entries" in capsys.readouterr().out


def test_the_rows_of_one_run_are_removed_and_no_others(cache, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"tasks": [{"name": "t", "train": "mine.jsonl"}], "memory": None}))
    clean_cache(run, None, every=False, dry_run=True)
    assert "rows-a" in names(cache) and "1 entries would be removed" in capsys.readouterr().out
    clean_cache(run, None, every=False, dry_run=False)
    assert names(cache) == ["rows-b", "rows-b.lock", "rows-c.part-host-1"]


def test_what_is_derived_from_the_text_of_a_run_says_so_and_goes_with_it_finished_or_not(cache, tmp_path):
    store = ArtifactStore(cache.parent / "artifacts")

    def build(folder):
        (folder / "rows.jsonl").write_text("a question of an upload")

    def stop(folder):
        raise KeyboardInterrupt

    for name, texts in {
        "mine": ["mine.jsonl"],
        "both": ["mine.jsonl", "other.jsonl"],
        "other": ["other.jsonl"],
    }.items():
        obtain(store, "rewritten", {"key": name}, texts=texts, build=build)
    obtain(store, "fisher", {"key": 1}, texts=(), build=build)
    with pytest.raises(KeyboardInterrupt):
        obtain(store, "rewritten", {"key": "stopped"}, texts=["mine.jsonl"], build=stop)
    old = obtain(store, "rewritten", {"key": "an earlier safecl"}, texts=(), build=build)
    (old / "texts.json").unlink()
    held = {str(entry.path): entry.holds_text for entry in cache_entries()}
    assert all(holds for path, holds in held.items() if "rewritten" in path) and len(held) == 4 + 6
    assert not any(holds for path, holds in held.items() if "fisher" in path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"tasks": [{"name": "t", "train": "mine.jsonl"}]}))
    clean_cache(tmp_path / "config.yaml", None, every=False, dry_run=False)
    left = {path.name for path in (store.folder / "rewritten").iterdir() if path.is_dir()}
    assert left == {store.folder_of("rewritten", {"key": "other"}).name, old.name}
    assert len(list((store.folder / "fisher").iterdir())) == 2


def test_an_artifact_that_another_run_uses_again_goes_with_the_files_of_either(cache, tmp_path):
    store = ArtifactStore(cache.parent / "artifacts")
    for file in ("first.jsonl", "a-copy-of-it.jsonl"):
        folder = obtain(store, "rewritten", {"key": 1}, texts=[file], build=lambda folder: None)
    assert json.loads((folder / "texts.json").read_text()) == {"files": ["a-copy-of-it.jsonl", "first.jsonl"]}


def test_what_was_not_used_for_some_time_is_removed(cache):
    clean_cache(None, "30d", every=False, dry_run=False)
    assert names(cache) == ["rows-a", "rows-a.lock", "rows-c.part-host-1"]
    clean_cache(None, None, every=True, dry_run=False)
    assert names(cache) == [] and names(cache.parent / "artifacts" / "fisher") == []


@pytest.mark.parametrize(
    ("arguments", "why"), [((None, None), "say what to remove"), ((None, "a month"), "such as 30d")]
)
def test_a_clean_without_a_choice_removes_nothing(cache, arguments, why):
    with pytest.raises(ConfigError, match=why):
        clean_cache(*arguments, every=False, dry_run=False)
    assert len(names(cache)) == 5


def test_nothing_is_kept_outside_of_the_run_folder_and_nothing_in_it_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFECL_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"say {i}", "completion": "yes"} for i in range(20)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {"model": {"path": "m"}, "tasks": [{"name": "t", "train": str(tmp_path / "t.jsonl")}]}
    output = tmp_path / "run"
    config = validate_tree(tree | {"output": str(output), "privacy": {"keep_prepared": False}}, "test")
    assert ArtifactStore.of(config).folder == output / "artifacts"
    shared = config.model_copy(update={"artifacts": ArtifactsConfig(folder=str(tmp_path / "shared"))})
    assert ArtifactStore.of(shared).folder == tmp_path / "shared"
    with leaving_nothing_prepared(config):
        dataset, _ = prepare_task(config, config.tasks[0], byte_tokenizer())
        assert names(output) == ["prepared"]
    assert len(dataset.row(3).input_ids) > 0, "mapped files stay readable"
    assert not output.exists() and not (tmp_path / "cache" / "data").exists()
    prepare_task(config, config.tasks[0], byte_tokenizer())
    with leaving_nothing_prepared(config):
        pass
    assert names(output) == ["prepared"], "a run's own rows stay"
    remove_what_only_an_unfinished_run_needs(output)
    assert names(output) == []


def test_what_is_known_of_models_is_listed_without_text_and_removed_with_all_else(cache, tmp_path, capsys):
    records = ModelRecords(tmp_path / "cache" / "artifacts")
    records.keep("outline a", [], "known")
    list_cache(as_json=True)
    (found,) = [entry for entry in json.loads(capsys.readouterr().out) if entry["kind"] == "records"]
    assert found["of"] == "models" and not found["holds_text"] and found["bytes"] > 10
    clean_cache(None, "30d", every=False, dry_run=False)
    assert records.find("outline a", []) == "known"
    clean_cache(None, None, every=True, dry_run=False)
    assert records.find("outline a", []) is None
