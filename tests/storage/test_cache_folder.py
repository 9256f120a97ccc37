"""The cache folder: one reading of $SAFECL_CACHE for everything that is kept there."""

from __future__ import annotations

from pathlib import Path

import pytest

from safecl.storage.cache_folder import artifact_cache, data_cache


def test_the_variable_moves_all_caches_together(monkeypatch, tmp_path):
    monkeypatch.setenv("SAFECL_CACHE", str(tmp_path))
    assert (data_cache(), artifact_cache()) == (tmp_path / "data", tmp_path / "artifacts")


@pytest.mark.parametrize("value", [None, ""])
def test_without_the_variable_or_with_an_empty_one_the_home_folder_holds_all_caches(monkeypatch, tmp_path, value):
    monkeypatch.delenv("SAFECL_CACHE", raising=False)
    if value is not None:
        monkeypatch.setenv("SAFECL_CACHE", value)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    cache = tmp_path / ".cache" / "safecl"
    assert (data_cache(), artifact_cache()) == (cache / "data", cache / "artifacts")
