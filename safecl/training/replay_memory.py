"""The replay memory inside a run: filled once, with the aligned model's outputs, then drawn from at every step."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from safecl.config import MemoryConfig, RunConfig
from safecl.data import Row, TokenDataset
from safecl.data.order import keyed_hash
from safecl.distributed import collectives
from safecl.engine.artifacts.teacher_outputs import needs_outputs, shared_outputs
from safecl.engine.passes.step_rows import StepRow
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.engine.teachers.outputs import mean_nll, outputs_of_rows, stored_form
from safecl.planning.memory_kinds import TagsOf, tags_of_memory
from safecl.replay import MemoryRow, ReplayBuffer, SharedOutputs, TeacherOutputs

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class ReplayMemory:
    """A replay buffer whose rows are rows of training steps."""

    def __init__(self, buffer: ReplayBuffer):
        self.buffer = buffer

    def draw(self, step: int, num_tokens: int, stream: str) -> list[StepRow]:
        """Draw rows of about `num_tokens` tokens for a global step: the same list on every rank, a function of (seed,
        step, stream)."""
        return [self._step_row(key) for key in self.buffer.draw(step, num_tokens, stream)]

    @property
    def follows_losses(self) -> bool:
        """True where draws depend on the losses of rows that were replayed before."""
        return self.buffer.drawer.uses_scores

    def log_losses(self, step: int, rows: Sequence[StepRow], own: dict[int, float]) -> None:
        """Log the mean NLL of a step's replayed rows; the ranks exchange 16 bytes a row. A collective call, once a
        step.

        rows: all rows of the step, the same list on every rank. own: losses by key, of the rows that this rank
        computed.
        """
        owners = np.array([row.rank for row in rows if row.key is not None], np.int64)
        most = max(np.bincount(owners, minlength=1).tolist())
        values = torch.full((most, 2), float("nan"), dtype=torch.float64, device=collectives.device())
        values[: len(own)] = torch.tensor(list(own.items()), dtype=torch.float64).view(-1, 2)
        found = collectives.gather_tensors(values).view(-1, 2).cpu().numpy()
        found = found[~np.isnan(found[:, 0])]
        self.buffer.log_scores(step, found[:, 0].astype(np.uint64), found[:, 1])

    def all_rows(self) -> list[StepRow]:
        return [self._step_row(key) for key in self.buffer.keys()]

    def keys(self) -> list[int]:
        """Return the rows' keys, in the order of `all_rows`."""
        return list(self.buffer.keys())

    def sizes(self) -> dict[str, int]:
        """Rows that the memory holds, and their bytes on the disk without outputs in the shared cache."""
        return {"rows": len(self.buffer), "bytes": int(self.buffer.table["nbytes"].sum())}

    def state_dict(self) -> dict[str, Any]:
        """Return which rows are held and where they lie, the same on every rank. All rows are on the disk by then. A
        collective call."""
        self.buffer.flush()
        collectives.barrier()
        return self.buffer.state_dict()

    def _step_row(self, key: int) -> StepRow:
        return StepRow(
            "memory",
            self.buffer.length(key),
            self.buffer.num_targets(key),
            functools.partial(self._load, key),
            rank=self.buffer.rank_of(key, collectives.world_size()),
            key=key,
        )

    def _load(self, key: int) -> tuple[Row, TeacherOutputs | None]:
        row = self.buffer.get(key)
        return row.row, row.teacher


# -------------------------------------------------------------------------------------------------- opening and filling


def open_memory(config: MemoryConfig, folder: Path | None, seed: int, vocab_size: int | None = None) -> ReplayMemory:
    """Open the memory in a folder that all ranks share; each rank writes its own rows.

    Every rank must have opened it before one inserts, because opening counts the rows that are there. folder: None for
    temporary files. vocab_size: width of the model's logits.
    """
    outputs = SharedOutputs.of(folder) if folder is not None else None
    return ReplayMemory(
        ReplayBuffer(
            config,
            folder,
            seed=seed,
            vocab_size=vocab_size,
            teacher_of=outputs,
            rank=collectives.rank(),
            world_size=collectives.world_size(),
        )
    )


def vocab_size_of(engine: TrainingEngine) -> int:
    """Return the width of the model's logits."""
    config: PretrainedConfig = engine.module.model.config  # type: ignore[assignment]  # nn.Module declares no `config`
    return config.get_text_config().vocab_size


def make_memory(
    engine: TrainingEngine,
    rows: TokenDataset,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    folder: Path,
    note: Callable[[str], None],
) -> ReplayMemory:
    """Make the memory of a run from its rows. A collective call.

    The base model's outputs come from the store of artifacts. No other run has a model that this run has aligned, so
    the outputs of that stay in the run's own memory.
    """
    assert config.memory is not None
    with_teacher, shared = needs_outputs(config), None
    if with_teacher and config.tasks[0].role != "align":
        shared = shared_outputs(engine, rows, config, tokenizer, note=note)
    return fill_memory(
        engine,
        rows,
        config.memory,
        seed=config.train.seed,
        source=config.memory.origin,
        with_teacher=with_teacher,
        folder=folder,
        shared=shared,
        tags=tags_of_memory(config.memory, rows, tokenizer),
    )


def fill_memory(
    engine: TrainingEngine,
    dataset: TokenDataset,
    config: MemoryConfig,
    *,
    seed: int,
    source: str,
    with_teacher: bool,
    folder: Path | None = None,
    shared: SharedOutputs | None = None,
    tags: TagsOf | None = None,
) -> ReplayMemory:
    """Make a memory of all rows of `dataset`; what an earlier run left in `folder` is removed. A collective call.

    with_teacher: insert the current model's outputs with the rows. shared: outputs in the store of artifacts, which
    then need not be computed. tags: those of the rows, by default the data set's own.
    """
    if folder is not None and collectives.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        if shared is not None and config.teacher.kind == "topk":
            shared.link(folder)
    collectives.barrier()
    memory = open_memory(config, folder, seed, vocab_size_of(engine))
    collectives.barrier()
    if shared is None:
        origin: dict[str, Any] = {"source": source, "task": "memory", "step": 0}
        insert_rows(engine, memory, dataset, config, with_teacher=with_teacher, tags=tags, **origin)
    else:
        nlls, tags_of = [shared.reader.prior_nll(row_id) for row_id in dataset.row_ids.tolist()], tags or dataset.tags
        memory.buffer.insert(
            MemoryRow(dataset.row(i), tags=tags_of(i), source=source, task="memory", prior_nll=nll)
            for i, nll in enumerate(nlls)
        )
    return memory


def insert_rows(
    engine: TrainingEngine,
    memory: ReplayMemory,
    dataset: TokenDataset,
    config: MemoryConfig,
    *,
    with_teacher: bool,
    source: str,
    task: str,
    step: int,
    tags: TagsOf | None = None,
) -> None:
    """Insert all rows of `dataset`, with the current model's outputs where `with_teacher` says so. A collective call.

    source, task, step: where the rows come from, see MemoryRow. tags: of the rows, by default the data set's own.
    """
    buffer, nlls, tags_of = memory.buffer, np.full(len(dataset), np.nan), tags or dataset.tags
    outputs: dict[int, TeacherOutputs] = {}
    k: int | None = None
    if with_teacher:
        k = min(config.teacher.k, vocab_size_of(engine))
        owners = buffer.ranks_of(range(buffer.num_seen, buffer.num_seen + len(dataset)), collectives.world_size())
        outputs, nlls = _own_outputs(engine, dataset, owners, k=k, temperature=config.teacher.temperature)
        if config.teacher.kind != "topk":  # the outputs are not stored; the guard and the draws use the losses alone
            outputs, k = {}, None
    rows = (
        MemoryRow(
            dataset.row(i),
            tags=tags_of(i),
            teacher=outputs.get(i),
            prior_nll=float(nlls[i]),
            source=source,
            task=task,
            step=step,
        )
        for i in range(len(dataset))
    )
    buffer.insert(rows, own_outputs=k)


def _own_outputs(
    engine: TrainingEngine, dataset: TokenDataset, owners: np.ndarray, *, k: int, temperature: float
) -> tuple[dict[int, TeacherOutputs], np.ndarray]:
    """Return the current model's top-k outputs for the rows that this rank owns, and the mean NLL of all rows (fp64
    [rows])."""
    outputs: dict[int, TeacherOutputs] = {}
    own_nlls: list[tuple[int, float]] = []
    nlls = np.full(len(dataset), np.nan)
    for index, output in outputs_of_rows(engine, dataset, "topk", rank_of=owners, k=k, temperature=temperature):
        outputs[index] = stored_form(output)
        own_nlls.append((index, mean_nll(output)))
    for index, nll in collectives.gather_objects(own_nlls):
        nlls[index] = nll
    return outputs, nlls


def sample_rows(dataset: TokenDataset, num_rows: int, seed: int) -> TokenDataset:
    """Choose `num_rows` rows (all where there are fewer) by the seed and the rows' ids; a larger sample contains the
    smaller one."""
    chosen = np.argsort(keyed_hash(dataset.row_ids, "keep", seed), kind="stable")[:num_rows]
    return dataset.select(np.sort(chosen))
