"""The long counts behind docs/reliability.md: kills, damage, cuts, changes of layout, memory, and the cost of saving.

    python -m benchmarks.faults.sections                      # all sections, one after the other
    python -m benchmarks.faults.sections forks damage         # only these
    python -m benchmarks.faults.sections layouts nodes        # again: the layouts and scenes that are not done yet
    python -m benchmarks.faults.sections nodes --scenes start # only this scene, though it is done

    forks      a process dies at every labelled point of a save, 20 seeds each (fork and immediate exit)
    damage     1,000 flips, truncations, deletions, renames, ... of a checkpoint's files
    ranks      kill -9 of each of two real ranks at every labelled point of a save of a run with replay and EMA
    cuts       every method alone, cut and resumed at 10 steps, compared bitwise with the uninterrupted run
    layouts    21 layouts (1, 2, 4 ranks x ZeRO 0 to 3 x offload) write, and each of the 21 reads: equal when loaded,
               near after 20 steps
    memory     the extra memory of loading a checkpoint and of writing a model folder, at 100 M weights
    cost       a run of 100 M weights on a CPU that saves every 10th step; the rival is the run without saving
    staging    how long such a run waits for a save, by checkpoint.staging; the floor is the copy in memory
    demo       `safecl demo` killed in each of its 28 phases and started again, compared with one that was never killed
    nodes      two hosts of namespaces: bitwise one host, lost hosts, 20 restarts, a slow link, clock skew (root)
    slurm      jobs on a real Slurm of two nodes: stopped by signals and preempted, queued again, finished; exit
               codes (root)

There is no roof; the error of a section is its list `wrong`. Writes benchmarks/results/faults.json, section by section.
Exits with code 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import ROOT

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
SEEDS = 20
LARGE = dict(hidden=640, layers=12, vocabulary=32000)
STAGING = {"2GiB": 2**31, "256MiB": 2**28, "64MiB": 2**26}
EWC = {"ewc": {"strength": 0.5, "sign_batches": 4, "rows_per_batch": 4}}
ONLINE_EWC = {"online_ewc": {"sign_batches": 4, "rows_per_batch": 4}}


def read_results() -> dict:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(RESULTS.read_text())
    return {}


def write_section(name: str, found: dict) -> None:
    """Replace one section, with the facts of the machine that ran it."""
    import torch

    from benchmarks.harness import machine

    results = read_results()
    command = f"python -m benchmarks.faults.sections {name}"
    results[name] = found | {"command": command, "machine": machine(torch.device("cpu"))}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


@contextlib.contextmanager
def scratch(in_memory: bool = True) -> Iterator[Path]:
    """Make a temporary folder for thousands of fsyncs, in memory if possible."""
    where = "/dev/shm" if in_memory and os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where, prefix="safecl-faults-") as path:
        yield Path(path)


@contextlib.contextmanager
def ranks(world_size: int, timeout: float = 600.0) -> Iterator:
    from tests.pool import RankPool

    pool = RankPool(world_size, timeout)
    try:
        yield pool
    finally:
        pool.close()


# ---------------------------------------------------------------------------------------------------------------- files


def forks() -> dict:
    from safecl.engine.checkpoint.publishing import CheckpointFolder
    from tests.engine.checkpoint import checkpoint_files as files

    with scratch() as folder:
        points = files.points_of(
            lambda: files.write_checkpoint(CheckpointFolder(folder / "dry"), step=10, world_size=3)
        )
        killed, wrong = 0, []
        for number in range(len(points) + 6):  # deletions of older checkpoints add points
            for seed in range(SEEDS):
                code, problem = files.survives_a_kill(folder / "run", number, seed)
                killed += code == files.EXIT_AT_POINT
                wrong += [f"point {number}, seed {seed}: {problem}"] if problem else []
                shutil.rmtree(folder / "run")
    return {"points": list(dict.fromkeys(points)), "seeds": SEEDS, "killed": killed, "wrong": wrong}


def damage() -> dict:
    from safecl.engine.checkpoint.publishing import CheckpointFolder
    from tests.engine.checkpoint import checkpoint_files as files
    from tests.engine.checkpoint.mutations import MUTATIONS, mutate

    undetected, count = [], 0
    with scratch() as folder:
        original = CheckpointFolder(folder / "original")
        for step in (10, 20):
            files.write_checkpoint(original, step=step, seed=5)
        for kind in MUTATIONS:
            for seed in range(1000 // len(MUTATIONS)):
                copy = CheckpointFolder(shutil.copytree(original.path, folder / "copy"))
                what = mutate(copy.path / "step-00000020", kind, 10_000 + seed)
                contents, problems = files.newest_whole(copy)
                good = problems and contents.manifest.step == 10 and files.holds(contents, seed=5, step=10)
                undetected += [] if good else [what]
                count += 1
                shutil.rmtree(copy.path)
    return {"kinds": list(MUTATIONS), "mutations": count, "wrong": undetected}


# ---------------------------------------------------------------------------------------------------------------- ranks


def real_ranks() -> dict:
    from tests.engine.checkpoint import kill_scenes
    from tests.engine.checkpoint.test_kills import RUN

    with scratch(in_memory=False) as folder:
        with ranks(2) as pool:
            labels = pool.run(kill_scenes.labels_of_a_save, folder=str(folder / "labels"), **RUN)
            points = [(label, rank) for rank, own in enumerate(labels) for label in own]
            random.Random(0).shuffle(points)
            expected = pool.run(kill_scenes.reference, folder=str(folder / "whole"), steps=len(points), **RUN)[0]
        (folder / "killed").mkdir()
        wrong = kill_scenes.kill_at_every(points, folder / "killed", expected, **RUN)
    return {
        "points": [f"{label} (rank {rank})" for label, rank in sorted(points)],
        "killed": len(points),
        "wrong": wrong,
    }


def cuts() -> dict:
    from safecl.config.method_registry import builtin_methods, method_module
    from tests.training import resume_scenes

    found, wrong = {}, []
    settings = {
        **EWC,
        **ONLINE_EWC,
        "ema": {"decay": 0.9},
        "psmt": {"decay": 0.9, "sign_batches": 4, "rows_per_batch": 4},
    }
    with scratch() as folder, ranks(2) as pool:
        for number, name in enumerate(builtin_methods()):
            method = method_module(name).Config()
            if method.acts_on == "align" or method.needs_lora or method.scoring_models:
                continue  # they need rows or models that are not here
            changes = dict(methods={name: settings.get(name, {})}, deepspeed={"stage": number % 4})
            differences = pool.run(
                resume_scenes.cut_at_every_step, folder=str(folder / name), steps=11, cuts=10, **changes
            )
            found[name] = {"cuts": 10, "stage": number % 4}
            wrong += [f"{name}: {difference}" for rank in differences for difference in rank]
            print(f"  {name}: {len(wrong)} differences", flush=True)
    return {"methods": found, "wrong": wrong}


# --------------------------------------------------------------------------------------------------------- memory, cost


def memory() -> dict:
    from tests.engine.checkpoint import memory_scenes

    found, wrong = {}, []
    with scratch(in_memory=False) as folder:
        with ranks(1) as pool:
            weights = pool.run(memory_scenes.save_once, folder=str(folder), size=LARGE, stage=1)[0]
        with ranks(2) as pool:
            for stage in (2, 3):
                loading = pool.run(memory_scenes.peak_of_loading, folder=str(folder), size=LARGE, stage=stage)
                found[f"loading, stage {stage}"] = [
                    one | {"beyond_share_mb": (one["peak"] - one["stays"]) / 1e6} for one in loading
                ]
                wrong += [f"stage {stage}: {one}" for one in loading if one["peak"] > one["stays"] + 64e6]
            exporting = pool.run(memory_scenes.peak_of_exporting, folder=str(folder), size=LARGE, stage=3)
            found["model folder, stage 3"] = exporting
            wrong += [f"model folder: {one}" for one in exporting if one["peak"] > 2 * one["largest"] + 32e6]
    return {"weights": weights, "found": found, "wrong": wrong}


STEPS_BETWEEN, SECONDS_FOR_BLOCKS = 10, 200


def cost() -> dict:
    """Time pairs of 10 steps without a save and 10 steps that begin with one, for 200 seconds.

    The second time ends when the checkpoint is on the disk.
    """
    with scratch(in_memory=False) as folder, ranks(2) as pool:
        found = pool.run(time_blocks, folder=str(folder))[0]
    ratio = statistics.median(found["with"]) / statistics.median(found["without"])
    found |= {"ratio": round(ratio, 4), "limit": 1.05}
    return found | {"wrong": [] if ratio <= 1.05 else [f"saving every 10th step costs {ratio - 1:.1%}"]}


def time_blocks(folder: str) -> dict:
    from safecl.distributed import collectives
    from tests.engine.checkpoint import memory_scenes

    run, task, writer = memory_scenes.build(
        folder, LARGE, 2, methods={}, tokens_per_batch=512, tokens_per_microbatch=256, max_steps=1000
    )
    run.train_step(task)
    times: dict[str, list[float]] = {"without": [], "with": []}
    blocked, written, size = [], [], 0
    end = time.perf_counter() + SECONDS_FOR_BLOCKS
    while True:
        saves = len(times["with"]) < len(times["without"])
        pair = times["with"][-1] + times["without"][-1] if times["with"] else 0.0
        if not saves and collectives.any_rank(time.perf_counter() + pair > end) and times["with"]:
            break
        began = time.perf_counter()
        if saves:
            writer.save(run.global_step, keep=1, files={})
        for _ in range(STEPS_BETWEEN):
            run.train_step(task)
        if saves:
            report = writer.finish()
            assert report.problem is None, report
            blocked.append(round(report.seconds_blocked, 3))
            written.append(round(report.seconds_written, 2))
            size = report.num_bytes
        collectives.barrier()
        times["with" if saves else "without"].append(round(time.perf_counter() - began, 2))
    writer.close()
    facts = {"weights": run.engine.shards.numel, "ranks": 2, "tokens_per_step": 512, "checkpoint_bytes": size}
    return {**facts, **times, "seconds_blocked": blocked, "seconds_written": written}


# -------------------------------------------------------------------------------------------------------------- staging


def staging() -> dict:
    """Save five times with each size, alternating, on 2 ranks, and keep the seconds that training waited."""
    with scratch(in_memory=False) as folder, ranks(2) as pool:
        found = pool.run(time_staging, folder=str(folder))[0]
    waits = {name: statistics.median(seconds) for name, seconds in found["seconds_blocked"].items()}
    return found | {"median": {name: round(value, 3) for name, value in waits.items()}, "wrong": []}


def time_staging(folder: str) -> dict:
    from safecl.distributed import collectives
    from safecl.engine.checkpoint.writing import CheckpointWriter
    from tests.engine.checkpoint import memory_scenes

    run, task, first = memory_scenes.build(
        folder, LARGE, 2, methods={}, tokens_per_batch=512, tokens_per_microbatch=256, max_steps=1000
    )
    run.train_step(task)
    first.close()
    blocked: dict[str, list[float]] = {name: [] for name in STAGING}
    written: dict[str, list[float]] = {name: [] for name in STAGING}
    size = 0
    for _ in range(5):
        for name, limit in STAGING.items():
            writer = CheckpointWriter(run.engine.shards, run.engine.optimizer, first.folder, staging=limit)
            writer.save(run.global_step, keep=1, files={})
            report = writer.finish()
            assert report.problem is None, report
            blocked[name].append(round(report.seconds_blocked, 3))
            written[name].append(round(report.seconds_written, 3))
            size = report.num_bytes
            writer.close()
            collectives.barrier()
    facts = {"weights": run.engine.shards.numel, "ranks": 2, "checkpoint_bytes": size}
    return {**facts, "seconds_blocked": blocked, "seconds_written": written}


# ----------------------------------------------------------------------------------------------------------------- demo


def demo() -> dict:
    from benchmarks.faults.demo import kill_in_every_phase

    with scratch(in_memory=False) as folder:
        return kill_in_every_phase(folder, seed=4)


def nodes(scenes: Sequence[str] = ()) -> dict:
    from benchmarks.faults.nodes import nodes as section

    return section(scenes)


def layouts() -> dict:
    from benchmarks.faults.layouts import layouts as section

    return section()


def node_tables() -> None:
    from benchmarks.faults.nodes import renew_docs

    renew_docs(read_results())


def slurm() -> dict:
    from benchmarks.faults.slurm import slurm as section

    return section()


SECTIONS = {
    "forks": forks,
    "damage": damage,
    "ranks": real_ranks,
    "cuts": cuts,
    "layouts": layouts,
    "memory": memory,
    "cost": cost,
    "staging": staging,
    "demo": demo,
    "nodes": nodes,
    "slurm": slurm,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; all by default")
    parser.add_argument("--scenes", nargs="+", default=[], help="scenes of the section nodes")
    arguments = parser.parse_args()
    names = arguments.sections or list(SECTIONS)
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    bad = False
    for name in names:
        began = time.perf_counter()
        found = nodes(arguments.scenes) if name == "nodes" else SECTIONS[name]()
        found["seconds"] = round(time.perf_counter() - began)
        write_section(name, found)
        if name in ("nodes", "slurm"):
            node_tables()
        bad |= bool(found["wrong"])
        print(
            f"{name}: {'WRONG: ' + str(found['wrong'][:5]) if found['wrong'] else 'all right'}, {found['seconds']} s",
            flush=True,
        )
    sys.exit(int(bad))


if __name__ == "__main__":
    main()
