"""A model in fp64 with the rows of each step, for independent loops over what `every_method.train` trains.

The loop knows one rank; test_every_method.py proves that all layouts are that rank's run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tests.engine.passes import oracle
from tests.engine.passes.test_equality import memory_of
from tests.methods import every_method, reference, scenes
from tests.methods.test_replay_methods import drawn, task_rows

STEPS, TOKENS = every_method.STEPS, 96
Weights = dict[str, torch.Tensor]


@dataclass
class Scene:
    """The model, the rows of each step, and the memory that `every_method.train` has."""

    model: torch.nn.Module = field(default_factory=lambda: scenes.undecided_model().double())

    def __post_init__(self):
        task, memory = scenes.conflicting_datasets()
        self.task, self.memory = task_rows(task, STEPS, TOKENS), memory_of(memory)
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.teacher = copy.deepcopy(self.model)

    def draws(self, stream: str, share: float = 0.5, steps: int = STEPS):
        return drawn(self.memory, stream, steps, round(share * TOKENS))

    def draw(self, step: int, stream: str, share: float = 1.0):
        return [self.memory.get(key).row for key in self.memory.draw(step, round(share * TOKENS), stream)]

    def gradient(self, rows) -> Weights:
        return oracle.gradients(self.model, reference.mean_nll(self.model, rows))

    def nll(self, rows) -> float:
        with torch.no_grad():
            return float(reference.mean_nll(self.model, rows))

    def distance(self, rows) -> torch.Tensor:
        """KL of the aligned model's stored outputs and the model's, k = 8."""
        return reference.stored_kl(self.teacher, self.model, rows, 8)

    def move(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(change(name, p))

    def train(self, rows=None, **hooks) -> Weights:
        batches = self.task if rows is None else rows
        losses = [lambda batch=batch: reference.mean_nll(self.model, batch) for batch in batches]
        return reference.train(self.model, losses, **hooks)


def dot(a: Weights, b: Weights) -> float:
    return sum(float((a[name] * b[name]).sum()) for name in b)
