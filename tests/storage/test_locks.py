"""Locks: one holder at a time, and given back when the holder ends; file systems without locks are told apart."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from safecl.storage.locks import FileLock, waiting_lock


def test_a_lock_has_one_holder_who_is_named_until_it_gives_the_lock_back(tmp_path):
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.take() and not second.take()
    first.sign()
    assert second.holder().startswith(f"process {os.getpid()} on ")
    first.close()
    assert second.take() and second.unsupported is None
    second.close()


def test_a_killed_process_gives_its_lock_back(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from safecl.storage.locks import FileLock\n"
        "lock = FileLock(Path(sys.argv[1])); lock.take(); print('held', flush=True); time.sleep(60)"
    )
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    lock = FileLock(path)
    assert not lock.take()
    holder.kill()
    holder.wait()
    assert lock.take()
    lock.close()


def test_a_file_system_without_locks_is_reported_and_other_errors_are_raised(tmp_path, monkeypatch):
    def refuse(number):
        def flock(handle, flags):
            raise OSError(number, os.strerror(number))

        return flock

    lock = FileLock(tmp_path / "lock")
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    assert lock.take() and lock.unsupported == "No locks available"
    monkeypatch.setattr(fcntl, "flock", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        lock.take()
    with pytest.raises(OSError, match="Input/output error"), waiting_lock(tmp_path / "lock"):
        pass
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    with waiting_lock(tmp_path / "lock"):
        lock.close()


def test_a_waiting_lock_excludes_others_for_its_block_only(tmp_path):
    with waiting_lock(tmp_path / "lock"):
        lock = FileLock(tmp_path / "lock")
        assert not lock.take()
    assert lock.take()
    lock.close()
