"""Ranks that are killed at labelled points of a save, and what the next ones find."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import torch

from safecl.distributed import collectives
from safecl.engine.checkpoint.random_state import seed_generators
from safecl.storage import durable
from tests.engine import scenes
from tests.pool import RankPool
from tests.training import resume_scenes

KEEP = 1
SECONDS_TO_DIE = 60.0


def reference(folder: str, steps: int, **changes) -> dict[int, dict[str, str]]:
    """Digests of the state after each step of a run that nobody kills, and of one that has not begun."""
    _, states = resume_scenes.train_and_save(folder, steps, watched=range(steps + 1), **changes)
    return states


def labels_of_a_save(folder: str, **changes) -> list[str]:
    """This rank's labels while a run saves for the third time."""
    with resume_scenes.open_saver(folder, **changes) as (run, task, saver):
        scenes.begin(run, task, memory_folder=saver.memory_folder)
        for _ in range(2):
            _step_and_save(run, task, saver)
        seen: list[str] = []
        durable.at, before = seen.append, durable.at
        try:
            _step_and_save(run, task, saver)
        finally:
            durable.at = before
    collectives.barrier()
    if collectives.rank() == 0:
        shutil.rmtree(folder)
    return list(dict.fromkeys(seen))


def go_on_and_die(folder: str, point: str, victim: int, **changes) -> dict:
    """Goes on with what is there; tells by a file what it found; then `victim` is killed at `point` of the next
    save."""
    with resume_scenes.open_saver(folder, **changes) as (run, task, saver):
        notes: list[str] = []
        resumed = saver.resume(notes.append, [task])
        if resumed is None:
            seed_generators(11 + collectives.rank())
            scenes.begin(run, task, memory_folder=saver.memory_folder)
        found = {
            "step": run.global_step,
            "digests": resume_scenes.digests(run),
            "notes": notes,
            "resumed": resumed is not None,
        }
        if collectives.rank() == 0:
            Path(folder, "found.json").write_text(json.dumps(found))
        collectives.barrier()

        def at(label: str) -> None:
            if label == point and collectives.rank() == victim:
                os.kill(os.getpid(), signal.SIGKILL)

        durable.at = at
        _step_and_save(run, task, saver)
        return found


def _step_and_save(run, task, saver) -> None:
    torch.rand(3)  # as dropout does
    resume_scenes.step_once(run, task, [])
    saver.save(resume_scenes._progress(), b"[]", KEEP)
    assert saver.settle().problem is None


def kill_once(folder: Path, point: str, victim: int, **changes) -> dict:
    """One set of ranks from start to the victim's death. Returns what they had found."""
    pool = RankPool(2, forked=True)
    try:
        for pipe in pool.pipes:
            pipe.send((go_on_and_die, dict(folder=str(folder), point=point, victim=victim, **changes)))
        deadline = time.monotonic() + SECONDS_TO_DIE
        while pool.processes[victim].is_alive():
            assert time.monotonic() < deadline, f"rank {victim} did not come to {point!r}"
            assert not any(pipe.poll() and not _is_death(pipe) for pipe in pool.pipes), "a rank ended without dying"
            time.sleep(0.02)
        assert pool.processes[victim].exitcode == -signal.SIGKILL
    finally:
        pool.close()
    return json.loads((folder / "found.json").read_text())


def _is_death(pipe) -> bool:
    """True where the other end is gone, or failed because its peer is."""
    try:
        ok, value = pipe.recv()
    except (EOFError, ConnectionResetError):
        return True
    if ok:
        return False
    assert "Connection closed by peer" in value or "Connection reset" in value, value
    return True


def kill_at_every(
    points: list[tuple[str, int]], folder: Path, expected: dict[int, dict[str, str]], **changes
) -> list[str]:
    """Kills one run again and again, at these (point, victim), and looks after each kill what comes back. Returns what
    was wrong."""
    problems, last = [], 0
    for point, victim in points:
        found = kill_once(folder, point, victim, **changes)
        step = found["step"]
        if step not in (last, last + 1) or found["notes"]:
            problems.append(f"before {point!r}: step {step} after {last}, {found['notes']}")
        elif wrong := [kind for kind in expected[step] if found["digests"].get(kind) != expected[step][kind]]:
            problems.append(f"before {point!r}: at step {step} other {wrong}")
        last = step
    return problems
