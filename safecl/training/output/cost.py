"""Measures the cost of a run's methods, for results.json: time per step, state of the optimizer, memory rows, teacher
outputs."""

from __future__ import annotations

import json
import statistics
from typing import Any

from safecl.distributed import collectives
from safecl.training.replay_memory import vocab_size_of
from safecl.training.steps.state import RunState


def cost_of(run: RunState, metrics: bytes, state: dict[str, int]) -> dict[str, Any]:
    """Return `cost` of results.json. A collective call, before `run.finish()`.

    metrics: the lines of metrics.jsonl so far, on rank 0. state: see `state_bytes`.

    seconds_per_step: median. state_bytes: the optimizer's state by kind, moments included. memory_bytes: the replay
    memory's rows on the disk and their teacher outputs, also those that all runs on a base model share.
    recorded_bytes: teacher outputs on the tasks' own rows.
    """
    return {
        "seconds_per_step": collectives.gather_objects([_seconds_per_step(metrics)])[0],  # only rank 0 writes metrics
        "state_bytes": dict(sorted((kind, size) for kind, size in state.items() if not kind.startswith("_"))),
        "memory_bytes": _memory_bytes(run),
        "recorded_bytes": sum(run.recorded_teachers.bytes_by_term().values()),
    }


def kept_bytes(run: RunState, state: dict[str, int]) -> dict[str, Any]:
    """Return `kept_bytes` of results.json: the bytes that methods keep besides weights and moments. state: see
    `state_bytes`.

    state: bytes by kind. recorded: teacher outputs on task rows, by term. memory: rows held, and their bytes.
    reference: theta_0 on each node.
    """
    kept: dict[str, int] = {}
    for kind, size in state.items():
        if not kind.startswith("exp_avg"):
            kept[kind.lstrip("_")] = kept.get(kind.lstrip("_"), 0) + size
    return {
        "state": kept,
        "recorded": run.recorded_teachers.bytes_by_term(),
        "memory": run.memory.sizes() if run.memory is not None else {},
        "reference": run.engine.store.nbytes if run.engine.store is not None else 0,
    }


def state_bytes(run: RunState) -> dict[str, int]:
    """Bytes of each kind of state besides the weights, over all ranks. A collective call.

    In ZeRO stage 0 every rank holds the same state, and one copy is counted: what a method keeps does not depend on the
    number of ranks.
    """
    own = [(kind, value.nbytes) for shard in run.engine.optimizer.shards() for kind, value in shard.state.items()]
    counted = collectives.gather_objects(own)
    found: dict[str, int] = {}
    for kind, size in own if run.engine.shards.replicated else counted:
        found[kind] = found.get(kind, 0) + size
    return found


def _seconds_per_step(metrics: bytes) -> float | None:
    steps = [json.loads(line) for line in metrics.splitlines()]
    times = [step["tokens"] / step["tokens_per_second"] for step in steps if step["tokens_per_second"]]
    return round(statistics.median(times), 6) if times else None


def _memory_bytes(run: RunState) -> int:
    if run.memory is None or run.config.memory is None:
        return 0
    buffer, teacher = run.memory.buffer, run.config.memory.teacher
    own = sum(path.stat().st_size for path in buffer.folder.glob("*.segment"))
    if buffer.teacher_of is None:
        return own
    vocab_size = vocab_size_of(run.engine)
    index = 4 if teacher.indices == "int32" else 2 if vocab_size <= 2**16 else 3
    per_token = min(teacher.k, vocab_size) * (2 + index) + 4  # docs/memory.md
    return own + per_token * int(buffer.targets(buffer.keys()).sum())
