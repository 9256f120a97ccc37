"""Scenes of test_nonfinite: runs on the pool's ranks into which a value that is not finite is put."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

import torch

from safecl.config import ConfigError, RunConfig
from tests.engine import scenes

EWC = {"strength": 2.0, "sign_batches": 4, "rows_per_batch": 4}
WITH_ALL_STATE = {"ewc": EWC, "ema": {"decay": 0.9}}
PLACE = "model.layers.1.mlp.up_proj.weight"


def poison_state(run, kind: str, value: float) -> None:
    """Put a value into the second element of PLACE of one kind of state, on the rank that has it."""
    shards = run.engine.shards
    tensors = None if kind == "weights" else run.engine.optimizer.tensors(kind)
    for fragment in shards.fragments:
        if fragment.name == PLACE and fragment.offset <= 1 < fragment.offset + fragment.length:
            shards.view(fragment, tensors)[1 - fragment.offset] = value


def steps_on_poisoned_state(kinds: list[str], value: float, stage: int, tmp: str) -> dict[str, list]:
    """By kind: what the pass after it counted, how the fault is described before and after that pass, and whether a
    checkpoint of it was refused."""
    from safecl.training.nonfinite import fault_in_state
    from tests.training.resume_scenes import open_saver

    found = {}
    for kind in kinds:
        folder = f"{tmp}/{kind}"
        changes = {"offload": {"reference": "none"}}
        with open_saver(folder, methods=WITH_ALL_STATE, deepspeed={"stage": stage} | changes) as (run, task, saver):
            scenes.begin(run, task, memory_folder=saver.memory_folder)
            clean = run.train_step(task).totals()["nonfinite"]
            save(saver, run)
            poison_state(run, kind, value)
            described = fault_in_state(run)
            save(saver, run)
            losses = run.train_step(task)
            applied = run.engine.optimizer.result.applied
            later = fault_in_state(run)
            names = saver.checkpoints.names()
            found[kind] = [clean, losses.totals()["nonfinite"], applied, described, later, names]
    return found


def save(saver, run) -> str | None:
    from safecl.training.resume import Progress

    saver.save(Progress(), b"", keep=2)
    return saver.settle().problem


def step_with_a_bad_row(stage: int, of: str, **changes) -> dict:
    """One clean step and one in which a row's loss is NaN: a task row's, a memory row's, or the distance to a teacher.

    The bad row is the first that rank 1 computes. Returns what the step says and which state it has changed.
    """
    from safecl.engine.passes.micro_batches import split_step
    from safecl.engine.passes.step_rows import terms_of
    from safecl.engine.passes.training_engine import TrainingEngine
    from safecl.training.nonfinite import cause_of_skip

    run, task = scenes.make_run(scenes.run_config(deepspeed={"stage": stage}, **changes))
    run.train_step(task)
    before, keys = scenes.state_of(run), list(run.memory.buffer.keys())
    moments = [run.engine.optimizer.tensors(kind)[0].clone() for kind in ("exp_avg", "exp_avg_sq")]
    original = TrainingEngine._forward_backward

    def poisoned(engine, rows, adapter_penalty, batches):
        batches = engine.prepare(rows) if batches is None else batches
        if engine.rank != 1:
            return original(engine, rows, adapter_penalty, batches)
        term = terms_of(rows).index({"task": "task", "memory": "replay2", "teacher": "replay"}[of])
        own = iter([batch.terms == term for batch in batches])
        with mock.patch.object(engine.module, "losses", _with_nan(engine.module.losses, of, own)):
            return original(engine, rows, adapter_penalty, batches)

    rows = run.step_rows(task)
    log_losses = mock.patch.object(run.memory, "log_losses")
    with mock.patch.object(TrainingEngine, "_forward_backward", poisoned), log_losses as logged:
        run.train_step(task)
    after = scenes.state_of(run)
    now = [run.engine.optimizer.tensors(kind)[0] for kind in ("exp_avg", "exp_avg_sq")]
    own = [rows[i].index for part in split_step(rows, run.engine.layout)[1] for i in part]
    lines = [int(task.dataset.lines[index]) for index in own if index is not None]
    return {
        "applied": run.engine.optimizer.result.applied,
        "changed": [
            kind for kind in before if any(not torch.equal(before[kind][n], after[kind][n]) for n in before[kind])
        ]
        + ["moments"] * (not all(torch.equal(a, b) for a, b in zip(moments, now, strict=True)))
        + ["memory"] * (keys != list(run.memory.buffer.keys()) or logged.called),
        "cause": cause_of_skip(run, task),
        "lines": lines,
    }


def _with_nan(losses, of: str, own):
    """Make the first loss of a kind NaN: `task` and `memory` by cross-entropy, `teacher` by distance. own: by
    micro-batch, the targets of the kind's rows."""

    def poisoned(**inputs):
        output = dict(losses(**inputs))
        name, candidates = "ce", (inputs["ce_weights"] > 1e-20) & next(own)
        if of == "teacher":
            distances = [distance["kd_weights"] > 1e-20 for distance in inputs["distillations"]]
            name, candidates = "kd0", distances[0] if distances else candidates[:0]
        if not len(chosen := candidates.nonzero()):
            return output
        place = int(chosen[0])
        values = output[name].clone()
        values[place] = float("nan")
        return output | {name: values, "loss": output["loss"] * float("nan")}

    return poisoned


def step_with_one_bad_replica(stage: int) -> tuple[bool, str, bool]:
    """A gradient that only rank 1 sees as NaN, after the reduction. (applied, what the step says, weights are equal on
    all ranks)"""
    from safecl.distributed import collectives
    from safecl.training.nonfinite import cause_of_skip

    run, task = scenes.make_run(scenes.run_config(memory=None, deepspeed={"stage": stage}))
    original = run._hooks

    def spoil(shards):
        if collectives.rank() == 1:
            shards[0].grad.view(-1)[0] = float("nan")

    run._hooks = lambda name, methods: [spoil] if name == "transform_gradient" else original(name, methods)
    run.train_step(task)
    weights = torch.cat([flat.detach().view(-1) for flat in run.engine.shards.flats])
    everywhere = collectives.gather_tensors(weights)
    return run.engine.optimizer.result.applied, cause_of_skip(run, task), bool((everywhere == everywhere[0]).all())


def fit(tree: dict, cache: str, fault: str = "") -> str:
    """Run a whole run with a fault in it; return its message."""
    from safecl.engine.checkpoint.model_export import ExportFailed
    from safecl.training import trainer

    os.environ["SAFECL_CACHE"] = cache
    run = trainer.Trainer(RunConfig.model_validate(tree))
    try:
        with FAULTS[fault]():
            run.fit()
    except (trainer.TrainingFailed, ExportFailed, ConfigError) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def _nothing():
    return mock.patch.object(json, "_never", None, create=True)


def _when_the_task_ends(poison):
    """Spoil the run after its last update."""
    from safecl.training.run import Run

    original = Run.end_task

    def end_task(run):
        original(run)
        poison(run)

    return mock.patch.object(Run, "end_task", end_task)


def _spoil(kind: str):
    def poison(run):
        shards = run.engine.shards
        tensors = None if kind == "weights" else run.engine.optimizer.tensors(kind)
        shards.view(shards.fragments[0], tensors)[0] = float("nan")

    return poison


def _spoil_live(run) -> None:
    """One weight of the live model, which its master does not show."""
    p = next(run.engine.module.parameters())
    getattr(p, "ds_tensor", p).data.view(-1)[0] = float("inf")


FAULTS = {
    "": _nothing,
    "weights at the end": lambda: _when_the_task_ends(_spoil("weights")),
    "ema at the end": lambda: _when_the_task_ends(_spoil("ema")),
    "live weights at the end": lambda: _when_the_task_ends(_spoil_live),
}


def spoil_a_model(folder: Path, name: str = "model.norm.weight") -> None:
    """Make two values of a saved weight NaN."""
    from safetensors.torch import load_file, save_file

    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors[name].view(-1)[:2] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
