"""Loading a checkpoint and writing a model folder take what docs/reliability.md says, however large the files are."""

from __future__ import annotations

import pytest

from tests.engine.checkpoint import memory_scenes

SIZE = dict(hidden=512, layers=5, vocabulary=8000)  # 23.9 M weights: 96 MB of each kind of state
MB = 10**6


@pytest.fixture(autouse=True)
def _peaks_can_be_measured():
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pytest.skip("this system does not let a process reset its peak of memory")


def test_a_rank_that_loads_holds_its_own_share_and_at_most_64_mb(rank_pool, tmp_path):
    numel = rank_pool(1).run(memory_scenes.save_once, folder=str(tmp_path), size=SIZE, stage=1)[0]
    for found in rank_pool(2).run(memory_scenes.peak_of_loading, folder=str(tmp_path), size=SIZE, stage=3):
        assert abs(found["stays"] - 12 * numel / 2) < MB  # moments and EMA, half of each
        assert found["peak"] <= found["stays"] + 64 * MB


def test_writing_a_model_folder_takes_two_of_the_largest_parameters_and_32_mb(rank_pool, tmp_path):
    for found in rank_pool(2).run(memory_scenes.peak_of_exporting, folder=str(tmp_path), size=SIZE, stage=3):
        assert found["model"] > 5 * found["largest"]
        assert found["peak"] <= 2 * found["largest"] + 32 * MB
