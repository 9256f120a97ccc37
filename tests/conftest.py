"""Fixtures that all rooms share."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(__file__).parent.parent / ".torch_ext"))

import pytest

from tests.pool import RankPool

_pools: dict[int, RankPool] = {}


def pytest_collection_modifyitems(items):
    """Tests run on the CPU, also where there is a GPU; those marked `gpu` need DS_ACCELERATOR=cuda."""
    if os.environ["DS_ACCELERATOR"] == "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="ranks are on the CPU: set DS_ACCELERATOR=cuda"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """A user's own prepared data and artifacts are neither used nor filled."""
    os.environ["SAFECL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def rank_pool():
    """`rank_pool(world_size)` gives the shared ranks; a set whose rank died is replaced."""

    def get(world_size: int) -> RankPool:
        if world_size not in _pools or not _pools[world_size].alive:
            _pools[world_size] = RankPool(world_size)
        return _pools[world_size]

    yield get
    for pool in _pools.values():
        pool.close()


@pytest.fixture
def real_data() -> Path:
    """Folder of real data sets, $SAFECL_DATA or ../shared/data; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("SAFECL_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real data here: set SAFECL_DATA to a folder with the files that docs/data.md names")
    return folder
