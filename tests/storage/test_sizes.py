"""Numbers of bytes: their text, and the free bytes of disks and of control groups."""

from __future__ import annotations

import shutil

import pytest

from safecl.storage import sizes
from safecl.storage.control_groups import GroupMemory
from safecl.storage.sizes import available_memory, format_bytes, free_bytes, memory_text


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


def test_what_the_tightest_limit_leaves_is_available(monkeypatch):
    monkeypatch.setattr(sizes, "_machine_available", lambda: 400)
    monkeypatch.setattr(sizes, "tightest_group", lambda: GroupMemory(limit=2_000, left=300))
    assert available_memory() == 300
    assert memory_text() == "300 bytes are available (the control group allows 2.0 kB)"
    monkeypatch.setattr(sizes, "tightest_group", lambda: None)
    assert available_memory() == 400
