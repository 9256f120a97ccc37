"""Files beside a checkpoint that are cut, emptied or deleted while a run is stopped: the next start mends them, and the
run ends as if nothing had happened; or it names the file that it cannot make again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed import stop_scenes
from tests.distributed.test_stopping import what_is_left
from tests.training.test_trainer import materials, tree  # noqa: F401  # materials is a fixture

STOP = {"rank": 1, "name": "SIGTERM", "step": 2}


def config(materials, output: Path) -> dict:  # noqa: F811
    changed = tree(materials, output, train={"max_steps": 4}, deepspeed={"stage": 2})
    del changed["safety"]
    return changed | {"methods": {"der": {}, "ewc": {"sign_batches": 4, "rows_per_batch": 4}}}


def _segment(run: Path, cache: Path) -> Path:
    return max(cache.rglob("*.segment"), key=lambda path: path.stat().st_size)


def _cut_a_segment(run: Path, cache: Path) -> None:
    path = _segment(run, cache)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _delete_the_segments(run: Path, cache: Path) -> None:
    for path in cache.rglob("teacher-cache/*/*.segment"):
        path.unlink()


def _delete_the_cache(run: Path, cache: Path) -> None:
    shutil.rmtree(next(cache.rglob("teacher-cache")))


def _delete_the_link(run: Path, cache: Path) -> None:
    (run / "memory" / "outputs.json").unlink()


def _spoil_the_link(run: Path, cache: Path) -> None:
    (run / "memory" / "outputs.json").write_text("{")


@pytest.fixture(scope="module")
def stopped(rank_pool, materials, tmp_path_factory) -> tuple[Path, Path]:  # noqa: F811
    """(folder of a stopped run, its cache)."""
    folder = tmp_path_factory.mktemp("stopped")
    found = rank_pool(2).run(
        stop_scenes.fit, tree=config(materials, folder / "run"), cache=str(folder / "cache"), stop=STOP
    )
    assert all(one["stopped"] for one in found) and "a signal: stopped after step 2" in found[0]["said"]
    return folder / "run", folder / "cache"


@pytest.fixture(scope="module")
def whole(rank_pool, materials, tmp_path_factory) -> dict:  # noqa: F811
    """What a run that nobody disturbs leaves."""
    folder = tmp_path_factory.mktemp("whole")
    rank_pool(2).run(stop_scenes.fit, tree=config(materials, folder / "run"), cache=str(folder / "cache"))
    return what_is_left(folder / "run")


@pytest.mark.parametrize(
    "damage", [_cut_a_segment, _delete_the_segments, _delete_the_cache, _delete_the_link, _spoil_the_link]
)
def test_a_resumed_run_mends_the_outputs_of_its_memory(
    rank_pool,
    materials,  # noqa: F811
    tmp_path,
    stopped,
    whole,
    damage: Callable[[Path, Path], None],
):
    run, cache = (Path(shutil.copytree(path, tmp_path / path.name)) for path in stopped)
    if damage not in (_delete_the_link, _spoil_the_link):
        link = run / "memory" / "outputs.json"
        link.write_text(link.read_text().replace(str(stopped[1]), str(cache)))
    damage(run, cache)
    said = rank_pool(2).run(stop_scenes.fit, tree=config(materials, run), cache=str(cache))[0]["said"]
    assert "resuming from step-00000002" in said
    assert what_is_left(run) == whole


@pytest.fixture(scope="module")
def keeping(rank_pool, materials, tmp_path_factory) -> tuple[dict, Path]:  # noqa: F811
    """(config, cache) of a stopped run with every side file that only the aligned model can write."""
    folder = tmp_path_factory.mktemp("keeping")
    given = tree(materials, folder / "run", train={"max_steps": 4}, deepspeed={"stage": 2})
    given |= {
        "methods": {
            "sbr": {"prompts": 3, "pool": 8},
            "constrained_sft": {"beta": 0.5},
            "lwf": {"form": "output", "k": 4},
        }
    }
    given["safety"] = {"prompts": given["safety"]["prompts"], "max_new_tokens": 2, "drift": {"rows": 4}}
    found = rank_pool(2).run(stop_scenes.fit, tree=given, cache=str(folder / "cache"), stop=STOP)
    assert all(one["stopped"] for one in found)
    return given, folder / "cache"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("aligned-outputs.npz", _cut),
        ("anchors/*.npz", Path.unlink),
        ("scores/*.npz", lambda path: path.write_bytes(b"")),
        ("teacher/*/index.npy", _cut),
        ("teacher/*/rank-00001.bin", _cut),
    ],
)
def test_a_resumed_run_names_the_side_file_that_it_cannot_make_again(rank_pool, keeping, pattern, damage):
    given, cache = keeping
    [path] = Path(given["output"]).glob(pattern)
    whole = path.read_bytes()
    damage(path)
    said = rank_pool(2).run(stop_scenes.refused, tree=given, cache=str(cache))
    path.write_bytes(whole)
    assert all(str(path) in one and "start it anew" in one for one in said), said


def test_a_run_whose_side_files_are_whole_again_resumes_and_measures(rank_pool, keeping):
    given, cache = keeping
    found = rank_pool(2).run(stop_scenes.fit, tree=given, cache=str(cache))[0]
    assert "resuming from step-00000002" in found["said"]
    [scores] = cache.rglob("row-scores/*/texts.json")
    assert json.loads(scores.read_text()) == {"files": [given["tasks"][0]["train"]]}
    start, end = (each["kl_to_aligned"] for each in found["results"]["evaluations"])
    assert start["value"] == pytest.approx(0.0, abs=1e-6) and end["value"] > 1e-4
