"""Numbers of bytes: their text, and the free bytes of disks and of control groups."""

from __future__ import annotations

import shutil

import pytest

from safecl.storage import sizes
from safecl.storage.sizes import available_memory, format_bytes, free_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1_234_567, "1.2 MB"), (1_234_567_890, "1.2 GB"), (5.6e15, "5600.0 TB")],
)
def test_a_number_of_bytes_is_written_in_the_unit_that_fits(count, text):
    assert format_bytes(count) == text


def test_free_bytes_of_a_folder_to_be_made_are_those_of_the_nearest_one_that_exists(tmp_path, monkeypatch):
    asked, disk_usage = [], shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (asked.append(path), disk_usage(path))[1])
    assert free_bytes(tmp_path / "a" / "b") > 0 and asked == [tmp_path]


def test_the_control_groups_limit_counts_and_its_droppable_page_cache_does_not(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 200000\n")
    assert sizes._group_available(tmp_path) == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert sizes._group_available(tmp_path) is None
    monkeypatch.setattr(sizes, "_machine_available", lambda: 400)
    monkeypatch.setattr(sizes, "_group_available", lambda: 300)
    assert available_memory() == 300
