"""The rows of the fault matrix that count: kills at random moments, resumes, starts at one time, retention.

    python -m benchmarks.faults.matrix                     # all rows, one after the other; an hour and more
    python -m benchmarks.faults.matrix kills --count 100   # one row, with another count

    kills      kill -9 of a random rank of two at a random moment of a run with replay, EMA and EWC, and a resume each
    soak       500 steps of two tasks with replay, EMA and EWC, killed about every 25 steps; compared bitwise
    resumes    resumes in a row, each with a random number of ranks (1, 2, 4) and a random ZeRO stage
    starts     40 processes at once that want one run folder, and one artifact of the store
    retention  10,000 random sequences of saves, interruptions, damage and starts in a checkpoint folder

A row that is stopped goes on where it was, by the same command: what it has done so far is kept in --work (default
.faults/, which git ignores) until it is through. The error of a row is its list `wrong`. Writes the counts that were
made to benchmarks/results/fault-matrix.json, row by row. Exits with code 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import ROOT
from benchmarks.faults.sections import EWC, ranks, scratch  # sets the environment

RESULTS = ROOT / "benchmarks" / "results" / "fault-matrix.json"
METHODS = EWC | {"ema": {"decay": 0.9}, "der": {"alpha": 0.5}}
RUN = {"methods": METHODS, "deepspeed": {"stage": 2}}
LIMIT = 1e-3
PATIENCE = 6 * 3600.0
"""Longest time in seconds that a run without kills may take, at low priority on a busy machine."""


def write_row(name: str, found: dict) -> None:
    import torch

    from benchmarks.harness import machine

    results = {}
    with contextlib.suppress(OSError, ValueError):
        results = json.loads(RESULTS.read_text())
    command = f"python -m benchmarks.faults.matrix {name}"
    results[name] = found | {"command": command, "machine": machine(torch.device("cpu"))}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


class Progress:
    """What a row has done so far, in its folder of --work."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.file = folder, folder / "progress.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.values: dict = {"count": count, "done": 0, "events": 0, "wrong": [], "seconds": 0.0}
        with contextlib.suppress(OSError, ValueError):
            self.values = json.loads(self.file.read_text())
        if self.values["count"] != count:
            sys.exit(f"{folder} holds a row of count {self.values['count']}: finish or remove it")
        self.began = time.perf_counter()

    @property
    def done(self) -> int:
        return self.values["done"]

    @property
    def seconds(self) -> float:
        return self.values["seconds"]

    def advance(self, done: int, wrong: list[str], events: int = 0) -> None:
        now = time.perf_counter()
        values = self.values | {"done": done, "wrong": self.values["wrong"] + wrong}
        self.values = values | {"events": values["events"] + events, "seconds": values["seconds"] + now - self.began}
        self.began = now
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(self.values))
        new.replace(self.file)


def kills(count: int, progress: Progress) -> dict:
    """A run is killed again and again; its end is compared with that of a run that nobody kills."""
    from tests.faults import matrix_scenes

    folder, longest = progress.folder, 3
    last_step = lambda: _newest_step(folder / "killed")  # noqa: E731
    while progress.done < count:
        found = matrix_scenes.kill_and_resume(
            folder / "killed", seed=progress.done, longest=longest, until=3 * count + 10, save_every=1, **RUN
        )
        progress.advance(progress.done + 1, found["wrong"])
        print(f"  kill {progress.done}: rank {found['victim']}, newest checkpoint {last_step()}", flush=True)
    steps = last_step() + longest
    with ranks(2, PATIENCE) as pool:
        end, whole = (
            pool.run(matrix_scenes.go_on, folder=str(folder / name), until=steps, save_every=save_every, **RUN)
            for name, save_every in (("killed", 1), ("whole", steps + 1))  # the run that nobody kills saves nothing
        )
    wrong = []
    for rank, (one, other) in enumerate(zip(end, whole, strict=True)):
        different = [kind for kind, digest in other["digests"].items() if one["digests"].get(kind) != digest]
        wrong += [f"rank {rank}: other {', '.join(different)} at step {steps}"] if different else []
        wrong += one["notes"]
    progress.advance(progress.done, wrong)
    return {"kills": progress.done, "resumes": progress.done, "steps": steps, "wrong": progress.values["wrong"]}


def _newest_step(folder: Path) -> int:
    from safecl.engine.checkpoint.publishing import CheckpointFolder

    names = CheckpointFolder(folder / "checkpoints").names()
    return int(names[0].split("-")[1]) if names else 0


def soak(count: int, progress: Progress) -> dict:
    """A run of the trainer over two tasks is killed until it is through, and leaves what an undisturbed one leaves."""
    from tests.distributed import stop_scenes
    from tests.distributed.test_stopping import what_is_left
    from tests.faults import matrix_scenes

    folder = progress.folder
    trees = {name: matrix_scenes.two_tasks(folder, folder / name, count) for name in ("killed", "whole")}
    start, through = dict(cache=str(folder / "cache")), False
    while not through:
        found = matrix_scenes.kill_a_run(trees["killed"], seed=progress.done, longest=50, **start)
        through = found["victim"] is None
        progress.advance(progress.done + (not through), found["wrong"])
        print(f"  kill {progress.done}: rank {found['victim']} after step {found['step']}", flush=True)
    with ranks(2, PATIENCE) as pool:
        pool.run(stop_scenes.fit, tree=trees["whole"], **start)
    killed, whole = (what_is_left(folder / name) for name in trees)
    wrong = [f"other {kind}" for kind in whole if whole[kind] != killed[kind]]
    wrong += [] if len(whole["metrics"]) == count else [f"{len(whole['metrics'])} steps instead of {count}"]
    progress.advance(progress.done, wrong)
    counts = {"kills": progress.done, "resumes": progress.done, "steps": count, "tasks": 2}
    return counts | {"wrong": progress.values["wrong"]}


def resumes(count: int, progress: Progress) -> dict:
    """Two steps after each resume; the end is compared with that of a run on one rank that is never stopped."""
    from tests.engine.passes import oracle
    from tests.training import resume_scenes

    folder, rng = progress.folder, random.Random(0)
    layouts = [(rng.choice([1, 2, 4]), rng.randrange(4)) for _ in range(count)]
    with contextlib.ExitStack() as stack:
        pools = {size: stack.enter_context(ranks(size, PATIENCE)) for size in (1, 2, 4)}
        for number in range(min(progress.done, count - 1), count):
            size, stage = layouts[number]
            settings = dict(methods=METHODS, deepspeed={"stage": stage})
            _, end, _ = pools[size].run(
                resume_scenes.leg, folder=str(folder / "run"), until=2 * number + 2, **settings
            )[0]
            progress.advance(number + 1, [])
            print(f"  {number + 1}: {size} x stage {stage}", flush=True)
        first, whole, _ = pools[1].run(resume_scenes.leg, folder=str(folder / "whole"), until=2 * count, **RUN)[0]
    distances = {
        kind: float(oracle.relative_distance(end[kind], whole[kind], first["weights"] if kind in first else None))
        for kind in ("weights", "ema")
    }
    progress.advance(
        count, [f"{kind} is {distance:.1e} away" for kind, distance in distances.items() if distance > LIMIT]
    )
    log = [f"{size} x stage {stage}" for size, stage in layouts]
    return {"resumes": count, "layouts": log, "distances": distances, "limit": LIMIT, "wrong": progress.values["wrong"]}


def starts(count: int, progress: Progress) -> dict:
    from tests.faults import matrix_scenes

    context, wrong = multiprocessing.get_context("fork"), []
    with scratch(in_memory=False) as folder:
        said = _at_once(context, matrix_scenes.take_folder, count, str(folder / "run"))
        wrong += [] if said.count("taken") == 1 else [f"{said.count('taken')} processes took the folder"]
        wrong += [line for line in said if line != "taken" and "is in use by" not in line][:3]
        found = _at_once(context, matrix_scenes.obtain_artifact, count, str(folder / "store"))
        builds = (folder / "store" / "matrix" / "builds").read_text().split()
        wrong += (
            [] if len(builds) == 1 and len(set(found)) == 1 else [f"{len(builds)} builds, {len(set(found))} folders"]
        )
    return {"processes": count, "on": ["one run folder", "one artifact"], "wrong": wrong}


def _at_once(context, work: Callable, count: int, folder: str) -> list[str]:
    queue, tried, start = context.Queue(), context.Event(), time.time() + 10.0
    processes = [context.Process(target=work, args=(folder, start, tried, queue)) for _ in range(count)]
    for process in processes:
        process.start()
    said = [queue.get(timeout=300) for _ in processes]
    tried.set()
    for process in processes:
        process.join()
    return said


def retention(count: int, progress: Progress) -> dict:
    from tests.faults import matrix_scenes

    events, wrong = 0, []
    for seed in range(progress.done, count):
        made, problem = matrix_scenes.history_of_checkpoints(progress.folder / "history", seed)
        events += made
        wrong += [problem] if problem else []
        shutil.rmtree(progress.folder / "history", ignore_errors=True)
        if (seed + 1) % 100 == 0 or seed + 1 == count:
            progress.advance(seed + 1, wrong, events)
            events, wrong = 0, []
    return {"histories": count, "events": progress.values["events"], "wrong": progress.values["wrong"]}


ROWS = {"kills": (kills, 100), "soak": (soak, 500), "resumes": (resumes, 20), "starts": (starts, 40)}
ROWS |= {"retention": (retention, 10_000)}
"""Each row with its count."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{', '.join(ROWS)}; all by default")
    parser.add_argument("--count", type=int, help="kills, steps, resumes, processes or histories")
    parser.add_argument("--work", type=Path, default=ROOT / ".faults", help="folder of rows that are not through")
    options = parser.parse_args()
    bad = False
    for name in options.rows or list(ROWS):
        work, count = ROWS[name]
        count = options.count or count
        progress = Progress(options.work.absolute() / name, count)
        found = work(count, progress)
        progress.advance(progress.done, [])
        found["seconds"] = round(progress.seconds)
        write_row(name, found)
        shutil.rmtree(progress.folder)
        bad |= bool(found["wrong"])
        print(f"{name}: {found['wrong'][:5] or 'all right'}, {found['seconds']} s", flush=True)
    sys.exit(int(bad))


if __name__ == "__main__":
    main()
