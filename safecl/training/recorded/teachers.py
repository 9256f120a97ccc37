"""Teachers whose outputs on the tasks' own rows are recorded before training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch

from safecl.engine.passes.training_engine import TrainingEngine
from safecl.engine.teachers.recorded import RecordedOutputs, open_recorded, record_outputs, teacher_folder
from safecl.methods.terms import TaskTerm
from safecl.planning.plans import TaskPlan
from safecl.replay import TeacherOutputs


def access_to_teacher(term: TaskTerm, has_adapters: bool) -> Literal["adapters off", "online", "recorded"]:
    """Return how a step reaches the teacher of a term. With adapters, theta_0 is the model with its adapters off."""
    if has_adapters and term.teacher == "aligned":
        return "adapters off"
    return "online" if term.online else "recorded"


class RecordedTeachers:
    """The recorded outputs of a run's teachers, by task and term, in files of the run folder."""

    def __init__(self, engine: TrainingEngine, output: str, has_adapters: bool):
        """output: the run folder."""
        self.engine, self.output, self.has_adapters = engine, output, has_adapters
        self._outputs: dict[tuple[str, str], RecordedOutputs] = {}

    def record(
        self, terms: Iterable[TaskTerm], task: TaskPlan, tasks: Sequence[TaskPlan], log: Callable[[str], None]
    ) -> None:
        """Record what is missing for `task`. A collective call.

        The aligned model is recorded on the rows of all `tasks` at once, because training then changes it.
        """
        for term in terms:
            if (
                access_to_teacher(term, self.has_adapters) != "recorded"
                or (task.config.name, term.name) in self._outputs
            ):
                continue
            for each in tasks if term.teacher == "aligned" else [task]:
                name = each.config.name
                outputs = record_outputs(self.engine, each.dataset, term, teacher_folder(self.output, name, term.name))
                self._outputs[name, term.name] = outputs
                log(f"{term.name}: recorded the teacher's outputs on {name}, {outputs.num_bytes / 2**20:.1f} MiB")

    def reopen(self, task: TaskPlan, term: TaskTerm) -> None:
        """Open what this run recorded before it was stopped. A collective call."""
        name = task.config.name
        folder = teacher_folder(self.output, name, term.name)
        self._outputs[name, term.name] = open_recorded(self.engine, task.dataset, term, folder)

    def load(self, task: str, term: str, row: int) -> TeacherOutputs | torch.Tensor:
        """Return the outputs, or the hidden states, of a row of the task."""
        return self._outputs[task, term].load(row)

    def keys(self) -> list[tuple[str, str]]:
        """Return (task, term) of all that is recorded."""
        return list(self._outputs)

    def bytes_by_term(self) -> dict[str, int]:
        """Bytes on the disk, over all ranks, by term."""
        found = {term: 0 for _, term in self._outputs}
        for (_, term), outputs in self._outputs.items():
            found[term] += outputs.num_bytes
        return found

    def discard(self) -> None:
        """Remove the files. A collective call."""
        for key in self.keys():
            self._outputs.pop(key).discard()
