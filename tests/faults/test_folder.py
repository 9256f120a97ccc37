"""A run folder that vanishes while the run is under way ends the run on all ranks, with its name; a slow one changes
nothing."""

from __future__ import annotations

import pytest

from tests.distributed import stop_scenes
from tests.distributed.test_stopping import what_is_left
from tests.faults import folder_scenes
from tests.faults.test_nonfinite import plain
from tests.training.test_trainer import materials  # noqa: F401  # a fixture


@pytest.mark.parametrize(("how", "step"), [("removed", 3), ("moved", 3), ("replaced", 3), ("removed", None)])
def test_a_run_whose_folder_vanishes_fails_on_all_ranks_and_names_it(rank_pool, materials, tmp_path, how, step):  # noqa: F811
    tree = plain(materials, tmp_path / "run") | {"checkpoint": {"every": 2}}
    cache = str(materials / "cache")
    messages = rank_pool(2).run(folder_scenes.fit, tree=tree, cache=cache, how=how, step=step)
    for message in messages:
        assert message.startswith(f"step 3: the run folder {tmp_path / 'run'} has vanished: it was removed")
    assert not (tmp_path / "run" / "results.json").exists()
    if how == "moved":
        (tmp_path / "moved").rename(tmp_path / "run")
        again = rank_pool(2).run(stop_scenes.fit, tree=tree, cache=cache)[0]
        assert "resuming from step-00000002" in again["said"] and again["results"]["steps"] == 4


def test_a_slow_disk_changes_no_bit_and_is_no_hang(rank_pool, materials, tmp_path):  # noqa: F811
    trees = {name: plain(materials, tmp_path / name) | {"checkpoint": {"every": 2}} for name in ("slow", "fast")}
    trees["slow"]["train"] = trees["slow"]["train"] | {"hang_timeout": 5}
    cache = str(materials / "cache")
    found = rank_pool(2).run(folder_scenes.fit_on_a_slow_disk, tree=trees["slow"], cache=cache, seconds=0.05)[0]
    rank_pool(2).run(stop_scenes.fit, tree=trees["fast"], cache=cache)
    assert found["results"]["steps"] == 4 and not (tmp_path / "slow" / "hangs").exists()
    assert what_is_left(tmp_path / "slow") == what_is_left(tmp_path / "fast")
    assert not (tmp_path / "slow" / "checkpoints" / ".partial").exists()
