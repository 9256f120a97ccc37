"""Runs that are saved, stopped and resumed on the ranks of the pool."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from safecl.distributed import collectives
from safecl.engine.checkpoint.random_state import seed_generators
from tests.engine import scenes

KEEP_ALL = 1000


@contextmanager
def open_saver(folder: str, bf16: bool = False, other_base: bool = False, **changes) -> Iterator:
    """(run, task, saver) of a run that has not begun; its files are closed at the end. `other_base`: one weight of the
    model is changed."""
    from safecl.planning.plans import RunPlan
    from safecl.training.identity import base_of, identity_of
    from safecl.training.resume import RunSaver

    config = scenes.run_config(tmp=folder, **changes)
    model = scenes.tiny_model(dtype=torch.bfloat16 if bf16 else torch.float32)
    if other_base:
        model.model.norm.weight.data[3] *= 1.01
    base = base_of(config, str(sum(float(p.detach().double().sum()) for p in model.parameters())))
    run, task = scenes.build_run(config, model)
    rows = scenes.random_dataset(20, seed=2) if config.memory is not None else None
    saver = RunSaver(run, Path(folder), identity_of(RunPlan(config, None, [task], run.methods, rows)), base)
    try:
        yield run, task, saver
    finally:
        saver.close()
        if run.memory is not None:
            run.memory.buffer.close()


def step_once(run, task, log: list[dict]) -> None:
    """One step; what it saw and did joins the log."""
    rows = [[row.term, row.length, row.num_targets] for row in run.step_rows(task)]
    totals = run.train_step(task).totals()
    result = run.engine.optimizer.result
    log.append(
        {
            "step": run.global_step,
            "rows": rows,
            "losses": totals,
            "norm": float(result.grad_norm),
            "lr": run.last_learning_rate,
        }
    )


def digests(run) -> dict[str, str]:
    """Hash of every kind of state over the whole model, of the generators, and of the memory's index."""
    from safecl.engine.checkpoint.random_state import random_state

    shards, optimizer = run.engine.shards, run.engine.optimizer
    kinds = sorted(kind for kind in optimizer.shards()[0].state if not kind.startswith("_"))
    found = {"weights": _digest(shards, None)} | {kind: _digest(shards, optimizer.tensors(kind)) for kind in kinds}
    live = hashlib.sha256()
    for p in run.engine.module.parameters():
        with shards.full_parameter(p):
            live.update(p.detach().float().contiguous().numpy().tobytes())
    found |= {"live": live.hexdigest(), "random": hashlib.sha256(random_state().encode()).hexdigest()}
    if run.memory is not None:
        found["memory"] = repr([(key, run.memory.buffer.length(key)) for key in run.memory.buffer.keys()])
    return found


def _digest(shards, tensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(shards.shapes):
        value = shards.read(name, tensors)
        digest.update(f"{name} {value.dtype}".encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def train_and_save(folder: str, steps: int, save_after: Sequence[int] = (), watched: Sequence[int] = (), **changes):
    """An uninterrupted run that saves after the given steps. Returns (log, {watched step: digests})."""
    with open_saver(folder, **changes) as (run, task, saver):
        seed_generators(11 + collectives.rank())
        scenes.begin(run, task, memory_folder=saver.memory_folder)
        return _go_on(run, task, saver, steps, save_after, watched, [], _progress())


def resume_and_train(folder: str, steps: int, save_after: Sequence[int] = (), watched: Sequence[int] = (), **changes):
    """Goes on from the newest checkpoint to step `steps`. Returns (log with that before the cut, {watched step:
    digests}, notes)."""
    with open_saver(folder, **changes) as (run, task, saver):
        seed_generators(999)
        notes: list[str] = []
        resumed = saver.resume(notes.append, [task])
        log = json.loads(resumed.metrics)
        return *_go_on(run, task, saver, steps, save_after, watched, log, resumed.progress), notes


def refusal_of_resuming(folder: str, **changes) -> str:
    """The message by which a run is refused; empty where it is not."""
    from safecl.config import ConfigError

    with open_saver(folder, **changes) as (_, task, saver):
        try:
            saver.resume(lambda message: None, [task])
        except ConfigError as error:
            return str(error)
    return ""


def train_after_a_first_task(folder: str, **changes) -> None:
    """Two steps, then the task begins again, as a second one does, and is saved after its first step."""
    with open_saver(folder, **changes) as (run, task, saver):
        scenes.begin(run, task, memory_folder=saver.memory_folder)
        for _ in range(2):
            step_once(run, task, [])
        run.end_task()
        run.begin_task(task, active=True)
        step_once(run, task, [])
        saver.save(_progress(), b"[]", KEEP_ALL)
        assert saver.settle().problem is None


def _progress():
    from safecl.training.resume import Progress

    return Progress(parts_done=3)


def _go_on(run, task, saver, steps, save_after, watched, log, progress):
    states = {run.global_step: digests(run)} if run.global_step in watched else {}
    while run.global_step < steps:
        torch.rand(3)  # as dropout does
        step_once(run, task, log)
        if run.global_step in save_after:
            saver.save(progress, json.dumps(log).encode(), KEEP_ALL)
        if run.global_step in watched:
            states[run.global_step] = digests(run)
    if (report := saver.settle()) is not None:
        assert report.problem is None, report
    return log, states


def cut_at_every_step(folder: str, cuts: int, steps: int, **changes) -> list[str]:
    """Runs once without interruption, then resumes from a save after each of the first `cuts` steps; returns what was
    not the same.

    The state is compared at the cut and one step later; equal states have equal futures, and from the first cut the run
    goes to its end.
    """
    whole_log, whole = train_and_save(folder, steps, range(1, cuts + 1), watched=range(1, steps + 1), **changes)
    differences = []
    for cut in range(cuts, 0, -1):
        last = steps if cut == 1 else cut + 1
        log, states, notes = resume_and_train(folder, last, watched=(cut, cut + 1, last), **changes)
        differences += notes + [
            f"cut {cut}: log of step {b['step']}" for a, b in zip(log, whole_log[:last], strict=True) if a != b
        ]
        for step, state in states.items():
            differences += [
                f"cut {cut}: {kind} at step {step}" for kind in whole[step] if state.get(kind) != whole[step][kind]
            ]
        collectives.barrier()
        if collectives.rank() == 0:
            shutil.rmtree(Path(folder) / "checkpoints" / f"step-{cut:08d}")
        collectives.barrier()
    return differences


def cut_with_a_loss(folder: str, lost: str, **changes) -> list[str]:
    """As cut_at_every_step with one cut, but one kind of state comes back slightly wrong."""
    from unittest import mock

    from safecl.engine.checkpoint.reading import CheckpointReader

    load = CheckpointReader.load

    def load_with_a_loss(self, contents):
        load(self, contents)
        tensors = self.shards.flats if lost == "weights" else self.optimizer.tensors(lost)
        tensors[0].detach().view(-1)[:50] *= 1.01
        self.shards.publish()

    with mock.patch.object(CheckpointReader, "load", load_with_a_loss):
        return cut_at_every_step(folder, cuts=1, steps=3, **changes)


def leg(folder: str, until: int, begins_again_at: int | None = None, **changes):
    """Begins or resumes in this layout, up to step `until`, and saves. Rank 0 returns (state at the start, state at the
    end, log).

    `begins_again_at`: the step before which the task begins again as a second one does, with a new anchor.
    """
    with open_saver(folder, **changes) as (run, task, saver):
        resumed = saver.resume(lambda message: None, [task])
        if resumed is None:
            scenes.begin(run, task, memory_folder=saver.memory_folder)
        log = json.loads(resumed.metrics) if resumed is not None else []
        start = whole_state(run)
        while run.global_step < until:
            if run.global_step == begins_again_at:
                run.end_task()
                run.begin_task(task, active=True)
            step_once(run, task, log)
        saver.save(_progress(), json.dumps(log).encode(), keep=2)
        end = whole_state(run)
        assert saver.settle().problem is None
    return (start, end, log) if collectives.rank() == 0 else None


def whole_state(run) -> dict[str, dict[str, torch.Tensor]]:
    """Every kind of state that is saved, by parameter."""
    shards, optimizer = run.engine.shards, run.engine.optimizer
    kinds = {kind: optimizer.tensors(kind) for kind in optimizer.shards()[0].state if not kind.startswith("_")}
    return {
        kind: {name: shards.read(name, tensors) for name in shards.shapes}
        for kind, tensors in ({"weights": None} | kinds).items()
    }
