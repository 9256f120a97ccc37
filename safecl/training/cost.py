"""What a run's methods have cost: time per step, state beside the weights, memory rows on the disk. Goes into
results.json."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from typing import TYPE_CHECKING

from safecl.distributed import collectives
from safecl.training.replay_memory import vocab_size_of

if TYPE_CHECKING:
    from safecl.training.run import Run


def cost_of(run: Run, metrics: bytes) -> dict:
    """A collective call, before `run.finish()`. `metrics`: the lines of metrics.jsonl so far (rank 0's count).

    seconds_per_step: median. state_bytes: of each kind beside the weights, over all ranks (with ZeRO stage 0, of one
    rank). memory_bytes: of the replay memory's rows and their teacher outputs, also of those that all runs on a base
    model share. recorded_bytes: of teacher outputs on the tasks' own rows.
    """
    return {
        "seconds_per_step": collectives.gather_objects([_seconds_per_step(metrics)])[0],  # only rank 0 writes metrics
        "state_bytes": _state_bytes(run),
        "memory_bytes": _memory_bytes(run) if run.memory is not None else 0,
        "recorded_bytes": run.recorded_bytes,
    }


def _seconds_per_step(metrics: bytes) -> float | None:
    steps = [json.loads(line) for line in metrics.splitlines()]
    times = [step["tokens"] / step["tokens_per_second"] for step in steps if step["tokens_per_second"]]
    return round(statistics.median(times), 6) if times else None


def _memory_bytes(run: Run) -> int:
    buffer, teacher = run.memory.buffer, run.config.memory.teacher
    own = sum(path.stat().st_size for path in buffer.folder.glob("*.segment"))
    if buffer.teacher_of is None:
        return own
    vocab_size = vocab_size_of(run.engine)
    index = 4 if teacher.indices == "int32" else 2 if vocab_size <= 2**16 else 3
    per_token = min(teacher.k, vocab_size) * (2 + index) + 4  # docs/memory.md
    return own + per_token * int(buffer.targets(buffer.keys()).sum())


def _state_bytes(run: Run) -> dict[str, int]:
    own: Counter[str] = Counter()
    for shard in run.engine.optimizer.shards():
        own.update({kind: tensor.nbytes for kind, tensor in shard.state.items() if not kind.startswith("_")})
    counts = collectives.gather_objects([own])
    return dict(sorted(own.items() if run.engine.shards.replicated else sum(counts, Counter()).items()))
