"""Small checkpoints made by the same functions as real ones, without torch: light enough to be killed, flipped and cut
by the thousand."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from safecl.engine.checkpoint.format import (
    Contents,
    Manifest,
    Slice,
    arrange,
    check_hashes,
    ranges,
    rank_file,
    read_contents,
    write_slices,
)
from safecl.engine.checkpoint.publishing import CheckpointFolder
from safecl.storage import durable
from safecl.storage.durable import DamagedCheckpoint, read_into, sync_folder, write_file

SHAPES = {"embed.weight": (11, 4), "layers.0.norm.weight": (7,), "head.weight": (5, 9)}
KINDS = {"weights": "F32", "anchor": "BF16", "ema": "F32", "fisher": "F32"}
EXIT_AT_POINT = 77


def values_of(seed: int, step: int, kind: str, name: str) -> np.ndarray:
    """The values of a checkpoint of this step, as bytes of the stored dtype."""
    rng = np.random.default_rng([seed, step, sorted(KINDS).index(kind), sorted(SHAPES).index(name)])
    numel = int(np.prod(SHAPES[name]))
    return rng.integers(0, 256, numel * (2 if KINDS[kind] == "BF16" else 4), dtype=np.uint8)


def slices_of_rank(rank: int, world_size: int) -> list[Slice]:
    """Cuts through every parameter at uneven places."""
    slices = []
    for kind, dtype in KINDS.items():
        for name, shape in SHAPES.items():
            numel = int(np.prod(shape))
            low, high = numel * rank // world_size, numel * (rank + 1) // world_size
            if low < high:
                slices.append(Slice(kind, name, low, high - low, dtype))
    return slices


def write_checkpoint(folder: CheckpointFolder, *, step: int, seed: int = 0, world_size: int = 2, keep: int = 2) -> Path:
    """One save, all ranks' parts in turn."""
    partial = folder.begin(100_000)
    files = {}
    for rank in range(world_size):
        placed = arrange(slices_of_rank(rank, world_size))
        data = b"".join(_bytes_of(one, seed, step) for one, _ in placed)
        files[rank_file(rank)] = write_slices(partial / rank_file(rank), placed, [memoryview(data)], {"random": "{}"})
    files["state.json"] = write_file(partial / "state.json", [f'{{"step": {step}}}\n'.encode()])
    sync_folder(partial)
    target = folder.publish(Manifest(folder.free_name(step), step, world_size, files, SHAPES, KINDS))
    folder.point_to(target.name)
    folder.prune(keep)
    return target


def _bytes_of(one: Slice, seed: int, step: int) -> bytes:
    size = one.nbytes // one.length
    return values_of(seed, step, one.kind, one.name)[one.offset * size : (one.offset + one.length) * size].tobytes()


def newest_whole(folder: CheckpointFolder) -> tuple[Contents | None, dict[str, str]]:
    """The newest checkpoint that passes every check, and what is wrong with newer ones."""
    problems = {}
    for name in folder.names():
        try:
            contents = read_contents(folder.path / name)
            check_hashes(contents.folder, contents.manifest)
            return contents, problems
        except DamagedCheckpoint as problem:
            problems[name] = str(problem)
    return None, problems


def holds(contents: Contents, *, seed: int, step: int, world_size: int = 3) -> bool:
    """True where reading by the ranges of another number of ranks gives exactly what was saved."""
    for rank in range(world_size):
        for one in slices_of_rank(rank, world_size):
            found = bytearray(one.nbytes)
            size = one.nbytes // one.length
            for file, byte, start, length in ranges(contents.slices[one.kind, one.name], one.offset, one.length):
                with (contents.folder / file).open("rb") as opened:
                    read_into(opened, byte, memoryview(found)[start * size : (start + length) * size])
            if bytes(found) != _bytes_of(one, seed, step):
                return False
    return True


def points_of(work: Callable[[], object]) -> list[str]:
    """Labels of the points that `work` passes, in order."""
    seen: list[str] = []
    durable.at, saved = seen.append, durable.at
    try:
        work()
    finally:
        durable.at = saved
    return seen


def die_at(work: Callable[[], object], number: int) -> int:
    """Forks a process that does `work` and dies at the point with this number, without any clean-up. Returns its exit
    code."""
    process = os.fork()
    if process == 0:
        passed = [-1]

        def at(point: str) -> None:
            passed[0] += 1
            if passed[0] == number:
                os._exit(EXIT_AT_POINT)

        durable.at = at
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def survives_a_kill(root: Path, number: int, seed: int, keeps: Sequence[int] = (1, 2, 3)) -> tuple[int, str]:
    """Saves some checkpoints, is killed at point `number` of the next, and resumes. Returns (exit code of the child,
    what is wrong)."""
    rng = np.random.default_rng([seed, number])
    folder, keep = CheckpointFolder(root), int(rng.choice(keeps))
    old = [10 * (i + 1) for i in range(int(rng.integers(0, 4)))]
    world_size = int(rng.integers(1, 4))
    for step in old:
        write_checkpoint(folder, step=step, seed=seed, world_size=world_size, keep=keep)
    new = 10 * (len(old) + 1)
    code = die_at(lambda: write_checkpoint(folder, step=new, seed=seed, world_size=world_size, keep=keep), number)
    problem = _state_after(folder, seed, old[-1:], new)
    if not problem:
        write_checkpoint(folder, step=new + 10, seed=seed, world_size=world_size, keep=keep)
        problem = _state_after(folder, seed, [], new + 10)
        left = sorted(p.name for p in root.iterdir())
        if not problem and (left != sorted(["latest", *folder.names()]) or len(folder.names()) > keep):
            problem = f"left behind: {left}"
    return code, problem


def _state_after(folder: CheckpointFolder, seed: int, old: list[int], new: int) -> str:
    contents, problems = newest_whole(folder)
    if problems:
        return f"a damaged checkpoint under a good name: {problems}"
    if contents is None:
        return "" if not old else "no checkpoint is left"
    if contents.manifest.step not in (*old, new):
        return f"step {contents.manifest.step} came back"
    return "" if holds(contents, seed=seed, step=contents.manifest.step) else "other values came back"
