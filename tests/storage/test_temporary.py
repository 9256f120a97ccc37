"""Temporary folders of killed processes are swept by the next one; those of living processes stay."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import tempfile
from pathlib import Path

import pytest

from safecl.storage.locks import FileLock
from safecl.storage.temporary import _sweep, temporary_folder


class Owner:
    pass


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def make_and_wait(pipe, place: str) -> None:
    tempfile.tempdir = place
    owner = Owner()
    pipe.send(str(temporary_folder("memory", owner)))
    pipe.recv()


def test_a_folder_goes_with_its_owner(tmp_path):
    owner = Owner()
    folder = temporary_folder("memory", owner)
    (folder / "rows").write_text("x")
    assert folder.parent.parent == tmp_path
    del owner
    gc.collect()
    assert not list(tmp_path.glob("safecl-*"))


def test_the_next_process_sweeps_what_a_killed_one_has_left_and_nothing_else(tmp_path):
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=make_and_wait, args=(there, str(tmp_path)))
    process.start()
    left = Path(here.recv())
    (tmp_path / "safecl-memory-unknown").mkdir()
    owner = Owner()
    temporary_folder("memory", owner)
    assert left.is_dir()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    temporary_folder("memory", owner)
    assert not left.parent.exists() and (tmp_path / "safecl-memory-unknown").is_dir()


def test_a_folder_that_is_being_made_is_not_swept(monkeypatch):
    take = FileLock.take

    def late(lock: FileLock) -> bool:
        """Another process sweeps before this one has its lock."""
        monkeypatch.setattr(FileLock, "take", take)
        _sweep("safecl-memory-")
        return take(lock)

    monkeypatch.setattr(FileLock, "take", late)
    owner = Owner()
    assert temporary_folder("memory", owner).is_dir()
