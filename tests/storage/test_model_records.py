"""What was found out about a model is used as long as its files and the packages are the same, and no longer."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from safecl.storage import model_records
from safecl.storage.cache_entries import MODELS
from safecl.storage.model_records import MOST_RECORDS, ModelRecords, model_basis, tokenizer_basis
from tests.catalogue.models import save_model


def test_a_record_is_found_on_its_own_basis_alone(tmp_path):
    records = ModelRecords(tmp_path / "store")
    records.keep("hash a", [["file", 1], ["1.0"]], {"is": "known"})
    records.keep("hash b", [], 0)
    assert records.find("hash a", [["file", 1], ["1.0"]]) == {"is": "known"}
    assert records.find("hash a", [["file", 2], ["1.0"]]) is None
    assert records.find("hash b", []) == 0 and records.find("hash c", []) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"hash a": 5}', '{"hash a": [[]]}', "[" * 10**5, "\0"])
def test_a_damaged_file_is_as_good_as_none_and_is_written_again(tmp_path, content):
    (tmp_path / MODELS).write_text(content)
    records = ModelRecords(tmp_path)
    assert records.find("hash a", []) is None
    records.keep("hash a", [], "known")
    assert records.find("hash a", []) == "known"


def test_the_oldest_records_go_first(tmp_path):
    records = ModelRecords(tmp_path)
    for number in range(MOST_RECORDS + 2):
        records.keep(f"{number}", [], number)
        records.keep("used again", [], number)
    assert records.find("0", []) is None is records.find("2", []) and records.find("3", []) == 3
    assert records.find("used again", []) == MOST_RECORDS + 1


def test_a_store_that_cannot_be_made_stays_as_it_is(tmp_path):
    (tmp_path / "file").write_text("text")
    records = ModelRecords(tmp_path / "file" / "store")
    records.keep("hash a", [], "known")
    assert records.find("hash a", []) is None and (tmp_path / "file").read_text() == "text"


def _keep_some(folder: Path, first: int) -> None:
    for number in range(first, first + 20):
        ModelRecords(folder).keep(f"{number}", [], number)


def test_processes_that_write_at_once_lose_no_record(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_keep_some, args=(tmp_path, 20 * number)) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [ModelRecords(tmp_path).find(f"{number}", []) for number in range(60)] == list(range(60))


def test_the_basis_of_a_model_changes_with_its_files_and_with_the_packages(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "model")
    seen = [(model_basis(str(folder)), tokenizer_basis(str(folder)))]

    def changed() -> tuple[bool, bool]:
        seen.append((model_basis(str(folder)), tokenizer_basis(str(folder))))
        return seen[-1][0] != seen[-2][0], seen[-1][1] != seen[-2][1]

    assert changed() == (False, False)
    (folder / "notes.pdf").write_text("read by nobody")
    assert changed() == (False, False)
    (folder / "tokenizer_config.json").write_text("{} ")
    assert changed() == (False, True)
    (folder / "added_tokens.json").write_text("{}")
    assert changed() == (False, True)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert changed() == (True, True)
    (folder / "model.safetensors").touch()
    assert changed() == (True, False)
    (folder / "modeling_own.py").write_text("")
    assert changed() == (True, True)
    for package in range(len(model_records.package_versions())):
        versions = [*model_records.package_versions()]
        versions[package] = "another"
        monkeypatch.setattr(model_records, "package_versions", lambda versions=versions: versions)
        assert changed() == (True, True)
        monkeypatch.undo()
        assert changed() == (True, True)


def test_an_adapter_and_files_that_cannot_be_read_have_no_basis(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert model_basis(str(tmp_path)) is None is tokenizer_basis(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    assert model_basis(str(tmp_path)) is None
