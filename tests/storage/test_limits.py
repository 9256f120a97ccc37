"""Limits of the process that no run can live with are refused by their numbers, before anything is loaded."""

from __future__ import annotations

import errno
import resource
import tempfile

import pytest

from safecl.config import ConfigError
from safecl.storage import limits, sizes
from safecl.storage.cache_folder import cache_folder

UNLIMITED = resource.RLIM_INFINITY


@pytest.fixture
def set_limits(monkeypatch):
    """`set_limits(RLIMIT_NOFILE=(soft, hard))`: what the process has, and what it sets."""
    changed: dict[int, tuple[int, int]] = {}

    def fake(**values: tuple[int, int]) -> dict[int, tuple[int, int]]:
        known = {getattr(resource, name): pair for name, pair in values.items()}
        monkeypatch.setattr(resource, "getrlimit", lambda what: known.get(what, (UNLIMITED, UNLIMITED)))
        monkeypatch.setattr(resource, "setrlimit", lambda what, pair: changed.update({what: pair}))
        return changed

    return fake


def test_the_soft_limit_of_open_files_is_raised_and_a_low_hard_one_is_refused(set_limits):
    changed = set_limits(RLIMIT_NOFILE=(256, 1_000_000))
    limits.check_limits()
    assert changed == {resource.RLIMIT_NOFILE: (limits.ENOUGH_FILES, 1_000_000)}
    set_limits(RLIMIT_NOFILE=(24, 64))
    with pytest.raises(ConfigError, match=r"only 64 files \(ulimit -Hn\); a run needs 128 at least"):
        limits.check_limits()


def test_too_little_address_space_is_refused_with_what_suffices(set_limits):
    set_limits(RLIMIT_AS=(700 * 10**6, UNLIMITED))
    with pytest.raises(ConfigError, match=r"only 700.0 MB of address space .* alone need 3.2 GB"):
        limits.check_limits()


def test_no_place_for_temporary_files_is_refused(monkeypatch):
    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    monkeypatch.setenv("TMPDIR", "/full")
    with pytest.raises(ConfigError, match=r"TMPDIR \(/full\) and /tmp are full, read-only or absent"):
        limits.check_limits()


def test_a_cache_that_cannot_be_made_is_refused_with_the_variable_that_moves_it(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SAFECL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        ConfigError, match=r"the cache .*file/cache cannot be written: Not a directory; set SAFECL_CACHE"
    ):
        limits.check_cache()
    monkeypatch.delenv("SAFECL_CACHE")
    monkeypatch.setattr(limits.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(ConfigError, match="there is no home folder for the cache: set SAFECL_CACHE"):
        cache_folder()


def test_the_limit_of_address_space_counts_as_available_memory(set_limits, monkeypatch):
    set_limits(RLIMIT_AS=(10**13, UNLIMITED))
    monkeypatch.setattr(sizes, "_machine_available", lambda: None)
    monkeypatch.setattr(sizes, "tightest_group", lambda: None)
    free = sizes.available_memory()
    assert free is not None and 0.9 * 10**13 < free < 10**13
    assert "ulimit -v allows 10.0 TB" in sizes.memory_text()
