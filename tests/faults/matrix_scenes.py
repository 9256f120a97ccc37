"""Scenes of the fault matrix (benchmarks/faults/matrix.py): runs that are killed at random and resumed, processes that
start at once, and histories of checkpoints."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import torch

from safecl.demo.materials import write_materials
from safecl.distributed import collectives
from safecl.engine.checkpoint.format import Manifest
from safecl.engine.checkpoint.publishing import CheckpointFolder
from safecl.engine.checkpoint.random_state import seed_generators
from safecl.storage.durable import write_file
from tests.distributed import stop_scenes
from tests.engine import scenes
from tests.pool import RankPool
from tests.training import resume_scenes

SECONDS_TO_DIE = 300.0
SECONDS_TO_LIVE_ON = 30.0
"""A rank whose peer is gone has ended after this time."""


def go_on(
    folder: str,
    until: int,
    save_every: int,
    kill: tuple[int, int, float] | None = None,
    **changes,
) -> dict:
    """Begin or resume, and go to step `until`. kill: (rank, steps from here, seconds into that step) of a SIGKILL.

    Returns where it began and the digests of the end.
    """
    with resume_scenes.open_saver(folder, **changes) as (run, task, saver):
        notes: list[str] = []
        resumed = saver.resume(notes.append, [task])
        if resumed is None:
            seed_generators(11 + collectives.rank())
            scenes.begin(run, task, memory_folder=saver.memory_folder)
        began = run.global_step
        while run.global_step < until:
            if kill is not None and (collectives.rank(), run.global_step) == (kill[0], began + kill[1]):
                _die_in(kill[2])
            torch.rand(3)  # as dropout does
            resume_scenes.step_once(run, task, [])
            if run.global_step % save_every == 0:
                saver.save(resume_scenes._progress(), b"[]", 2)
        report = saver.settle()
        assert report is None or report.problem is None, report
        return {"began": began, "step": run.global_step, "digests": resume_scenes.digests(run), "notes": notes}


def _die_in(seconds: float) -> None:
    def die() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=die, daemon=True).start()


def kill_and_resume(folder: Path, seed: int, longest: int, **arguments) -> dict:
    """Start ranks that go on with the run of the folder; a random one is killed at a random moment of one of the next
    `longest` steps. Returns who was killed and whether anything of the run is left."""
    rng = random.Random(seed)
    victim, steps, seconds = rng.randrange(2), rng.randrange(longest), rng.random() * 0.2
    pool = RankPool(2, forked=True)
    try:
        for pipe in pool.pipes:
            pipe.send((go_on, dict(folder=str(folder), kill=(victim, steps, seconds), **arguments)))
        pool.processes[victim].join(SECONDS_TO_DIE)
        wrong = wrong_ends(pool, victim)
    finally:
        pool.close()
    return {"victim": victim, "steps": steps, "wrong": [f"seed {seed}: {what}" for what in wrong]}


def wrong_ends(pool: RankPool, victim: int) -> list[str]:
    """Say which ranks did not end as they should: the victim by SIGKILL, the others on their own. The pool gives them
    nothing more to do, and has not ended them yet."""
    code, left = pool.processes[victim].exitcode, time.monotonic() + SECONDS_TO_LIVE_ON
    wrong = [] if code == -signal.SIGKILL else [f"rank {victim} ended with {code}"]
    for pipe in pool.pipes:
        pipe.close()
    for rank, process in enumerate(pool.processes):
        process.join(max(0.0, left - time.monotonic()))
        if process.is_alive():
            wrong.append(f"rank {rank} lives on {SECONDS_TO_LIVE_ON:.0f} s after rank {victim} was killed")
    return wrong


def kill_in_the_last_save(tree: dict, cache: str, victim: int) -> list[str]:
    """A run gets SIGTERM in its third step, and one rank SIGKILL while it saves for that. Returns what was wrong."""
    pool = RankPool(2, forked=True)
    try:
        for pipe in pool.pipes:
            pipe.send((_stop_and_die, dict(tree=tree, cache=cache, victim=victim)))
        pool.processes[victim].join(SECONDS_TO_DIE)
        return wrong_ends(pool, victim)
    finally:
        pool.close()


def _stop_and_die(tree: dict, cache: str, victim: int) -> None:
    from safecl.storage import durable

    def at(label: str) -> None:
        if collectives.rank() == victim and label == f"rank-{victim:05d}.safetensors: partly written":
            os.kill(os.getpid(), signal.SIGKILL)

    durable.at = at
    stop_scenes.fit(tree, cache, stop={"rank": 1, "name": "SIGTERM", "step": 3})


# ---------------------------------------------------------------------------------------------------------- whole runs


def two_tasks(folder: Path, output: Path, steps: int) -> dict:
    """The config of a run of `steps` steps over two tasks with replay, EMA and EWC, saved every 5th step.

    The demonstration's data and random model are written into `folder`.
    """
    materials, data = folder / "materials", folder / "materials" / "data"
    if not (materials / "random-model").is_dir():
        write_materials(materials)
    measured = {"path": str(data / "task-test.jsonl"), "metric": "label_accuracy"}
    return {
        "model": {"path": str(materials / "random-model"), "dtype": "fp32", "gradient_checkpointing": False},
        "tasks": [
            {"name": "first", "train": str(data / "task.jsonl"), "eval": measured},
            {"name": "second", "train": str(data / "task-test.jsonl"), "eval": measured},
        ],
        "memory": {
            "source": str(data / "memory.jsonl"),
            "max_rows": 24,
            "replay_ratio": 0.5,
            "max_tokens": 64,
            "teacher": {"k": 8},
        },
        "methods": {
            "der": {"alpha": 0.5},
            "ewc": {"strength": 0.5, "sign_batches": 4, "rows_per_batch": 4},
            "ema": {"decay": 0.9},
        },
        "train": {
            "max_steps": steps // 2,
            "tokens_per_batch": 150,
            "tokens_per_microbatch": 512,
            "max_length": 64,
            "learning_rate": 1e-3,
            "allow_few_steps": True,
        },
        "deepspeed": {"stage": 2},
        "checkpoint": {"every": 5},
        "output": str(output),
    }


def kill_a_run(tree: dict, cache: str, seed: int, longest: int) -> dict:
    """Start the run, or go on with it; a random rank is killed up to 0.2 s after a random one of the next steps.

    Returns who was killed (None: the run was through before), in which step, and what was wrong.
    """
    rng, output = random.Random(seed), Path(tree["output"])
    victim, steps, seconds = rng.randrange(2), 1 + rng.randrange(longest), rng.random() * 0.2
    pool = RankPool(2, forked=True)
    try:
        for pipe in pool.pipes:
            pipe.send((stop_scenes.fit, dict(tree=tree, cache=cache)))
        began = _steps_when_training_begins(output, pool)
        while pool.alive and not pool.pipes[0].poll(0.005) and _num_steps(output) < began + steps:
            pass
        through = pool.alive and pool.pipes[0].poll()
        if through:
            ok, value = pool.pipes[0].recv()
            assert ok, value
        else:
            time.sleep(seconds)
            pool.processes[victim].kill()
            pool.processes[victim].join(SECONDS_TO_DIE)
        reached = _num_steps(output)
        wrong = [] if through else wrong_ends(pool, victim)
    finally:
        pool.close()
    if through:
        return {"victim": None, "step": reached, "wrong": []}
    return {"victim": victim, "step": reached, "wrong": [f"seed {seed}: {what}" for what in wrong]}


def _steps_when_training_begins(output: Path, pool: RankPool) -> int:
    """The number of steps behind the run when it makes its first one, after what came behind the checkpoint is cut."""
    before = _written(output)
    while pool.alive and not pool.pipes[0].poll(0.005) and _written(output) in (before, None):
        pass
    return _num_steps(output)


def _written(output: Path) -> tuple[int, int] | None:
    try:
        found = (output / "metrics.jsonl").stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _num_steps(output: Path) -> int:
    try:
        return (output / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


# --------------------------------------------------------------------------------------------------- starts at one time


def take_folder(folder: str, start: float, everybody_has_tried, queue) -> None:
    """Try to take a run folder at a given time, and hold it until everybody has tried."""
    from safecl.config import ConfigError
    from safecl.training.folder import RunFolder

    own = RunFolder(Path(folder))
    time.sleep(max(0.0, start - time.time()))
    try:
        own.lock()
        queue.put("taken")
        everybody_has_tried.wait()
        own.release()
    except ConfigError as error:
        queue.put(str(error))


def obtain_artifact(folder: str, start: float, everybody_has_tried, queue) -> None:
    """Ask for an artifact at a given time; builds are counted in a file."""
    from safecl.engine.artifacts import store as artifacts

    artifacts.SECONDS_BETWEEN_LOOKS = 0.05

    def build(path: Path) -> None:
        with (path.parent / "builds").open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        (path / "values").write_bytes(bytes(1000))

    time.sleep(max(0.0, start - time.time()))
    found = artifacts.obtain(artifacts.ArtifactStore(Path(folder)), "matrix", {"key": 1}, texts=(), build=build)
    queue.put(str(found))


# ------------------------------------------------------------------------------------------------------------ retention


def history_of_checkpoints(folder: Path, seed: int) -> tuple[int, str | None]:
    """Make a random sequence of saves, interrupted saves, damage and starts in a checkpoint folder.

    After each event the newest checkpoint that is whole and finite, of those that were ever published, must be there,
    unless it was damaged itself. Returns (number of events, what was wrong).
    """
    rng = np.random.default_rng(seed)
    checkpoints, good, step = CheckpointFolder(folder), [], 0
    num_events = int(rng.integers(5, 15))
    for number in range(num_events):
        event = rng.choice(["save", "save", "save", "unknown", "interrupted", "damage", "start"])
        if event in ("save", "unknown"):
            step += 1
            name = _publish(checkpoints, step, finite=event == "save")
            good += [name] if event == "save" else []
            checkpoints.prune(int(rng.integers(1, 4)))
        elif event == "interrupted":
            checkpoints.begin(10)
            (checkpoints.partial / "rank-00000.safetensors").write_bytes(b"half")
        elif event == "damage" and (names := checkpoints.names()):
            name = str(rng.choice(names))
            (folder / name / "rank-00000.safetensors").write_bytes(b"")
            good = [other for other in good if other != name and checkpoints.is_whole(other)]
        elif event == "start" and folder.is_dir():
            checkpoints.sweep()
            for name in checkpoints.names():
                if checkpoints.is_whole(name):
                    break
                checkpoints.set_aside(name)
        if good and not (checkpoints.is_whole(good[-1]) and checkpoints.is_finite(good[-1])):
            return number + 1, f"seed {seed}, event {number} ({event}): {good[-1]} is gone"
    return num_events, None


def _publish(checkpoints: CheckpointFolder, step: int, finite: bool) -> str:
    checkpoints.begin(10)
    record = write_file(checkpoints.partial / "rank-00000.safetensors", [b"0123456789"])
    name = checkpoints.free_name(step)
    files = {"rank-00000.safetensors": record}
    checkpoints.publish(Manifest(name, step, 1, files, {}, {}, finite=finite))
    return name


def digests_of(found: dict) -> str:
    """The digests as one text, to compare runs."""
    return json.dumps(found["digests"], sort_keys=True)
