"""The store of artifacts: results that depend on the base model only, made once and used by every run on it. They are
teacher outputs, Fisher information and memory rows.

    $SAFECL_CACHE/artifacts/            by default ~/.cache/safecl/artifacts, or the config's `artifacts.folder`,
                                        or in the run folder with `privacy.keep_prepared: false`
        teacher-cache/3f2a.../          one artifact: KIND / hash of its key
            texts.json                  the files of rows whose text it holds; written before anything else
            artifact.json               its whole key, and size and hash of every file; written last, so that it marks
                                        the artifact as finished
            ...                         the builder's files
        models.json                     what holds of a model as long as its files do (safecl.storage.model_records)

An artifact's key names everything that it depends on: base model, tokenizer, settings. It is built where it is missing,
by one run at a time (others wait), and used by all after that. A stopped build resumes from the files that are there.
A finished artifact is used only where its files still have their hashes; else it is removed and built again.
In a run, every rank calls

    store = ArtifactStore.of(config)
    key = base_key(config, tokenizer, store) | {"rows": fingerprint(rows), "sign_batches": 64}
    folder = obtain(store, "fisher", key, texts=(), build=lambda folder: write_fisher(folder), note=run.log)

Only `ask_first_rank` and `obtain` import torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from safecl.config import ConfigError, RunConfig
from safecl.storage.cache_entries import DESCRIPTION, TEXTS, declare_texts
from safecl.storage.cache_folder import artifact_folder
from safecl.storage.durable import record_of, replace_file
from safecl.storage.locks import FileLock

T = TypeVar("T")
Key = Mapping[str, "str | int | float | bool | None"]
"""Everything that an artifact depends on, by name; the hashes of model and tokenizer are part of it."""

LOCK = "build.lock"
SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class ArtifactStore:
    """A folder of artifacts. Several nodes need a shared one."""

    folder: Path

    @classmethod
    def of(cls, config: RunConfig) -> ArtifactStore:
        """Return the store that the config names, or the default one."""
        return cls(artifact_folder(config))

    def folder_of(self, kind: str, key: Key) -> Path:
        """The folder of this artifact, whether it exists or not."""
        return self.folder / kind / hashlib.blake2b(_text(key).encode(), digest_size=12).hexdigest()

    def find(self, kind: str, key: Key) -> Path | None:
        """Return the folder of a finished artifact, None where there is none. Raises ConfigError for one with another
        key."""
        folder = self.folder_of(kind, key)
        try:
            found = _described(folder)
        except (FileNotFoundError, NotADirectoryError):
            return None
        refuse_other_key(found["key"], key, folder)
        return folder

    def finish(self, kind: str, key: Key, *, hashed: bool = True) -> Path:
        """Mark the artifact as finished, once all its files are on the disk. hashed: see `obtain`."""
        folder = self.folder_of(kind, key)
        files = {path.name: vars(record_of(path)) for path in _files_of(folder)} if hashed else None
        replace_file(folder / DESCRIPTION, json.dumps({"kind": kind, "key": dict(key), "files": files}, indent=1))
        return folder

    def damage(self, kind: str, key: Key) -> str | None:
        """Compare all files of a finished artifact with their hashes; name the first that differs, None where all are
        right. Raises ConfigError where there is no artifact."""
        folder = self.folder_of(kind, key)
        files = _described(folder).get("files")
        if files is None:
            return f"{folder / DESCRIPTION} has no hashes of its files, since an earlier safecl has written it"
        for name, record in files.items():
            if Path(name).name != name:
                return f"{folder / DESCRIPTION} names a file outside of its folder"
            try:
                if vars(record_of(folder / name)) != record:
                    return f"the bytes of {folder / name} are not those that were written"
            except ValueError as error:  # DamagedCheckpoint, or a name that no file has
                return str(error)
        return None

    def discard(self, kind: str, key: Key) -> None:
        """Remove the files of an artifact, whose lock this process holds."""
        folder = self.folder_of(kind, key)
        (folder / DESCRIPTION).unlink(missing_ok=True)
        for path in _files_of(folder):
            path.unlink()

    @contextlib.contextmanager
    def building(self, kind: str, key: Key) -> Iterator[Path | None]:
        """Make the artifact's folder and hold it for this process; None where another process holds it.

        On a file system without locks two builders may write the same files at once. Raises ConfigError where the
        folder cannot be made.
        """
        folder = self.folder_of(kind, key)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / LOCK)
        except OSError as error:
            raise ConfigError(
                f"artifacts.folder: {folder}: cannot be written: {error.strerror}; name another folder with "
                "artifacts.folder=... or $SAFECL_CACHE"
            ) from None
        try:
            yield folder if lock.take() else None
        finally:
            lock.close()


def _described(folder: Path) -> dict[str, Any]:
    """Read artifact.json. Raises ConfigError where it cannot be read, FileNotFoundError where there is none."""
    try:
        found = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        files = found.get("files")
        return {"key": found["key"], "files": None if files is None else dict(files)}
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"{folder / DESCRIPTION}: cannot be read; remove {folder}, and it is built again") from None


def _files_of(folder: Path) -> list[Path]:
    """The builder's files."""
    own = (DESCRIPTION, LOCK, TEXTS)
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name not in own)


def refuse_other_key(found: Key, wanted: Key, where: Path) -> None:
    """Raise ConfigError with every part of the key that differs, and both values."""
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if names:
        differing = "; ".join(f"{name} {found.get(name)} there, {wanted.get(name)} here" for name in names)
        raise ConfigError(f"{where}: made with something else: {differing}; remove the folder, and it is built again")


def _text(key: Key) -> str:
    return json.dumps(dict(key), sort_keys=True)


# ------------------------------------------------------------------------------------------------------------- in a run


def obtain(
    store: ArtifactStore,
    kind: str,
    key: Key,
    *,
    texts: Collection[str],
    build: Callable[[Path], None],
    note: Callable[[str], None] = lambda message: None,
    is_whole: Callable[[Path], bool] = lambda folder: True,
    hashed: bool = True,
) -> Path:
    """Return the folder of an artifact, the same on every rank; build it where it is missing. A collective call.

    `build(folder)` runs on every rank and returns when its files are on the disk; the folder may hold files of a build
    that was stopped. `is_whole(folder)` runs on rank 0 and decides whether a finished artifact has all that is needed,
    for artifacts that grow. hashed: its files are hashed when it is finished, and compared each time that it is reused;
    False for artifacts that grow and have checksums of their own. texts: the files of rows whose text, or a value for
    each of whose tokens, the artifact holds; `safecl cache` shows and removes it by them. `note` gets a message when
    the artifact is reused, built or waited for. Raises ConfigError.
    """
    from safecl.distributed import collectives

    folder, waits, began = store.folder_of(kind, key), False, time.monotonic()
    while True:
        with contextlib.ExitStack() as lock:
            state, found = ask_first_rank(lambda: _look(store, kind, key, is_whole, hashed, lock))
            if found is not None:
                note(f"{kind}: {found}; it is built again")
            if state != "theirs":
                ask_first_rank(lambda: declare_texts(folder, texts))
            if state == "finished":
                note(f"{kind}: reused from {folder}")
                return folder
            if state == "ours":
                build(folder)
                collectives.barrier()
                ask_first_rank(lambda: store.finish(kind, key, hashed=hashed))
                note(f"{kind}: built in {folder}, {time.monotonic() - began:.1f} s")
                return folder
        if not waits:
            note(f"{kind}: another process is building it in {folder}; waiting")
        waits = True
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _look(
    store: ArtifactStore,
    kind: str,
    key: Key,
    is_whole: Callable[[Path], bool],
    hashed: bool,
    lock: contextlib.ExitStack,
) -> tuple[Literal["finished", "ours", "theirs"], str | None]:
    """Find out whether an artifact is finished, ours to build (its lock is now taken), or built by another process; and
    the damage for which it is built again."""
    if _is_finished(store, kind, key, is_whole) and not (hashed and store.damage(kind, key)):
        return "finished", None
    if lock.enter_context(store.building(kind, key)) is None:
        return "theirs", None
    # The other process may have finished between the look and the lock.
    if not _is_finished(store, kind, key, is_whole):
        return "ours", None
    if (damage := store.damage(kind, key) if hashed else None) is None:
        return "finished", None
    store.discard(kind, key)
    return "ours", damage


def _is_finished(store: ArtifactStore, kind: str, key: Key, is_whole: Callable[[Path], bool]) -> bool:
    folder = store.find(kind, key)
    return folder is not None and is_whole(folder)


def ask_first_rank(work: Callable[[], T]) -> T:
    """Do `work` on rank 0 and return its value on every rank; its errors become a ConfigError on every rank."""
    from safecl.distributed import collectives

    return collectives.on_first_rank(work, (ConfigError, OSError), ConfigError)
