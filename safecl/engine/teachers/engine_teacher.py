"""The trained model itself as a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from safecl.engine.passes.live_model import evaluating
from safecl.engine.passes.micro_batches import to_device
from safecl.engine.passes.step_rows import Answer, Question
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.engine.teachers.questions import TeacherBatch
from safecl.kernels import TopKTeacher


class EngineTeacher:
    """The trained model with its adapters off, or with the average as its weights. Every call is a collective one."""

    def __init__(self, engine: TrainingEngine, *, average: bool):
        self.engine, self.average = engine, average

    @torch.no_grad()
    def answer(self, batches: Sequence[TeacherBatch]) -> list[list[Answer]]:
        """Return the answers of each batch, in the order of its questions.

        All ranks pass the same numbers of batches and questions.
        """
        with evaluating(self.engine, average=self.average):
            return [[self._ask(batch, question, positions) for question, positions in batch.asked] for batch in batches]

    def _ask(self, batch: TeacherBatch, question: Question, positions: torch.Tensor) -> Answer:
        inputs = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "positions": positions,
            "sequences": batch.sequences,
        }
        is_topk = question.form == "topk"
        settings: dict[str, Any] = (
            {"k": question.k, "temperature": question.temperature} if is_topk else {"layers": question.layers}
        )
        output = self.engine.deepspeed(
            task=question.form, **to_device(inputs, self.engine.device), **settings, reference=not self.average
        )
        if question.form == "hidden":
            return output["hidden"]
        stored = output["log_probs"], output["indices"], output["log_tail"]
        return TopKTeacher(*stored, question.temperature, self.engine.module.vocab_size)
