"""Checkpoint files: whole or detected, whatever happens to the process or to the bytes."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

import safecl
from safecl.engine.checkpoint.format import MANIFEST, OtherFormat, dump_manifest, read_contents, read_manifest
from safecl.engine.checkpoint.publishing import CheckpointFolder, superseded
from safecl.storage import durable
from safecl.storage.durable import DamagedCheckpoint
from safecl.storage.safetensors_file import read_header
from tests.engine.checkpoint import checkpoint_files as files
from tests.engine.checkpoint.mutations import MUTATIONS, mutate


@pytest.fixture
def tmp_path(tmp_path):
    """Thousands of fsyncs: in memory where that is possible."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="safecl-test-") as path:
        yield Path(path)


@pytest.fixture
def folder(tmp_path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints")


def test_what_was_saved_is_read_back_by_the_ranges_of_any_number_of_ranks(folder):
    for step, writers in ((10, 1), (20, 2), (30, 5)):
        files.write_checkpoint(folder, step=step, world_size=writers)
        contents, problems = files.newest_whole(folder)
        assert not problems and contents.manifest.step == step
        assert all(files.holds(contents, seed=0, step=step, world_size=readers) for readers in (1, 2, 3, 7))
        assert not files.holds(contents, seed=1, step=step)


def test_the_safetensors_library_reads_the_files_and_safecl_reads_the_librarys(folder, tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    target = files.write_checkpoint(folder, step=10)
    with safe_open(target / "rank-00000.safetensors", "np") as opened:
        slices = [key for key in opened.keys() if key.startswith("ema|")]
        for key in slices:
            _, name, offset = key.split("|")
            expected = files.values_of(0, 10, "ema", name).view(np.float32)[int(offset) :]
            assert opened.get_tensor(key).tobytes() == expected[: opened.get_slice(key).get_shape()[0]].tobytes()
        assert len(slices) == 3 and opened.metadata() == {"random": "{}"}
    save_file(
        {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(3, np.int64)},
        tmp_path / "theirs.safetensors",
        {"k": "v"},
    )
    tensors, metadata = read_header(tmp_path / "theirs.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {"a": (2, 3), "b": (3,)} and metadata == {
        "k": "v"
    }


# ---------------------------------------------------------------------------------------------------------------- kills


def test_a_process_killed_at_any_point_of_a_save_leaves_the_old_or_the_new_checkpoint(tmp_path):
    points = files.points_of(lambda: files.write_checkpoint(CheckpointFolder(tmp_path / "dry"), step=10, world_size=3))
    assert len(points) > 20 and {"before the rename", "renamed", "latest: created", "latest written"} <= set(points)
    codes = []
    for number in range(len(points) + 6):  # deletions add points
        for seed in range(2):
            code, problem = files.survives_a_kill(tmp_path / f"{number}-{seed}", number, seed)
            assert not problem, (number, seed, problem)
            codes.append(code)
    assert codes.count(files.EXIT_AT_POINT) > 1.5 * len(points)


def test_the_proof_by_kills_bites_a_save_that_publishes_before_all_files_are_written(tmp_path, monkeypatch):
    def publish_early(self, manifest):
        os.rename(self.partial, self.path / manifest.name)
        durable.at("renamed")
        durable.write_file(self.path / manifest.name / MANIFEST, [dump_manifest(manifest)])
        return self.path / manifest.name

    monkeypatch.setattr(CheckpointFolder, "publish", publish_early)
    problems = [files.survives_a_kill(tmp_path / str(number), number, seed=0)[1] for number in range(30)]
    assert any("damaged checkpoint under a good name" in problem for problem in problems)


def test_everything_is_on_the_disk_before_the_rename_that_publishes_it(folder, monkeypatch):
    """A power cut keeps only what was fsynced: the order of writes, fsyncs and renames is what protects."""
    events = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def traced_fsync(handle):
        events.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(("rename", os.path.basename(b))), rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("rename", os.path.basename(b))), replace(a, b)))
    target = files.write_checkpoint(folder, step=10, world_size=2)
    published = events.index(("rename", "step-00000010"))
    synced = [name for event, name in events[:published] if event == "sync"]
    assert set(synced[:-1]) >= {p.name for p in target.iterdir()}  # every file of the checkpoint
    assert synced[-1] == ".partial"  # then the folder that holds their names
    assert events[published + 1] == ("sync", "checkpoints")
    latest = events.index(("rename", "latest"))
    assert (
        latest > published
        and events[latest - 1] == ("sync", ".latest.partial")
        and events[latest + 1] == ("sync", "checkpoints")
    )


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("kind", MUTATIONS)
def test_no_change_of_a_checkpoints_bytes_or_names_stays_undetected(tmp_path, kind):
    original = CheckpointFolder(tmp_path / "original")
    files.write_checkpoint(original, step=10, seed=5)
    files.write_checkpoint(original, step=20, seed=5)
    for seed in range(40):
        folder = CheckpointFolder(tmp_path / str(seed))
        shutil.copytree(original.path, folder.path)
        what = mutate(folder.path / "step-00000020", kind, seed)
        contents, problems = files.newest_whole(folder)
        assert problems, f"undetected: {what}"
        assert contents.manifest.step == 10 and files.holds(contents, seed=5, step=10), what


def test_a_wrong_latest_changes_nothing(folder):
    files.write_checkpoint(folder, step=10)
    for text in ("step-00000099\n", "../../etc", ""):
        (folder.path / "latest").write_text(text)
        assert files.newest_whole(folder)[0].manifest.step == 10


def test_nothing_in_safecl_unpickles_a_file():
    sources = {path: path.read_text(encoding="utf-8") for path in Path(safecl.__file__).parent.rglob("*.py")}
    found = re.compile(r"torch\.load\(|\bpickle\.|import pickle|allow_pickle=True|joblib")
    assert len(sources) > 50 and not [path for path, text in sources.items() if found.search(text)]


def test_links_are_refused_in_a_checkpoint(folder, tmp_path):
    target = files.write_checkpoint(folder, step=10)
    (tmp_path / "outside").write_bytes((target / "state.json").read_bytes())
    (target / "state.json").unlink()
    (target / "state.json").symlink_to(tmp_path / "outside")
    with pytest.raises(DamagedCheckpoint, match=r"state\.json"):
        read_contents(target)


def test_a_folder_reached_by_a_link_is_no_checkpoint_and_is_never_deleted(folder, tmp_path):
    files.write_checkpoint(folder, step=10)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    for name in ("step-00000020", ".partial", ".deleting-step-00000001", "damaged-step-00000002"):
        (folder.path / name).symlink_to(outside)
    assert folder.names() == ["step-00000010"]
    files.write_checkpoint(folder, step=30, keep=1)
    assert (outside / "precious").read_text() == "x"


@pytest.mark.parametrize("name", ["../../evil", "/etc/passwd", "a/b", "..", "", MANIFEST, ".hidden"])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(folder, name):
    target = files.write_checkpoint(folder, step=10)
    _rewrite_manifest(target, lambda values: values["files"].update({name: values["files"]["state.json"]}))
    with pytest.raises(DamagedCheckpoint, match="which no checkpoint has"):
        read_manifest(target)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(version=3),
        lambda values: values.update(format="another"),
        lambda values: values.update(surprise=1),
        lambda values: values.update(finite=7),
        lambda values: values.pop("kinds"),
        lambda values: values.update(kinds=7),
        lambda values: values.update(step="many"),
        lambda values: values["files"].update({"state.json": 7}),
        lambda values: values["parameters"].update({"head.weight": [5, 10]}),
        lambda values: values["parameters"].update({"other.weight": [5]}),
        lambda values: values["parameters"].pop("head.weight"),
        lambda values: values["kinds"].update({"ema": "F16"}),
        lambda values: values["kinds"].update({"slow": "F32"}),
        lambda values: values["kinds"].pop("ema"),
        lambda values: values["files"].pop("rank-00001.safetensors"),
        lambda values: values.update(name="step-00000011"),
        lambda values: values.update(references={"ema": {"model": "m", "digest": "0", "dtype": "F32"}}),
        lambda values: values.update(references={"slow": {"model": "m"}}),
        lambda values: values.update(references=7),
    ],
)
def test_a_manifest_that_contradicts_the_files_is_refused_even_with_a_right_hash(folder, change):
    target = files.write_checkpoint(folder, step=10)
    read_contents(target)
    _rewrite_manifest(target, change)
    with pytest.raises(DamagedCheckpoint):
        read_contents(target)


def test_another_version_of_the_format_is_refused_with_both_versions_and_is_not_damaged(folder):
    target = files.write_checkpoint(folder, step=10)
    _rewrite_manifest(target, lambda values: values.update(version=7))
    versions = "safecl-checkpoint version 7, this safecl reads safecl-checkpoint versions 1 and 2"
    with pytest.raises(OtherFormat, match=f"{versions}$"):
        read_contents(target)


def _rewrite_manifest(target, change) -> None:
    """Changes a manifest as somebody would who knows how its hash is made."""
    import xxhash

    values = json.loads((target / MANIFEST).read_bytes().partition(b"\n")[2])
    change(values)
    body = json.dumps(values).encode()
    (target / MANIFEST).write_bytes(xxhash.xxh3_128_hexdigest(body).encode() + b"\n" + body)


# ------------------------------------------------------------------------------------------------------------ retention


def test_retention_never_deletes_the_last_whole_and_the_last_finite_checkpoint_in_any_of_10000_histories():
    for seed in range(10_000):
        rng = np.random.default_rng(seed)
        whole = {
            f"step-{step:08d}": bool(rng.integers(0, 3)) for step in rng.choice(50, rng.integers(0, 8), replace=False)
        }
        names, keep = sorted(whole, reverse=True), int(rng.integers(1, 4))
        finite = {name: bool(rng.integers(0, 2)) for name in names}
        gone = set(superseded(names, whole.get, keep, finite.get))
        stay = [name for name in names if name not in gone]
        newest = [name for name in names if whole[name]][:keep]  # as many whole ones as asked for, or all
        fit = [name for name in names if whole[name] and finite[name]][:1]
        assert {name for name in stay if whole[name]} == {*newest, *fit}
        assert not gone or max(gone) < min(newest)  # only what is older than all of these


def test_a_second_checkpoint_of_one_step_gets_its_own_name_and_is_the_newer_one(folder):
    assert [files.write_checkpoint(folder, step=10).name for _ in range(3)] == [
        "step-00000010",
        "step-00000010-1",
        "step-00000010-2",
    ]
    assert folder.names() == ["step-00000010-2", "step-00000010-1"]
    assert (folder.path / "latest").read_text() == "step-00000010-2\n"


def test_damaged_ones_that_were_set_aside_go_when_a_new_one_is_published(folder):
    for step in (10, 20):
        files.write_checkpoint(folder, step=step)
    folder.set_aside("step-00000020")
    assert folder.names() == ["step-00000010"] and folder.free_name(20) == "step-00000020-1"
    files.write_checkpoint(folder, step=30)
    assert sorted(p.name for p in folder.path.iterdir()) == ["latest", "step-00000010", "step-00000030"]


# ----------------------------------------------------------------------------------------------------------------- disk


def test_a_disk_without_room_is_told_before_anything_is_written(folder, monkeypatch):
    files.write_checkpoint(folder, step=10)
    usage = shutil.disk_usage(folder.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"100\.0 kB and 1\.0 kB are free"):
        files.write_checkpoint(folder, step=20)
    assert sorted(p.name for p in folder.path.iterdir()) == ["latest", "step-00000010"]


def test_a_write_that_fails_midway_leaves_the_old_checkpoint(folder, monkeypatch):
    files.write_checkpoint(folder, step=10)
    for number in range(1, 5):
        calls = []

        def full(file, block, calls=calls, number=number, write=durable._write_all):
            calls.append(1)
            if len(calls) == number:
                raise OSError(28, "No space left on device")
            write(file, block)

        with monkeypatch.context() as patch:
            patch.setattr(durable, "_write_all", full)
            with pytest.raises(OSError, match="No space left"):
                files.write_checkpoint(folder, step=20)
        assert folder.names() == ["step-00000010"] and files.newest_whole(folder)[0].manifest.step == 10
    files.write_checkpoint(folder, step=20)
    assert files.newest_whole(folder)[0].manifest.step == 20
