"""Online teachers, which answer questions in every step: which models they are, where these come from, which rows ask.

    aligned     theta_0, streamed from the node's reference store; with LoRA the student with its adapters off
    previous    the model at the end of the previous task, kept as a folder in the run, streamed from its own store
    ema         the average in the shards, in place of the weights during the pass
    a folder    any model with the same tokenizer, streamed

A teacher is asked once per step about all rows of this rank, before the step's own forward passes. Its answers stay on
the device.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from safecl.config import ConfigError, RunConfig
from safecl.data import collate
from safecl.distributed import collectives
from safecl.engine.checkpoint.model_export import save_plain
from safecl.engine.model.dtypes import CONFIG_DTYPES
from safecl.engine.passes.distances import token_positions
from safecl.engine.passes.micro_batches import sequences_of, split_step
from safecl.engine.passes.step_rows import Answer, Asked, Question, StepRow
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.engine.reference.store import ReferenceStore
from safecl.engine.teachers.break_even import advice, alternative, rates_here
from safecl.engine.teachers.checks import tokens_per_pass
from safecl.engine.teachers.engine_teacher import EngineTeacher
from safecl.engine.teachers.questions import OnlineTeacher, TeacherBatch
from safecl.engine.teachers.recorded import TEACHER
from safecl.engine.teachers.streamed import StreamedTeacher
from safecl.engine.teachers.streaming_check import check_streamed, plain_model, teacher_structure
from safecl.engine.teachers.weight_stream import WeightPlacement

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALIGNED, PREVIOUS, EMA = "aligned", "previous", "ema"


class OnlineTeachers:
    """All online teachers of a run. Its methods are collective calls, but `read_run_store` and a `close` that discards
    nothing are not."""

    def __init__(self, config: RunConfig, engine: TrainingEngine, log: Callable[[str], None]):
        self.config, self.engine, self.log = config, engine, log
        self.sources = sorted(set(config.online_teachers.values()))
        self._teachers: dict[str, OnlineTeacher] = {}
        self._stores: dict[str, ReferenceStore] = {}
        self._task = ""
        self._is_start = False
        """True while the live model is theta_0 and the first task has not trained it."""

    # ---------------------------------------------------------------------------------------------------- around tasks

    @property
    def _first_task(self) -> str:
        return next(task.name for task in self.config.tasks if task.role != "align")

    @property
    def _has_align_task(self) -> bool:
        return self.config.tasks[0].role == "align"

    def begin_task(self, name: str) -> None:
        """Save the current model as a folder where it will be a teacher and no other folder has it."""
        self.resume(name)
        self._is_start = name == self._first_task and not self._has_align_task
        if self._is_start or self.config.model.lora is not None:
            return
        if PREVIOUS in self.sources or (ALIGNED in self.sources and name == self._first_task):
            folder = Path(self._path(PREVIOUS))
            save_plain(self.engine, folder)
            self.log(f"teacher: the model before {name} is kept in {folder}")

    def resume(self, name: str) -> None:
        """Continue in a task. The `previous` teacher of the last task is closed, since it is another model now."""
        self._task, self._is_start = name, False
        self._release(PREVIOUS)

    @property
    def read_run_store(self) -> bool:
        """True where a teacher of this task or of a later one is streamed from the store that the run began with."""
        return any(self._path(source) == self.config.model.path for source in self.sources if source != EMA)

    def close(self, *, discard: bool = False) -> None:
        """Free all memory; `discard` removes the folders that only this run needed."""
        for source in list(self._teachers):
            self._release(source)
        if discard:
            collectives.barrier()
            if collectives.rank() == 0:
                for folder in (Path(self.config.output) / TEACHER).glob("model-*"):
                    shutil.rmtree(folder, ignore_errors=True)

    def _release(self, source: str) -> None:
        self._teachers.pop(source, None)
        if source in self._stores:
            self._stores.pop(source).close()

    def _path(self, source: str) -> str:
        """Return the folder or hub id of a teacher's weights."""
        kept = Path(self.config.output) / TEACHER
        if source == ALIGNED or (source == PREVIOUS and self._task == self._first_task):
            return str(kept / "model-aligned") if self._has_align_task else self.config.model.path
        return str(kept / re.sub(r"[^\w.-]+", "-", f"model-before-{self._task}")) if source == PREVIOUS else source

    # ----------------------------------------------------------------------------------------------------------- asking

    def ask(self, rows: Sequence[StepRow]) -> None:
        """Give this rank's rows the answers that their distances need."""
        for source in self.sources:
            asking = [number for number, row in enumerate(rows) if any(_asked_of(row, source))]
            if asking:
                self._ask(source, self._pinned_to_ranks(rows, asking))

    def _pinned_to_ranks(self, rows: Sequence[StepRow], numbers: list[int]) -> list[StepRow]:
        """Return these rows, each with the rank that computes it in the step."""
        split = enumerate(split_step(rows, self.engine.layout))
        owner = {number: rank for rank, parts in split for part in parts for number in part}
        return [replace(rows[number], rank=owner[number]) for number in numbers]

    def _ask(self, source: str, rows: list[StepRow]) -> None:
        questions = list(dict.fromkeys(asked.question for row in rows for asked in _asked_of(row, source)))
        parts = [[rows[i] for i in part] for part in split_step(rows, self.engine.layout)[self.engine.rank]]
        teacher = self._teacher(source, sum(row.length for row in rows) // self.engine.layout.world_size)
        if isinstance(teacher, StreamedTeacher):  # it makes no collective calls, so it needs no empty pass
            parts = [part for part in parts if part]
        built = [self._batch(part, source, questions) for part in parts]
        if not built:
            return
        for (_, waiting), answers in zip(built, teacher.answer([batch for batch, _ in built]), strict=True):
            for cells, answer in zip(waiting, answers, strict=True):
                cells.fill(answer)

    def _batch(
        self, rows: list[StepRow], source: str, questions: list[Question]
    ) -> tuple[TeacherBatch, list[_Waiting]]:
        """Return a micro-batch for the teacher, and for each question the rows that wait for its answer."""
        loaded = [row.load()[0] for row in rows]
        batch = collate(loaded, packed=self.engine.layout.packed, pad_id=self.engine.layout.pad_id)
        asked, waiting = [], []
        for question in questions:
            found = [(cell, n) for n, row in enumerate(rows) for cell in _once(row, source, question)]
            places = [token_positions(batch, n, loaded[n], question.tokens) for _, n in found]
            asked.append((question, torch.from_numpy(np.concatenate(places) if places else np.zeros(0, np.int64))))
            waiting.append(_Waiting([cell for cell, _ in found], [len(place) for place in places]))
        sequences = sequences_of(batch, self.engine.layout.packed)
        return TeacherBatch(batch.input_ids, batch.position_ids, asked, sequences), waiting

    # ---------------------------------------------------------------------------------------------------------- opening

    def open(self, tokens_per_batch: int) -> None:
        """Open all teachers of the task, so that an unusable one is refused before anything is trained."""
        for source in self.sources:
            self._teacher(source, tokens_per_pass(self.config, source, tokens_per_batch))

    def _teacher(self, source: str, num_tokens: int) -> OnlineTeacher:
        """`num_tokens`: tokens per rank in one pass."""
        if source not in self._teachers:
            self._teachers[source] = self._open(source, num_tokens)
        return self._teachers[source]

    def _open(self, source: str, num_tokens: int) -> OnlineTeacher:
        if source == EMA:
            self.log("teacher: the average of the weights, through the live model")
            return EngineTeacher(self.engine, average=True)
        if source == ALIGNED and self.config.model.lora is not None:
            self.log("teacher: the model with its adapters off")
            return EngineTeacher(self.engine, average=False)
        teacher = self._open_streamed(source)
        self.log(f"teacher: {source}, {self._described(teacher, source, num_tokens)}")
        return teacher

    def _open_streamed(self, source: str) -> StreamedTeacher:
        path, engine = self._path(source), self.engine
        if source in (ALIGNED, PREVIOUS) and path != self.config.model.path and not Path(path).is_dir():
            raise ConfigError(f"{path}: the teacher's weights are not there, so the run cannot resume; start it anew")
        structure = teacher_structure(self.config, path)
        store = self._store(source, path, structure)
        teacher = StreamedTeacher(
            structure, store, engine.device, self._placement(), vocab_size=engine.module.vocab_size
        )
        is_live = self._is_start and source in (ALIGNED, PREVIOUS)
        plain = None if is_live else plain_model(self.config, store, path)
        check_streamed(teacher, source, plain, engine if is_live else None, self.config.model.dtype)
        return teacher

    def _store(self, source: str, path: str, structure: PreTrainedModel) -> ReferenceStore:
        """Return the run's own store where it has these weights, else open one for this teacher."""
        settings, store = self.config.model, self.engine.store
        if path == settings.path and store is not None:
            return store
        dtype, trust = CONFIG_DTYPES[settings.dtype], settings.trust_remote_code
        self._stores[source] = ReferenceStore.open(path, dtype=dtype, model=structure, trust_remote_code=trust)
        return self._stores[source]

    def _placement(self) -> WeightPlacement:
        if self.config.teacher == "resident":
            return "resident"
        return "in place" if self.engine.device.type == "cpu" else "streamed"

    def _described(self, teacher: StreamedTeacher, source: str, num_tokens: int) -> str:
        size = f"{teacher.stream.buffer_bytes / 2**20:,.0f} MiB on the device"
        if teacher.stream.placement == "in place":
            return "its weights read in host memory, where they are"
        if teacher.stream.placement == "resident":
            return f"resident, {size}"
        rates = rates_here(teacher.dtype)
        if rates is None:
            return f"streamed, {size}"
        copies = advice(num_tokens, teacher.dtype.itemsize, rates, otherwise=alternative(source))
        return f"streamed, {size}; copies {copies}"


@dataclass(frozen=True)
class _Waiting:
    """The rows of a micro-batch that asked one question."""

    cells: list[Asked]
    lengths: list[int]
    """Tokens of each cell's answer."""

    def fill(self, answer: Answer) -> None:
        bounds = np.cumsum([0, *self.lengths])
        for number, cell in enumerate(self.cells):
            cell.given = answer[bounds[number] : bounds[number + 1]]


def _asked_of(row: StepRow, source: str) -> Iterator[Asked]:
    """The row's questions to this teacher."""
    return (d.asked for d in row.distillations if d.asked is not None and d.asked.source == source)


def _once(row: StepRow, source: str, question: Question) -> list[Asked]:
    """The cells of the row that ask this question; several distances may share one."""
    return list({id(asked): asked for asked in _asked_of(row, source) if asked.question == question}.values())
