"""Teachers that are asked in every step: which model they are, where it comes from, and who asks what.

    aligned     theta_0, streamed from the node's reference store; with LoRA the student with its adapters off
    previous    the model that the task before has handed over, kept as a folder in the run and streamed from a store of its own
    ema         the average that the shards hold, in the place of the weights for the time of the pass
    a folder    any model with the same tokenizer, streamed

A teacher is asked once per step about all rows of this rank, before the step's own forward passes. Its answers stay on
the device.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from safecl.config import ConfigError, RunConfig
from safecl.data import collate
from safecl.distributed import collectives
from safecl.distributed.node import this_node
from safecl.engine.checkpoint.model_export import save_plain
from safecl.engine.model.checks import check_head
from safecl.engine.model.dtypes import CONFIG_DTYPES
from safecl.engine.model.language_model import LanguageModel
from safecl.engine.model.settings import choose_attention
from safecl.engine.model.structure import empty_model
from safecl.engine.passes.live_model import evaluating
from safecl.engine.passes.micro_batches import split_step, target_positions, to_device
from safecl.engine.passes.step_rows import Answer, Question, StepRow
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.engine.reference.loading import take_weights
from safecl.engine.reference.store import ReferenceStore
from safecl.engine.teachers.break_even import advice, alternative, rates_here
from safecl.engine.teachers.checks import STREAMING_ERRORS, cannot_be_streamed, tokens_per_pass
from safecl.engine.teachers.recorded import TEACHER
from safecl.engine.teachers.streamed import StreamedTeacher, Teacher, TeacherBatch
from safecl.engine.teachers.weight_stream import Placement
from safecl.kernels import TopKTeacher

ALIGNED, PREVIOUS, EMA = "aligned", "previous", "ema"


class EngineTeacher:
    """The trained model itself as a teacher: with its adapters off, or with the average as its weights. Every call is a
    collective one."""

    def __init__(self, engine: TrainingEngine, *, average: bool):
        self.engine, self.average = engine, average

    @torch.no_grad()
    def answer(self, batches: Sequence[TeacherBatch]) -> list[list[Answer]]:
        """Of each batch, the answers in the order of its questions; all ranks bring as many batches and questions."""
        engine = self.engine
        with evaluating(engine, average=True) if self.average else nullcontext():
            engine.deepspeed.eval()
            try:
                return [
                    [self._ask(batch, question, positions) for question, positions in batch.asked] for batch in batches
                ]
            finally:
                engine.deepspeed.train()

    def _ask(self, batch: TeacherBatch, question: Question, positions: torch.Tensor) -> Answer:
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "positions": positions}
        settings = {"k": question.k, "temperature": question.temperature} if question.form == "topk" else {}
        output = self.engine.deepspeed(
            task=question.form, **to_device(inputs, self.engine.device), **settings, reference=not self.average
        )  # fmt: skip
        if question.form == "hidden":
            return output["hidden"]
        return TopKTeacher(
            output["log_probs"],
            output["indices"],
            output["log_tail"],
            question.temperature,
            self.engine.module.vocab_size,
        )


class OnlineTeachers:
    """All teachers of a run that are asked in every step. Every method is a collective call."""

    def __init__(self, config: RunConfig, engine: TrainingEngine, log: Callable[[str], None]):
        self.config, self.engine, self.log = config, engine, log
        self.sources = sorted(set(config.online_teachers.values()))
        self._teachers: dict[str, Teacher] = {}
        self._stores: dict[str, ReferenceStore] = {}
        self._task = ""
        self._is_start = False

    # ---------------------------------------------------------------------------------------------------- around tasks

    @property
    def _first_task(self) -> str:
        return next(task.name for task in self.config.tasks if task.role != "align")

    @property
    def _has_align_task(self) -> bool:
        return self.config.tasks[0].role == "align"

    def begin_task(self, name: str) -> None:
        """Keeps the current model as a folder where it will be a teacher and is nowhere else."""
        self.resume(name)
        self._is_start = name == self._first_task and not self._has_align_task
        if self._is_start or self.config.model.lora is not None:
            return
        if PREVIOUS in self.sources or (ALIGNED in self.sources and name == self._first_task):
            folder = Path(self._path(PREVIOUS))
            save_plain(self.engine, folder)
            self.log(f"teacher: the model before {name} is kept in {folder}")

    def resume(self, name: str) -> None:
        """Goes on in a task; the model before it is another than the one before the last task, whose memory is given
        back."""
        self._task, self._is_start = name, False
        self._release(PREVIOUS)

    @property
    def read_run_store(self) -> bool:
        """True where a teacher of this task or of a later one is streamed from the store that the run began with."""
        return any(self._path(source) == self.config.model.path for source in self.sources if source != EMA)

    def close(self, *, discard: bool = False) -> None:
        """Gives all memory back; `discard` removes the folders that only this run needed."""
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
        """Folder or hub id of a teacher's weights."""
        kept = Path(self.config.output) / TEACHER
        if source == ALIGNED or (source == PREVIOUS and self._task == self._first_task):
            return str(kept / "model-aligned") if self._has_align_task else self.config.model.path
        return str(kept / re.sub(r"[^\w.-]+", "-", f"model-before-{self._task}")) if source == PREVIOUS else source

    # ----------------------------------------------------------------------------------------------------------- asking

    def ask(self, rows: Sequence[StepRow]) -> None:
        """Puts the answers about this rank's rows into their distillations."""
        for source in self.sources:
            asked = [number for number, row in enumerate(rows) if any(_is_of(d, source) for d in row.distillations)]
            if asked:
                self._ask(source, self._owned(rows, asked))

    def _owned(self, rows: Sequence[StepRow], asked: list[int]) -> list[StepRow]:
        """These rows, pinned to the ranks that compute them in the step."""
        owner = {
            i: rank for rank, parts in enumerate(split_step(rows, self.engine.layout)) for part in parts for i in part
        }
        return [replace(rows[number], rank=owner[number]) for number in asked]

    def _ask(self, source: str, rows: list[StepRow]) -> None:
        questions = list(
            dict.fromkeys(d.asked.question for row in rows for d in row.distillations if _is_of(d, source))
        )
        parts = [[rows[i] for i in part] for part in split_step(rows, self.engine.layout)[self.engine.rank]]
        teacher = self._teacher(source, sum(row.length for row in rows) // self.engine.layout.world_size)
        if isinstance(teacher, StreamedTeacher):  # it needs no other rank, and no empty pass
            parts = [part for part in parts if part]
        built = [self._batch(part, source, questions) for part in parts]
        if not built:
            return
        for (_, cells), said in zip(built, teacher.answer([batch for batch, _ in built]), strict=True):
            for answers, (asked, lengths) in zip(said, cells, strict=True):
                bounds = np.cumsum([0, *lengths])
                for number, cell in enumerate(asked):
                    cell.said = answers[bounds[number] : bounds[number + 1]]

    def _batch(self, rows: list[StepRow], source: str, questions: list[Question]):
        """A micro-batch, and per question the cells of its answers with their lengths."""
        loaded = [row.load()[0] for row in rows]
        batch = collate(loaded, packed=self.engine.layout.packed, pad_id=self.engine.layout.pad_id)
        asked, cells = [], []
        for question in questions:
            found = [(d.asked, n) for n, row in enumerate(rows) for d in _once(row, source, question)]
            places = [
                batch.starts[n] + np.arange(batch.lengths[n])
                if question.all_tokens
                else target_positions(batch, n, loaded[n])
                for _, n in found
            ]
            asked.append((question, torch.from_numpy(np.concatenate(places) if places else np.zeros(0, np.int64))))
            cells.append(([cell for cell, _ in found], [len(place) for place in places]))
        return TeacherBatch(batch.input_ids, batch.position_ids, asked), cells

    # ---------------------------------------------------------------------------------------------------------- opening

    def open(self, tokens_per_batch: int) -> None:
        """All teachers of the task, so that one that cannot be asked is told before anything is trained."""
        for source in self.sources:
            self._teacher(source, tokens_per_pass(self.config, source, tokens_per_batch))

    def _teacher(self, source: str, num_tokens: int) -> Teacher:
        """`num_tokens`: of a pass of one rank."""
        if source not in self._teachers:
            self._teachers[source] = self._open(source, num_tokens)
        return self._teachers[source]

    def _open(self, source: str, num_tokens: int) -> Teacher:
        if source == EMA:
            self.log("teacher: the average of the weights, through the live model")
            return EngineTeacher(self.engine, average=True)
        if source == ALIGNED and self.config.model.lora is not None:
            self.log("teacher: the model with its adapters off")
            return EngineTeacher(self.engine, average=False)
        teacher, store = self._stream(source)
        self._compare(teacher, store, source)
        self.log(f"teacher: {source}, {self._described(teacher, source, num_tokens)}")
        return teacher

    def _described(self, teacher: StreamedTeacher, source: str, num_tokens: int) -> str:
        size = f"{teacher.stream.buffer_bytes / 2**20:,.0f} MiB on the device"
        if teacher.stream.placement == "in place":
            return "its weights read in host memory, where they are"
        if teacher.stream.placement == "resident":
            return f"resident, {size}"
        rates = rates_here(teacher.dtype)
        copies = (
            "" if rates is None else advice(num_tokens, teacher.dtype.itemsize, rates, otherwise=alternative(source))
        )
        return f"streamed, {size}" + (f"; copies {copies}" if copies else "")

    def _stream(self, source: str) -> tuple[StreamedTeacher, ReferenceStore]:
        settings, path = self.config.model, self._path(source)
        if source in (ALIGNED, PREVIOUS) and path != settings.path and not Path(path).is_dir():
            raise ConfigError(f"{path}: the teacher's weights are not there, so the run cannot go on; start it anew")
        model = teacher_model(self.config, path)
        store = self.engine.store
        if path != settings.path or store is None:
            dtype = CONFIG_DTYPES[settings.dtype]
            store = ReferenceStore.open(path, dtype=dtype, model=model, trust_remote_code=settings.trust_remote_code)
            self._stores[source] = store
        teacher = StreamedTeacher(
            model, store, self.engine.device, self._placement(), vocab_size=self.engine.module.vocab_size
        )
        return teacher, store

    def _placement(self) -> Placement:
        if self.config.teacher == "resident":
            return "resident"
        return "in place" if self.engine.device.type == "cpu" else "streamed"

    @torch.no_grad()
    def _compare(self, teacher: StreamedTeacher, store: ReferenceStore, source: str) -> None:
        """The streamed pass must say what the model itself says, which at the start is the live one."""
        ids = torch.arange(2, 10)[None]
        positions = torch.arange(ids.shape[1])[None]
        try:
            found = teacher.logits(TeacherBatch(ids, positions)).cpu()
        except STREAMING_ERRORS as error:
            raise ConfigError(cannot_be_streamed(source, source, str(error))) from None
        live = self._is_start and source in (ALIGNED, PREVIOUS)
        plain = None if live or not this_node().is_first else self._plain(store, self._path(source))
        if collectives.any_rank(not (self.engine.module.fused if live else plain is None or check_head(plain))):
            raise ConfigError(
                cannot_be_streamed(source, source, "its logits are more than a linear head with a softcap and a scale")
            )
        if live:
            with evaluating(self.engine, average=False):
                expected = (
                    self.engine.logits(ids.to(self.engine.device), None, positions.to(self.engine.device)).float().cpu()
                )
        else:
            expected = None if plain is None else plain.logits(ids, positions)["logits"].float()
        error = (
            0.0
            if expected is None
            else float((found - expected[..., : found.shape[-1]]).norm() / expected.norm().clamp_min(1e-20))
        )
        error = max(collectives.gather_objects([error]))
        if error > (1e-4 if self.config.model.dtype == "fp32" else 2.0**-5):
            raise ConfigError(
                cannot_be_streamed(source, source, f"its logits differ by {error:.1%} from the model's own")
            )

    def _plain(self, store: ReferenceStore, path: str) -> LanguageModel:
        """The model as transformers runs it, in host memory, without a copy of its weights."""
        plain = empty_model(path, store.dtype, trust_remote_code=self.config.model.trust_remote_code)
        take_weights(plain, store)
        return LanguageModel(plain)


def teacher_model(config: RunConfig, path: str) -> torch.nn.Module:
    """The structure of a teacher, without weights. Raises ConfigError."""
    settings = config.model
    attention, _ = choose_attention(settings.attention)
    chosen = None if settings.attention == "auto" and attention == "sdpa" else attention
    try:
        return empty_model(
            path, CONFIG_DTYPES[settings.dtype], attention=chosen, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"teacher: {path}: no model can be read there: {str(error).strip().splitlines()[0][:300]}"
        ) from None


def _is_of(distillation, source: str) -> bool:
    return distillation.asked is not None and distillation.asked.source == source


def _once(row: StepRow, source: str, question: Question) -> list:
    """The row's distillations that ask this; several of them may share one cell."""
    found = {id(d.asked): d for d in row.distillations if _is_of(d, source) and d.asked.question == question}
    return list(found.values())
