"""The store of artifacts: each is named by all that it depends on, is built once, and is never taken for another."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch

from safecl.config import ConfigError
from safecl.engine.artifacts import base_model
from safecl.engine.artifacts import store as artifacts
from safecl.engine.artifacts.base_model import model_hash
from safecl.engine.artifacts.store import ArtifactStore, obtain
from tests.engine.scenes import tiny_model

KEY = {"model": "a", "tokenizer": "b", "k": 64}


def test_an_artifact_is_found_only_when_it_was_finished(tmp_path):
    store = ArtifactStore(tmp_path)
    with store.building("fisher", KEY) as folder:
        (folder / "values").write_text("half")
    assert store.find("fisher", KEY) is None
    assert (store.folder_of("fisher", KEY) / "values").exists(), "a stopped build can be gone on with"
    store.finish("fisher", KEY)
    assert store.find("fisher", KEY) == folder
    assert store.find("fisher", KEY | {"k": 32}) is None and store.find("other", KEY) is None


def test_a_folder_that_was_made_with_something_else_is_refused_with_both_values(tmp_path):
    store = ArtifactStore(tmp_path)
    with store.building("fisher", KEY) as folder:
        pass
    store.finish("fisher", KEY)
    described = json.loads((folder / "artifact.json").read_text())
    described["key"]["model"] = "other"
    (folder / "artifact.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="model other there, a here"):
        store.find("fisher", KEY)
    (folder / "artifact.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read; remove"):
        store.find("fisher", KEY)


def test_obtain_builds_once_says_so_and_builds_again_what_is_not_whole(tmp_path):
    store, built, said = ArtifactStore(tmp_path), [], []
    for _ in range(2):
        folder = obtain(store, "cache", KEY, texts=(), build=built.append, note=said.append)
    assert built == [folder]
    assert [line.split(" ")[1] for line in said] == ["built", "reused"]
    obtain(store, "cache", KEY, texts=(), build=built.append, is_whole=lambda folder: len(built) > 1)
    assert built == [folder, folder]


def _slow_build(folder: Path) -> None:
    with (folder / "builds").open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.3)


def _obtain_slowly(store: ArtifactStore, queue) -> None:
    artifacts.SECONDS_BETWEEN_LOOKS = 0.02
    said: list[str] = []
    obtain(store, "cache", KEY, texts=(), build=_slow_build, note=said.append)
    queue.put(said)


def test_of_two_processes_that_want_it_one_builds_and_the_other_waits(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_obtain_slowly, args=(ArtifactStore(tmp_path), queue)) for _ in range(2)]
    for process in processes:
        process.start()
    said = [queue.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert len((ArtifactStore(tmp_path).folder_of("cache", KEY) / "builds").read_text().split()) == 1
    assert sorted(lines[-1].split(" ")[1] for lines in said) == ["built", "reused"]


def obtain_on_a_rank(folder: str, broken: bool = False) -> tuple[str, str]:
    """(folder or error, what was said) on this rank."""
    from safecl.distributed import collectives

    store, said = ArtifactStore(Path(folder)), []
    if broken and collectives.rank() == 0:
        (store.folder_of("cache", KEY)).mkdir(parents=True)
        (store.folder_of("cache", KEY) / "artifact.json").write_text("{")
    collectives.barrier()

    def build(path: Path) -> None:
        (path / f"rank-{collectives.rank()}").touch()

    try:
        return str(obtain(store, "cache", KEY, texts=(), build=build, note=said.append)), said[-1]
    except ConfigError as error:
        return str(error), ""


def test_all_ranks_build_together_and_an_error_of_the_first_is_told_by_all(rank_pool, tmp_path):
    found = rank_pool(2).run(obtain_on_a_rank, folder=str(tmp_path / "a"))
    assert found[0][0] == found[1][0] and "built" in found[0][1]
    assert {path.name for path in Path(found[0][0]).iterdir()} >= {"rank-0", "rank-1", "artifact.json"}
    told = rank_pool(2).run(obtain_on_a_rank, folder=str(tmp_path / "b"), broken=True)
    assert all("cannot be read" in message for message, _ in told)


def test_a_store_that_cannot_be_written_is_told_with_the_setting(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"artifacts\.folder"):
        obtain(ArtifactStore(tmp_path / "file"), "cache", KEY, texts=(), build=lambda folder: None)


def test_the_hash_of_a_model_follows_its_contents_and_not_its_place(tmp_path):
    model = tiny_model()
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
    store = ArtifactStore(tmp_path / "store")
    first = model_hash(str(tmp_path / "one"), store)
    assert model_hash(str(tmp_path / "two"), store) == first == model_hash(str(tmp_path / "one"))
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    model.save_pretrained(tmp_path / "one")
    assert model_hash(str(tmp_path / "one"), store) != first


def test_an_unchanged_model_is_hashed_once(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "model")
    store = ArtifactStore(tmp_path / "store")
    first = model_hash(str(tmp_path / "model"), store)
    monkeypatch.setattr(base_model, "hash_file", lambda path: pytest.fail(f"{path} was read again"))
    assert model_hash(str(tmp_path / "model"), store) == first


def _write(folder: Path) -> None:
    (folder / "values").write_bytes(b"0123456789")


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "longer", "without hashes"])
def test_a_damaged_artifact_is_found_named_and_built_again(tmp_path, damage):
    store, said, built = ArtifactStore(tmp_path), [], []

    def build(folder: Path) -> None:
        built.append(sorted(path.name for path in folder.iterdir()))
        _write(folder)

    folder = obtain(store, "fisher", KEY, texts=(), build=build)
    values, described = folder / "values", folder / "artifact.json"
    if damage == "gone":
        values.unlink()
    elif damage == "without hashes":
        described.write_text(json.dumps({"kind": "fisher", "key": KEY}))
    else:
        values.write_bytes({"flipped": b"0123456788", "cut": b"01234", "longer": b"0123456789x"}[damage])
    obtain(store, "fisher", KEY, texts=(), build=build, note=said.append)
    assert built == [["build.lock", "texts.json"]] * 2, "nothing of the damaged artifact is left for the builder"
    assert said[0].startswith("fisher: ") and said[0].endswith("; it is built again") and str(folder) in said[0]
    assert said[1].startswith("fisher: built") and values.read_bytes() == b"0123456789"
    assert store.damage("fisher", KEY) is None


def test_an_artifact_that_grows_has_no_hashes_of_its_files(tmp_path):
    store, built = ArtifactStore(tmp_path), []
    for _ in range(2):
        folder = obtain(store, "cache", KEY, texts=(), build=lambda folder: built.append(_write(folder)), hashed=False)
        (folder / "values").write_bytes(b"more than before")
    assert len(built) == 1


def test_the_versions_are_those_of_the_packages_and_deepspeed_is_not_imported_for_its_own():
    import subprocess
    import sys

    code = (
        "import sys; from safecl.engine.artifacts.base_model import versions; found = versions(); "
        "assert 'deepspeed' not in sys.modules; import deepspeed, json; "
        "assert found.pop('deepspeed') == deepspeed.__version__; print(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"safecl", "torch", "transformers"} and found["torch"] == str(torch.__version__)
