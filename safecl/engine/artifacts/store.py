"""What is worked out once for a base model and used by every run on it: teacher outputs, Fisher information, memory
rows.

    $SAFECL_CACHE/artifacts/            by default ~/.cache/safecl/artifacts, or the config's `artifacts.folder`
        teacher-cache/3f2a.../          one artifact: KIND / hash of its key
            artifact.json               its whole key; written last, so that it says: finished
            ...                         what the builder put there
        models.json                     hashes of models, so that a large one is read once

An artifact is named by everything that it depends on: base model, tokenizer, settings. It is built where it is missing,
by one run at a time (others wait), and used by all after that. A builder that was stopped finds what it left, and goes
on. In a run:

    store = ArtifactStore.of(config)
    key = base_key(config, tokenizer, store) | {"rows": fingerprint(rows), "sign_batches": 64}
    folder = obtain(store, "fisher", key, build=lambda folder: write_fisher(folder), note=run.log)        # every rank calls it

Imports no torch but for `base_key` and `obtain`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from safecl.config import ConfigError, RunConfig
from safecl.replay.rows import ReplayError
from safecl.storage.cache_folder import default_folder
from safecl.storage.durable import replace_file

T = TypeVar("T")
Key = Mapping[str, "str | int | float | bool | None"]
"""What an artifact depends on, by name; the hashes of model and tokenizer among it."""

DESCRIPTION, LOCK, MODELS = "artifact.json", "build.lock", "models.json"
SECONDS_BETWEEN_LOOKS = 1.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class ArtifactStore:
    """A folder of artifacts. Several nodes need a shared one."""

    folder: Path

    @classmethod
    def of(cls, config: RunConfig) -> ArtifactStore:
        """The store that the config names, or the default one."""
        return cls(Path(config.artifacts.folder).expanduser() if config.artifacts.folder else default_folder())

    def folder_of(self, kind: str, key: Key) -> Path:
        """Where this artifact is, or would be."""
        return self.folder / kind / hashlib.blake2b(_text(key).encode(), digest_size=12).hexdigest()

    def find(self, kind: str, key: Key) -> Path | None:
        """The folder of a finished artifact, None where there is none. Raises ConfigError for one that was made with
        something else."""
        folder = self.folder_of(kind, key)
        try:
            found = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["key"]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{folder / DESCRIPTION}: cannot be read; remove {folder}, and it is built again"
            ) from None
        refuse_other_key(found, key, folder)
        return folder

    def finish(self, kind: str, key: Key) -> Path:
        """Declares the artifact finished, once all that belongs to it is on the disk."""
        folder = self.folder_of(kind, key)
        replace_file(folder / DESCRIPTION, json.dumps({"kind": kind, "key": dict(key)}, indent=1))
        return folder

    @contextlib.contextmanager
    def building(self, kind: str, key: Key) -> Iterator[Path | None]:
        """The artifact's folder, made where it is missing, for this process alone; None where another process has it
        just now.

        Raises ConfigError where the folder cannot be made.
        """
        folder = self.folder_of(kind, key)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(
                f"artifacts.folder: {folder}: cannot be written: {error.strerror}; name another folder with artifacts.folder=... or "
                "$SAFECL_CACHE"
            ) from None
        try:
            yield folder if _locked(handle) else None
        finally:
            os.close(handle)


def refuse_other_key(found: Key, wanted: Key, where: Path) -> None:
    """ConfigError naming every part of the key that differs, with both values."""
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if names:
        differing = "; ".join(f"{name} {found.get(name)} there, {wanted.get(name)} here" for name in names)
        raise ConfigError(f"{where}: made with something else: {differing}; remove the folder, and it is built again")


def _text(key: Key) -> str:
    return json.dumps(dict(key), sort_keys=True)


def _locked(handle: int) -> bool:
    """Takes the lock; True as well on file systems that have none, where two builders write the same anyway."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


# ------------------------------------------------------------------------------------------------------------- in a run


def obtain(
    store: ArtifactStore,
    kind: str,
    key: Key,
    *,
    build: Callable[[Path], None],
    note: Callable[[str], None] = lambda message: None,
    is_whole: Callable[[Path], bool] = lambda folder: True,
) -> Path:
    """The folder of an artifact, built where it is missing. A collective call: every rank gets the same folder.

    `build(folder)` runs on every rank and returns when what it wrote is on the disk; it may find what a stopped build
    has left. `is_whole(folder)` says on rank 0 whether a finished artifact has all that is needed, for those that grow.
    What is reused, built or waited for is told through `note`. Raises ConfigError.
    """
    from safecl.distributed import collectives

    folder, waits, began = store.folder_of(kind, key), False, time.monotonic()
    while True:
        with contextlib.ExitStack() as lock:
            state = asked_of_first(lambda: _look(store, kind, key, is_whole, lock))
            if state == "there":
                note(f"{kind}: reused from {folder}")
                return folder
            if state == "ours":
                build(folder)
                collectives.barrier()
                asked_of_first(lambda: store.finish(kind, key))
                note(f"{kind}: built in {folder}, {time.monotonic() - began:.1f} s")
                return folder
        if not waits:
            note(f"{kind}: another process is building it in {folder}; waiting")
        waits = True
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _look(
    store: ArtifactStore, kind: str, key: Key, is_whole: Callable[[Path], bool], lock: contextlib.ExitStack
) -> Literal["there", "ours", "theirs"]:
    """Whether an artifact is there, or is ours to build, its lock taken, or another process is at it."""
    if _is_there(store, kind, key, is_whole):
        return "there"
    if lock.enter_context(store.building(kind, key)) is None:
        return "theirs"
    # The other process may have finished between the look and the lock.
    return "there" if _is_there(store, kind, key, is_whole) else "ours"


def _is_there(store: ArtifactStore, kind: str, key: Key, is_whole: Callable[[Path], bool]) -> bool:
    folder = store.find(kind, key)
    return folder is not None and is_whole(folder)


def asked_of_first(work: Callable[[], T]) -> T:
    """What the work gives on rank 0, or its error, on every rank. A collective call."""
    from safecl.distributed import collectives

    said: list[tuple[Any, str | None]] = []
    if collectives.rank() == 0:
        try:
            said = [(work(), None)]
        except (ConfigError, ReplayError, OSError) as error:
            said = [(None, str(error))]
    value, problem = collectives.gather_objects(said)[0]
    if problem is not None:
        raise ConfigError(problem)
    return value


# ------------------------------------------------------------------------------------------------------ hash of a model
