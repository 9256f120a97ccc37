"""The replay memory inside a run: filled once from its source with the aligned model's outputs, then drawn from at every step."""

from __future__ import annotations

import numpy as np
import torch

from safecl.config import MemoryConfig
from safecl.data import TokenDataset
from safecl.engine import distributed
from safecl.engine.batch import StepRow, micro_batches, to_device
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

    def row_ids(self) -> list[int]:
        return list(self.buffer.keys())

    def _step_row(self, key: int) -> StepRow:
        def load():
            row = self.buffer.get(key)
            return row.row, row.teacher

        rank = self.buffer.rank_of(key, distributed.world_size())
        return StepRow("memory", self.buffer.length(key), self.buffer.num_targets(key), load, rank=rank)


def fill_memory(
    engine: TrainingEngine, dataset: TokenDataset, config: MemoryConfig, *, seed: int, source: str, with_teacher: bool
) -> Memory:
    """Inserts all rows of `dataset`, with what the current model says of them where a method replays that. A collective call."""
    vocab_size = engine.module.model.config.get_text_config().vocab_size
    buffer = ReplayBuffer(config, seed=seed, rank=distributed.rank(), world_size=distributed.world_size())
    outputs = teacher_outputs(engine, dataset, config, vocab_size) if with_teacher else {}
    buffer.insert(
        MemoryRow(dataset.row(i), source=source, task="memory", step=0, tags={}, teacher=outputs.get(i)) for i in range(len(dataset))
    )
    return Memory(buffer)


@torch.no_grad()
def teacher_outputs(engine: TrainingEngine, dataset: TokenDataset, config: MemoryConfig, vocab_size: int) -> dict[int, TeacherOutputs]:
    """Top-k log-probabilities and log tail of the current model for every supervised token of every row, on every rank."""
    teacher = config.teacher
    lengths, num_targets = dataset.lengths.tolist(), dataset.num_targets.tolist()
    rows = [StepRow(str(i), lengths[i], num_targets[i], lambda i=i: (dataset.row(i), None)) for i in range(len(dataset))]
    terms = [row.term for row in rows]
    engine.deepspeed.eval()
    found = []
    for batch in micro_batches(rows, terms, engine.layout, engine.rank):
        inputs = {key: batch.inputs[key] for key in ("input_ids", "position_ids", "positions")}
        settings = dict(k=min(teacher.k, vocab_size), temperature=teacher.temperature)
        output = engine.deepspeed(task="topk", **settings, **to_device(inputs, engine.device))
        found += _split_rows(batch.terms.numpy(), {key: value.cpu() for key, value in output.items()})
    engine.deepspeed.train()
    return dict(distributed.gather_objects(found))


def _split_rows(row_of_target: np.ndarray, output: dict[str, torch.Tensor]) -> list[tuple[int, TeacherOutputs]]:
    result = []
    for index in np.unique(row_of_target):
        chosen = torch.from_numpy(np.flatnonzero(row_of_target == index))
        result.append(
            (
                int(index),
                TeacherOutputs(
                    log_probs=output["log_probs"][chosen].numpy().astype(np.float16),
                    indices=output["indices"][chosen].numpy().astype(np.int32),
                    log_tail=output["log_tail"][chosen].numpy().astype(np.float32),
                ),
            )
        )
    return result
