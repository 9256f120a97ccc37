"""Publishing checkpoints: a folder in which one appears by rename, the last few stay, damaged ones are set aside.

    checkpoints/
      step-00000500/         whole: its name appears when everything in it is on the disk
      latest                 name of the newest one, for people and scripts; safecl looks at the folders
      .partial/              a running save, or an interrupted one
      .deleting-step-.../    an old one that is being deleted
      damaged-step-.../      found damaged when a run was resumed; removed when the next one is published

One process writes here (it holds the run's lock), any process may read. Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from safecl.engine.checkpoint.format import MANIFEST, Manifest, check_sizes, dump_manifest, read_manifest
from safecl.storage import durable
from safecl.storage.durable import DamagedCheckpoint, replace_file, sync_folder, write_file
from safecl.storage.sizes import format_bytes, free_bytes

LATEST = "latest"
PARTIAL = ".partial"
DELETING = ".deleting-"
DAMAGED = "damaged-"
SLACK_BYTES = 2**20  # manifest, folder entries, rounding to blocks

_NAME = re.compile(r"step-([0-9]{8,12})(?:-([0-9]{1,6}))?")


class CheckpointFolder:
    """The folder that holds a run's checkpoints."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def partial(self) -> Path:
        return self.path / PARTIAL

    def names(self) -> list[str]:
        """Names of the published checkpoints, the newest first, whether whole or not."""
        if not self.path.is_dir():
            return []
        names = [p.name for p in self.path.iterdir() if _NAME.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]
        return sorted(names, key=_age, reverse=True)

    def free_name(self, step: int) -> str:
        """Name for a new checkpoint of global step `step`; a second one of the same step gets a number."""
        taken = {p.name.removeprefix(DAMAGED) for p in self.path.iterdir()} if self.path.is_dir() else set()
        base, number = f"step-{step:08d}", 0
        while (name := f"{base}-{number}" if number else base) in taken:
            number += 1
        return name

    # ----------------------------------------------------------------------------------------------------------- saving

    def begin(self, num_bytes: int) -> Path:
        """Make an empty folder for a save of `num_bytes`. Raises OSError where that fails or the disk has no room."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.sweep()
        if (free := free_bytes(self.path)) < num_bytes + SLACK_BYTES:
            raise OSError(
                errno.ENOSPC, f"it takes {format_bytes(num_bytes)} and {format_bytes(free)} are free in {self.path}"
            )
        self.partial.mkdir()
        durable.at("partial folder made")
        return self.partial

    def publish(self, manifest: Manifest) -> Path:
        """Turn the partial folder, whose files are all on the disk, into the checkpoint that the manifest
        describes."""
        target = self.path / manifest.name
        write_file(self.partial / MANIFEST, [dump_manifest(manifest)])
        sync_folder(self.partial)
        durable.at("before the rename")
        os.rename(self.partial, target)
        durable.at("renamed")
        sync_folder(self.path)
        durable.at("published")
        return target

    def point_to(self, name: str) -> None:
        """Write `latest`."""
        replace_file(self.path / LATEST, name + "\n")
        durable.at("latest written")

    def abandon(self) -> None:
        """Remove the files of a failed save."""
        with contextlib.suppress(OSError):
            _remove(self.partial)

    # -------------------------------------------------------------------------------------------------------- retention

    def prune(self, keep: int) -> None:
        """Delete checkpoints that are older than the `keep` newest whole ones, and damaged ones; see `superseded`. Call
        it only after publishing."""
        for name in superseded(self.names(), self.is_whole, keep, self.is_finite):
            os.rename(self.path / name, self.path / (DELETING + name))
            durable.at("marked for deletion")
        for path in self.path.glob(DAMAGED + "*"):
            os.rename(path, self.path / (DELETING + path.name))
        self._remove_marked()

    def discard_after(self, name: str) -> None:
        """Delete the checkpoints of later steps than `name`: those of a course that the run has left."""
        for other in self.names():
            if step_of(other) > step_of(name):
                os.rename(self.path / other, self.path / (DELETING + other))
        self._remove_marked()

    def is_whole(self, name: str) -> bool:
        """True where manifest and sizes are right; hashes are checked when a checkpoint is loaded."""
        try:
            check_sizes(self.path / name, read_manifest(self.path / name))
        except DamagedCheckpoint:
            return False
        return True

    def is_finite(self, name: str) -> bool:
        """True where the checkpoint says that no value of its state is NaN or infinite."""
        try:
            return read_manifest(self.path / name).finite
        except DamagedCheckpoint:
            return False

    def set_aside(self, name: str) -> Path:
        """Rename a damaged checkpoint, so that it no longer counts as one."""
        target = self.path / (DAMAGED + name)
        if target.exists():
            os.rename(target, self.path / f"{DELETING}{target.name}")
        os.rename(self.path / name, target)
        sync_folder(self.path)
        return target

    def sweep(self) -> None:
        """Remove the files of interrupted saves and deletions."""
        _remove(self.partial)
        self._remove_marked()

    def _remove_marked(self) -> None:
        for path in self.path.glob(DELETING + "*"):
            with contextlib.suppress(OSError):  # as on NFS for an open file; the next sweep tries again
                _remove(path)
            durable.at("deleted")


def superseded(
    newest_first: Iterable[str],
    is_whole: Callable[[str], bool],
    keep: int,
    is_finite: Callable[[str], bool] = lambda name: True,
) -> list[str]:
    """Names that are older than the `keep` newest whole ones; none where there are fewer whole ones. The newest whole
    one whose state is finite stays in any case."""
    assert keep >= 1, "the last whole checkpoint always stays"
    whole, has_finite, old = 0, False, []
    for name in newest_first:
        if whole >= keep and has_finite:
            old.append(name)
        elif not is_whole(name):
            if whole >= keep:
                old.append(name)
        elif whole < keep or is_finite(name):
            whole, has_finite = whole + 1, has_finite or is_finite(name)
        else:
            old.append(name)
    return old


def step_of(name: str) -> int:
    """Return the global step of a checkpoint by its name."""
    return _age(name)[0]


def _age(name: str) -> tuple[int, int]:
    match = _NAME.fullmatch(name)
    assert match is not None, name
    return int(match[1]), int(match[2] or 0)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
