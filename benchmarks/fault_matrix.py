"""The rows of the fault matrix that count: kills at random moments, resumes, starts at one time, retention.

    python benchmarks/fault_matrix.py                     # all rows, one after the other; an hour and more
    python benchmarks/fault_matrix.py kills --count 100   # one row, with another count

    kills      kill -9 of a random rank of two at a random moment of a run with replay, EMA and EWC, and a resume each
    soak       500 steps of two tasks with replay, EMA and EWC, killed about every 25 steps; compared bitwise
    resumes    resumes in a row, each with a random number of ranks (1, 2, 4) and a random ZeRO stage
    starts     40 processes at once that want one run folder, and one artifact of the store
    retention  10,000 random sequences of saves, interruptions, damage and starts in a checkpoint folder

The error of a row is its list `wrong`. Writes benchmarks/results/fault-matrix.json, row by row, with the counts that
were made. Exits with code 1 if anything was wrong.
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

from faults import EWC, ranks, scratch  # sets the paths and the environment

RESULTS = Path(__file__).parent / "results" / "fault-matrix.json"
METHODS = EWC | {"ema": {"decay": 0.9}, "der": {"alpha": 0.5}}
RUN = {"methods": METHODS, "deepspeed": {"stage": 2}}
LIMIT = 1e-3


def write_row(name: str, found: dict) -> None:
    import torch
    from harness import machine

    results = {}
    with contextlib.suppress(OSError, ValueError):
        results = json.loads(RESULTS.read_text())
    command = f"python benchmarks/fault_matrix.py {name}"
    results[name] = found | {"command": command, "machine": machine(torch.device("cpu"))}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def killed_run(kills: int | None, steps: int, save_every: int, longest: int, begins_again_at: int | None) -> dict:
    """Kill a run again and again, let it end, and compare its end with that of a run that nobody kills.

    kills: this many, in a run of `steps` steps more than they need; None: until the run is through.
    """
    from tests.faults import matrix_scenes

    arguments = dict(save_every=save_every, begins_again_at=begins_again_at, **RUN)
    done, wrong = 0, []
    with scratch() as folder:
        last_step = lambda: _newest_step(folder / "killed")  # noqa: E731
        while (kills is None or done < kills) and last_step() + longest < steps:
            found = matrix_scenes.kill_and_resume(
                folder / "killed", seed=done, longest=longest, until=steps, **arguments
            )
            wrong += found["wrong"]
            done += 1
            print(f"  kill {done}: rank {found['victim']}, newest checkpoint {last_step()}", flush=True)
        with ranks(2) as pool:
            end = pool.run(matrix_scenes.go_on, folder=str(folder / "killed"), until=steps, **arguments)
            whole = pool.run(matrix_scenes.go_on, folder=str(folder / "whole"), until=steps, **arguments)
    for rank, (one, other) in enumerate(zip(end, whole, strict=True)):
        different = [kind for kind, digest in other["digests"].items() if one["digests"].get(kind) != digest]
        wrong += [f"rank {rank}: other {', '.join(different)} at step {steps}"] if different else []
        wrong += one["notes"]
    return {"kills": done, "resumes": done, "steps": steps, "wrong": wrong}


def _newest_step(folder: Path) -> int:
    from safecl.engine.checkpoint.publishing import CheckpointFolder

    names = CheckpointFolder(folder / "checkpoints").names()
    return int(names[0].split("-")[1]) if names else 0


def kills(count: int) -> dict:
    return killed_run(kills=count, steps=3 * count + 10, save_every=1, longest=3, begins_again_at=None)


def soak(count: int) -> dict:
    return killed_run(kills=None, steps=count, save_every=5, longest=50, begins_again_at=count // 2)


def resumes(count: int) -> dict:
    """Two steps after each resume; the end is compared with that of a run on one rank that is never stopped."""
    from tests.engine.passes import oracle
    from tests.training import resume_scenes

    rng, log, wrong = random.Random(0), [], []
    with scratch() as folder, contextlib.ExitStack() as stack:
        pools = {size: stack.enter_context(ranks(size)) for size in (1, 2, 4)}
        for number in range(count):
            size, stage = rng.choice([1, 2, 4]), rng.randrange(4)
            log.append(f"{size} x stage {stage}")
            settings = dict(methods=METHODS, deepspeed={"stage": stage})
            _, end, _ = pools[size].run(
                resume_scenes.leg, folder=str(folder / "run"), until=2 * number + 2, **settings
            )[0]
            print(f"  {number + 1}: {log[-1]}", flush=True)
        first, whole, _ = pools[1].run(resume_scenes.leg, folder=str(folder / "whole"), until=2 * count, **RUN)[0]
    distances = {
        kind: float(oracle.relative_distance(end[kind], whole[kind], first["weights"] if kind in first else None))
        for kind in ("weights", "ema")
    }
    wrong += [f"{kind} is {distance:.1e} away" for kind, distance in distances.items() if distance > LIMIT]
    return {"resumes": count, "layouts": log, "distances": distances, "limit": LIMIT, "wrong": wrong}


def starts(count: int) -> dict:
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


def retention(count: int) -> dict:
    from tests.faults import matrix_scenes

    events, wrong = 0, []
    with scratch() as folder:
        for seed in range(count):
            made, problem = matrix_scenes.history_of_checkpoints(folder / "history", seed)
            events += made
            wrong += [problem] if problem else []
            shutil.rmtree(folder / "history", ignore_errors=True)
    return {"histories": count, "events": events, "wrong": wrong}


ROWS = {"kills": (kills, 100), "soak": (soak, 500), "resumes": (resumes, 20), "starts": (starts, 40)}
ROWS |= {"retention": (retention, 10_000)}
"""Each row with its count."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{', '.join(ROWS)}; all by default")
    parser.add_argument("--count", type=int, help="kills, steps, resumes, processes or histories")
    options = parser.parse_args()
    bad = False
    for name in options.rows or list(ROWS):
        work, count = ROWS[name]
        began = time.perf_counter()
        found = work(options.count or count)
        found["seconds"] = round(time.perf_counter() - began)
        write_row(name, found)
        bad |= bool(found["wrong"])
        print(f"{name}: {found['wrong'][:5] or 'all right'}, {found['seconds']} s", flush=True)
    sys.exit(int(bad))


if __name__ == "__main__":
    main()
