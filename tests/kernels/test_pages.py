"""Huge pages: a large tensor in host memory gets them, keeps its values and its place, and nothing else is touched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from safecl.kernels import pages

LARGE = 3 * pages.SMALLEST_BYTES // 4  # fp32 values


def huge_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the mappings around the tensor that are in huge pages."""
    begin, end, total, inside = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) < end and int(found[2], 16) > begin
        elif inside and line.startswith("AnonHugePages:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(pages.page_bytes() == 0, reason="no huge pages on this system")
def test_a_tensor_that_was_written_already_moves_into_huge_pages_and_keeps_its_values():
    tensor = torch.arange(LARGE, dtype=torch.float32)
    copy, address = tensor.clone(), tensor.data_ptr()
    if huge_bytes(tensor):
        pytest.skip("this system gives huge pages unasked")
    pages.use_huge_pages(tensor)
    assert torch.equal(tensor, copy) and tensor.data_ptr() == address
    if huge_bytes(tensor) < tensor.nbytes - 2 * pages.page_bytes():
        pytest.skip("this kernel moves no memory that was written (Linux < 6.1), or has too few huge pages left")


def test_small_tensors_and_systems_without_huge_pages_are_left_alone(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(
        pages, "_libc", lambda: type("Libc", (), {"madvise": lambda *arguments: calls.append(arguments)})
    )
    monkeypatch.setattr(pages, "page_bytes", lambda: 2**21)
    pages.use_huge_pages(torch.zeros(1000))
    pages.use_huge_pages(None)
    assert not calls
    large = torch.empty(LARGE)
    pages.use_huge_pages(large)
    assert [arguments[-1] for arguments in calls] == [pages.MADV_HUGEPAGE, pages.MADV_COLLAPSE]
    (begin, length) = (arguments := calls[0])[-3].value, arguments[-2].value
    assert (
        large.data_ptr() <= begin < begin + length <= large.data_ptr() + large.nbytes
        and begin % 2**21 == length % 2**21 == 0
    )
    monkeypatch.setattr(pages, "page_bytes", lambda: 0)
    pages.use_huge_pages(large)
    assert len(calls) == 2


def test_a_system_that_has_switched_them_off_is_respected(monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "SETTINGS", tmp_path)
    for setting, size in (("always [madvise] never", 2**21), ("always madvise [never]", 0)):
        (tmp_path / "enabled").write_text(setting)
        (tmp_path / "hpage_pmd_size").write_text(f"{2**21}\n")
        pages.page_bytes.cache_clear()
        assert pages.page_bytes() == size
    monkeypatch.setattr(pages, "SETTINGS", tmp_path / "absent")
    pages.page_bytes.cache_clear()
    assert pages.page_bytes() == 0
    monkeypatch.undo()
    pages.page_bytes.cache_clear()
