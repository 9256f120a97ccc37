"""Page-locked memory has exactly the size that was asked for, and goes back; CUDA is a stand-in here."""

from __future__ import annotations

import gc
import mmap
import re
from pathlib import Path

import pytest
import torch

from safecl.kernels import page_locked


class Cuda:
    """A CUDA that registers memory, or refuses with a code. A refusal stays pending until a kernel is launched."""

    def __init__(self, refuses: int = 0):
        self.refuses, self.registered, self.pending = refuses, {}, False

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.pending = bool(self.refuses)
        if not self.refuses:
            self.registered[address] = nbytes
        return self.refuses

    def cudaHostUnregister(self, address: int) -> int:
        assert mapped(address), "the memory is unmapped already"
        del self.registered[address]
        return 0

    def launch(self, *arguments, **options) -> None:
        if self.pending:
            self.pending = False
            raise RuntimeError("CUDA error: out of memory")


def mapped(address: int) -> bool:
    ranges = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ", Path("/proc/self/maps").read_text(), re.M)
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)


@pytest.fixture
def cuda(monkeypatch):
    def make(refuses: int = 0) -> Cuda:
        stand_in = Cuda(refuses)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: stand_in)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        return stand_in

    return make


@pytest.mark.parametrize("count", [1, 1025, 5_000_001])
def test_memory_takes_whole_pages_and_is_unlocked_and_unmapped_with_its_last_view(cuda, count):
    stand_in, before = cuda(), page_locked.locked_bytes()
    tensor = page_locked.zeros((count,), torch.float32)
    assert not tensor.any() and tensor.shape == (count,)
    assert stand_in.registered == {tensor.data_ptr(): 4 * count}
    assert 0 <= page_locked.locked_bytes() - before - 4 * count < mmap.PAGESIZE
    address, view = tensor.data_ptr(), tensor[count // 2 :].view(torch.int32)
    del tensor
    gc.collect()
    assert stand_in.registered and not view.any()
    del view
    gc.collect()
    assert not stand_in.registered and page_locked.locked_bytes() == before
    assert count < 10**6 or not mapped(address)


def test_a_copy_has_the_values_and_the_shape(cuda):
    cuda()
    values = torch.randn(3, 5).bfloat16()
    assert torch.equal(page_locked.copy_of(values), values)
    assert page_locked.empty((0, 4), torch.float32).shape == (0, 4)


def test_a_refused_registration_is_named_and_leaves_no_error_behind(cuda, monkeypatch):
    stand_in = cuda(refuses=2)
    monkeypatch.setattr(page_locked.torch, "zeros", stand_in.launch)
    tensor = page_locked.empty((1000,), torch.float32)
    tensor.fill_(1.0)  # the memory is there all the same
    assert "error 2" in page_locked.refusals.pop() and "slower" in page_locked.register(tensor.data_ptr(), 4000)
    stand_in.launch()  # the next kernel of anybody
    del tensor
    gc.collect()
    assert not stand_in.registered
