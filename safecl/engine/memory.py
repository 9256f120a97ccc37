"""The replay memory inside a run: filled once from its source with the aligned model's outputs, then drawn from at every step."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from safecl.config import MemoryConfig
from safecl.data import TokenDataset
from safecl.data.order import keyed_hash
from safecl.engine import distributed
from safecl.engine.batch import StepRow
from safecl.engine.outputs import outputs_of_rows
from safecl.engine.training import TrainingEngine
from safecl.replay import MemoryRow, ReplayBuffer, TeacherOutputs


class Memory:
    """A replay buffer seen as rows of training steps."""

    def __init__(self, buffer: ReplayBuffer):
        self.buffer = buffer

    def draw(self, step: int, num_tokens: int, stream: str) -> list[StepRow]:
        """Rows of about `num_tokens` tokens for global step `step`; the same list on every rank, a function of (seed, step, stream)."""
        return [self._step_row(key) for key in self.buffer.draw(step, num_tokens, stream)]

    def all_rows(self) -> list[StepRow]:
        return [self._step_row(key) for key in self.buffer.keys()]

    def num_bytes(self) -> dict[str, int]:
        """Rows held, and the bytes of their tokens and outputs on the disk."""
        return {"rows": len(self.buffer), "bytes": int(self.buffer.table["nbytes"].sum())}

    def row_ids(self) -> list[int]:
        return list(self.buffer.keys())

    def state_dict(self) -> dict[str, Any]:
        """Which rows are held and where they lie, the same on every rank; rows are on the disk when it returns. A collective call."""
        self.buffer.flush()
        distributed.barrier()
        return self.buffer.state_dict()

    def _step_row(self, key: int) -> StepRow:
        def load():
            row = self.buffer.get(key)
            return row.row, row.teacher

        rank = self.buffer.rank_of(key, distributed.world_size())
        return StepRow("memory", self.buffer.length(key), self.buffer.num_targets(key), load, rank=rank)


def open_memory(config: MemoryConfig, folder: Path | None, seed: int) -> Memory:
    """The memory in a folder that all ranks share; each writes its own rows. Without a folder rows lie in temporary ones.

    All ranks must have opened it before one inserts: a rank counts what it finds.
    """
    return Memory(ReplayBuffer(config, folder, seed=seed, rank=distributed.rank(), world_size=distributed.world_size()))


def fill_memory(
    engine: TrainingEngine, dataset: TokenDataset, config: MemoryConfig, *, seed: int, source: str, with_teacher: bool,
    folder: Path | None = None,
) -> Memory:  # fmt: skip
    """A memory of all rows of `dataset`, with what the current model says of them where a method replays that. A collective call.

    What an earlier run left in `folder` is removed.
    """
    if folder is not None and distributed.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    distributed.barrier()
    memory = open_memory(config, folder, seed)
    distributed.barrier()
    remember(engine, memory, dataset, config, source=source, task="memory", step=0, with_teacher=with_teacher)
    return memory


def remember(engine: TrainingEngine, memory: Memory, dataset: TokenDataset, config: MemoryConfig, *, with_teacher: bool, **origin) -> None:
    """Inserts all rows of `dataset`, with what the current model says of them where a method replays that. A collective call.

    origin: source, task and step of the rows, see MemoryRow.
    """
    outputs = teacher_outputs(engine, dataset, config) if with_teacher and config.teacher.kind == "topk" else {}
    memory.buffer.insert(MemoryRow(dataset.row(i), tags=dataset.tags(i), teacher=outputs.get(i), **origin) for i in range(len(dataset)))


def sample_rows(dataset: TokenDataset, num_rows: int, seed: int) -> TokenDataset:
    """`num_rows` of the rows (all where there are fewer), a function of the seed and the rows' ids; more rows keep those that are in."""
    chosen = np.argsort(keyed_hash(dataset.row_ids, "keep", seed), kind="stable")[:num_rows]
    return dataset.select(np.sort(chosen))


def teacher_outputs(engine: TrainingEngine, dataset: TokenDataset, config: MemoryConfig) -> dict[int, TeacherOutputs]:
    """Top-k log-probabilities and log tail of the current model for every supervised token of every row, on every rank."""
    vocab_size = engine.module.model.config.get_text_config().vocab_size
    settings = dict(k=min(config.teacher.k, vocab_size), temperature=config.teacher.temperature)
    found = [(index, _stored(output)) for index, output in outputs_of_rows(engine, dataset, "topk", **settings)]
    return dict(distributed.gather_objects(found))


def _stored(output: dict) -> TeacherOutputs:
    return TeacherOutputs(
        log_probs=output["log_probs"].numpy().astype(np.float16),
        indices=output["indices"].numpy().astype(np.int32),
        log_tail=output["log_tail"].numpy().astype(np.float32),
    )
