"""Checkpoints that one layout writes and another reads (section `layouts` of sections.py)."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults.sections import EWC, ONLINE_EWC, ranks, read_results, scratch, write_section


def all_layouts() -> dict[str, tuple[int, dict]]:
    """Return name -> (ranks, the config's section `deepspeed`)."""
    kinds = {f"stage {stage}": {"stage": stage} for stage in range(4)}
    kinds |= {f"stage {stage} offload": {"stage": stage, "offload": {"optimizer": "cpu"}} for stage in (1, 2)}
    kinds["stage 3 offload"] = {"stage": 3, "offload": {"optimizer": "cpu", "parameters": "cpu"}}
    return {f"{world_size} x {name}": (world_size, kind) for world_size in (1, 2, 4) for name, kind in kinds.items()}


def layouts() -> dict:
    """Let every layout write after 10 steps, and every layout read that and continue to step 20.

    A second call continues after the layouts that are done. The task begins again at step 4, so that one anchor is the
    base model, which a checkpoint names, and one is another model, which it stores. Readers of 1, 2 and 4 ranks work at
    the same time.
    """
    from tests.training import resume_scenes

    done = read_results().get("layouts", {}).get("writers", {})
    methods = EWC | ONLINE_EWC | {"ema": {"decay": 0.9}, "der": {"alpha": 0.5}}
    with scratch() as folder, contextlib.ExitStack() as stack:
        pools = {world_size: stack.enter_context(ranks(world_size)) for world_size in (1, 2, 4)}

        def leg(name: str, where: Path, until: int) -> tuple:
            world_size, deepspeed = all_layouts()[name]
            settings = dict(begins_again_at=4, methods=methods, deepspeed=deepspeed)
            return pools[world_size].run(resume_scenes.leg, folder=str(where), until=until, **settings)[0]

        def read_all(world_size: int, saved: dict) -> dict[str, tuple[float, list[str]]]:
            readers = [name for name, (size, _) in all_layouts().items() if size == world_size]
            return {reader: _compare(leg, reader, folder, saved, first, whole, rows) for reader in readers}

        first, whole, rows = leg("1 x stage 1", folder / "whole", 20)
        rows = [line["rows"] for line in rows]
        for writer in all_layouts():
            if writer in done:
                continue
            _, saved, _ = leg(writer, folder / "written", 10)
            assert saved.keys() == whole.keys(), saved.keys()
            with concurrent.futures.ThreadPoolExecutor(len(pools)) as threads:
                parts = threads.map(read_all, pools, itertools.repeat(saved))
                distances = {reader: found for part in parts for reader, found in part.items()}
            shutil.rmtree(folder / "written")
            done[writer] = {
                "readers": len(distances),
                "largest_distance": max(found[0] for found in distances.values()),
                "wrong": [
                    f"{writer} -> {reader}: {problem}" for reader, found in distances.items() for problem in found[1]
                ],
            }
            print(f"  {writer}: {done[writer]}", flush=True)
            write_section("layouts", _layout_summary(done))
    return _layout_summary(done)


def _layout_summary(done: dict) -> dict:
    return {
        "pairs": sum(found["readers"] for found in done.values()),
        "largest_distance_after_20_steps": max(found["largest_distance"] for found in done.values()),
        "wrong": [problem for found in done.values() for problem in found["wrong"]],
        "writers": done,
    }


def _compare(
    leg: Callable, reader: str, folder: Path, saved: dict, first: dict, whole: dict, rows: list
) -> tuple[float, list[str]]:
    import torch

    from tests.engine.passes import oracle

    where = shutil.copytree(folder / "written", folder / f"read by {reader}")
    start, end, log = leg(reader, where, 20)
    shutil.rmtree(where)
    problems = [
        f"{kind} of {name} is not what was saved"
        for kind, values in saved.items()
        for name, value in values.items()
        if value.dtype != start[kind][name].dtype or not torch.equal(value, start[kind][name])
    ]
    problems += ["other rows"] if [line["rows"] for line in log] != rows else []
    distance = max(
        float(oracle.relative_distance(end[kind], whole[kind], first["weights"])) for kind in ("weights", "ema")
    )
    others = [float(oracle.relative_distance(end[kind], whole[kind])) for kind in whole.keys() - {"weights", "ema"}]
    distance = max(distance, *others)
    return distance, problems + ([f"{distance:.1e} away after 20 steps"] if distance > 1e-3 else [])
