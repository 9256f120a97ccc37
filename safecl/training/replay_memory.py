"""The replay memory inside a run: filled once from its source with the aligned model's outputs, then drawn from at
every step."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from safecl.config import MemoryConfig
from safecl.data import TokenDataset
from safecl.data.order import keyed_hash
from safecl.distributed import collectives
from safecl.engine.passes.step_rows import StepRow
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.engine.teachers.outputs import mean_nll, outputs_of_rows, stored_form
from safecl.replay import MemoryRow, ReplayBuffer, SharedOutputs, TeacherOutputs


class Memory:
    """A replay buffer seen as rows of training steps."""

    def __init__(self, buffer: ReplayBuffer):
        self.buffer = buffer

    def draw(self, step: int, num_tokens: int, stream: str) -> list[StepRow]:
        """Rows of about `num_tokens` tokens for global step `step`; the same list on every rank, a function of (seed,
        step, stream)."""
        return [self._step_row(key) for key in self.buffer.draw(step, num_tokens, stream)]

    @property
    def follows_losses(self) -> bool:
        """True where draws depend on the losses of rows that were replayed before."""
        return self.buffer.drawer.uses_scores

    def log_losses(self, step: int, rows: Sequence[StepRow], own: dict[int, float]) -> None:
        """Logs the mean NLL of a step's replayed rows, 16 bytes a row between ranks. A collective call, once a step.

        rows: of the whole step, alike on all ranks. own: by key, of those that this rank computed.
        """
        most = max(np.bincount([row.rank for row in rows if row.key is not None], minlength=1).tolist())
        values = torch.full((most, 2), float("nan"), dtype=torch.float64, device=collectives.device())
        values[: len(own)] = torch.tensor(list(own.items()), dtype=torch.float64).view(-1, 2)
        found = collectives.gather_tensors(values).view(-1, 2).cpu().numpy()
        found = found[~np.isnan(found[:, 0])]
        self.buffer.log_scores(step, found[:, 0].astype(np.uint64), found[:, 1])

    def all_rows(self) -> list[StepRow]:
        return [self._step_row(key) for key in self.buffer.keys()]

    def num_bytes(self) -> dict[str, int]:
        """Rows held, and the bytes that they take on the disk; outputs in the shared cache are not among them."""
        return {"rows": len(self.buffer), "bytes": int(self.buffer.table["nbytes"].sum())}

    def row_ids(self) -> list[int]:
        return list(self.buffer.keys())

    def state_dict(self) -> dict[str, Any]:
        """Which rows are held and where they lie, the same on every rank; rows are on the disk when it returns. A
        collective call."""
        self.buffer.flush()
        collectives.barrier()
        return self.buffer.state_dict()

    def _step_row(self, key: int) -> StepRow:
        def load():
            row = self.buffer.get(key)
            return row.row, row.teacher

        rank = self.buffer.rank_of(key, collectives.world_size())
        return StepRow("memory", self.buffer.length(key), self.buffer.num_targets(key), load, rank=rank, key=key)


def open_memory(config: MemoryConfig, folder: Path | None, seed: int, vocab_size: int | None = None) -> Memory:
    """The memory in a folder that all ranks share; each writes its own rows. Without a folder rows lie in temporary
    ones.

    All ranks must have opened it before one inserts: a rank counts what it finds. vocab_size: width of the model's
    logits.
    """
    ranks = dict(rank=collectives.rank(), world_size=collectives.world_size())
    outputs = SharedOutputs.of(folder) if folder is not None else None
    return Memory(ReplayBuffer(config, folder, seed=seed, vocab_size=vocab_size, teacher_of=outputs, **ranks))


def vocab_size_of(engine: TrainingEngine) -> int:
    """Width of the model's logits."""
    return engine.module.model.config.get_text_config().vocab_size


def fill_memory(
    engine: TrainingEngine, dataset: TokenDataset, config: MemoryConfig, *, seed: int, source: str, with_teacher: bool,
    folder: Path | None = None, shared: SharedOutputs | None = None,
) -> Memory:  # fmt: skip
    """A memory of all rows of `dataset`, with what the current model says of them where a method replays that. A
    collective call.

    `shared` outputs stay where they are and need not be computed. What an earlier run left in `folder` is removed.
    """
    if folder is not None and collectives.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        if shared is not None and config.teacher.kind == "topk":
            shared.link(folder)
    collectives.barrier()
    memory = open_memory(config, folder, seed, vocab_size_of(engine))
    collectives.barrier()
    if shared is None:
        remember(engine, memory, dataset, config, source=source, task="memory", step=0, with_teacher=with_teacher)
    else:
        nlls = [shared.reader.prior_nll(row_id) for row_id in dataset.row_ids.tolist()]
        memory.buffer.insert(
            MemoryRow(dataset.row(i), tags=dataset.tags(i), source=source, task="memory", prior_nll=nll)
            for i, nll in enumerate(nlls)
        )
    return memory


def remember(
    engine: TrainingEngine, memory: Memory, dataset: TokenDataset, config: MemoryConfig, *, with_teacher: bool, **origin
) -> None:
    """Inserts all rows of `dataset`, with what the current model says of them where a method replays that. A collective
    call.

    origin: source, task and step of the rows, see MemoryRow.
    """
    buffer, outputs, nlls, k = memory.buffer, {}, np.full(len(dataset), np.nan), None
    if with_teacher:
        k = min(config.teacher.k, vocab_size_of(engine))
        owners = buffer.ranks_of(range(buffer.num_seen, buffer.num_seen + len(dataset)), collectives.world_size())
        outputs, nlls = own_outputs(engine, dataset, owners, k=k, temperature=config.teacher.temperature)
        if config.teacher.kind != "topk":  # only the guard and the draws look at what the model said
            outputs, k = {}, None
    rows = (
        MemoryRow(dataset.row(i), tags=dataset.tags(i), teacher=outputs.get(i), prior_nll=float(nlls[i]), **origin)
        for i in range(len(dataset))
    )
    buffer.insert(rows, own_outputs=k)


def own_outputs(
    engine: TrainingEngine, dataset: TokenDataset, owners: np.ndarray, *, k: int, temperature: float
) -> tuple[dict[int, TeacherOutputs], np.ndarray]:
    """Top-k outputs of the current model for the rows of which this rank is the owner; and the mean NLL of all rows,
    fp64 [rows]."""
    outputs, own_nlls, nlls = {}, [], np.full(len(dataset), np.nan)
    for index, output in outputs_of_rows(engine, dataset, "topk", rank_of=owners, k=k, temperature=temperature):
        outputs[index] = stored_form(output)
        own_nlls.append((index, mean_nll(output)))
    for index, nll in collectives.gather_objects(own_nlls):
        nlls[index] = nll
    return outputs, nlls


def sample_rows(dataset: TokenDataset, num_rows: int, seed: int) -> TokenDataset:
    """`num_rows` of the rows (all where there are fewer), a function of the seed and the rows' ids; more rows keep
    those that are in."""
    chosen = np.argsort(keyed_hash(dataset.row_ids, "keep", seed), kind="stable")[:num_rows]
    return dataset.select(np.sort(chosen))
