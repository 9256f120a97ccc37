"""The run as a method sees it: this rank's shards and their state, Fisher estimates, gradients on the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from safecl.engine.artifacts.fisher import estimate_into, has_room, header_of, shared_fisher
from safecl.engine.fisher.estimate import estimate_fisher
from safecl.engine.fisher.file import load_fisher, open_fisher
from safecl.engine.fisher.threshold import upper_threshold
from safecl.engine.model.adapters import adapters
from safecl.engine.zero.shard import Shard
from safecl.engine.zero.tensor_parts import normal_noise
from safecl.engine.zero.whole_matrices import Read, Work, Write, map_matrices
from safecl.methods import context
from safecl.training.steps.own_passes import OwnPasses
from safecl.training.steps.state import RunState
from safecl.training.steps.step import dataset_rows


class MethodView:
    """The `run` of a method's hooks; safecl.methods.context.Run documents it. All ranks make the same calls."""

    def __init__(self, run: RunState, passes: OwnPasses, correct: Callable[..., float]):
        self._run, self._engine = run, run.engine
        self.memory_gradient, self.task_gradient = passes.memory_gradient, passes.task_gradient
        self.gradient_loss, self.memory_loss = passes.gradient_loss, passes.memory_loss
        self.layer_similarities = passes.layer_similarities
        self.task_row_losses = passes.task_row_losses
        self.hidden_gradient_norms = passes.hidden_gradient_norms
        self.correct = correct
        self.has_adapters = run.has_adapters
        self.seed = run.seed

    @property
    def step(self) -> int:
        return self._run.step

    @property
    def num_steps(self) -> int:
        return self._run.num_steps

    @property
    def learning_rate(self) -> float:
        return self._run.last_learning_rate

    def log(self, message: str) -> None:
        self._run.log(message)

    # ----------------------------------------------------------------------------------------------- weights and state

    def shards(self) -> list[Shard]:
        return self._engine.optimizer.shards()

    def reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        return self._engine.shards.reduce_sum(values)

    def dots(
        self, shards: Sequence[context.Shard], pairs: Sequence[tuple[context.Quantity, context.Quantity]]
    ) -> torch.Tensor:
        return self._engine.dots(shards, pairs)

    def dots_per_tensor(
        self, shards: Sequence[context.Shard], pairs: Sequence[tuple[context.Quantity, context.Quantity]]
    ) -> torch.Tensor:
        return self._engine.dots_per_tensor(shards, pairs)

    def dots_per_row(
        self, shards: Sequence[context.Shard], pairs: Sequence[tuple[context.Quantity, context.Quantity]]
    ) -> list[torch.Tensor]:
        return self._engine.dots_per_row(shards, pairs)

    def parts(self, shards: Sequence[context.Shard]) -> Iterator[context.TensorPart]:
        return self._engine.parts(shards)

    def tensor_names(self) -> list[str]:
        return list(self._engine.shards.shapes)

    def matrix_names(self) -> list[str]:
        return [name for name, shape in self._engine.shards.shapes.items() if len(shape) == 2]

    def map_matrices(
        self,
        shards: Sequence[context.Shard],
        names: Sequence[str],
        read: Read,
        work: Work,
        write: Write | None = None,
    ) -> None:
        map_matrices(self._engine.shards, list(self.parts(shards)), names, read, work, write)

    def noise(self, part: context.TensorPart, key: str) -> torch.Tensor:
        return normal_noise(part, self.seed, self._run.global_step, key)

    def perturb(self, kind: str, rho: float) -> None:
        self._engine.perturb_along(kind, rho)

    def restore(self) -> None:
        self._engine.put_back()

    def publish(self) -> None:
        self._engine.shards.publish()

    def weight_names(self) -> list[str]:
        adapted = [name for name, *_ in adapters(self._engine.module.model)]
        return adapted or list(self._engine.shards.shapes)

    def has_state(self, kind: str) -> bool:
        return self._engine.optimizer.has(kind)

    def set_anchor(self, kind: str = "anchor", *, moving: bool = False) -> None:
        """Set an anchor. Before the first update the weights are theta_0, so an anchor in the run's dtype is exact; a
        later one is fp32."""
        if self._run.global_step > 0 or moving:
            self._engine.optimizer.copy_weights_to(kind)
        else:
            dtype = torch.bfloat16 if self._run.config.model.dtype == "bf16" else torch.float32
            self._engine.optimizer.take_base(kind, dtype)

    # ---------------------------------------------------------------------------------------------- Fisher information

    def estimate_fisher(
        self,
        *,
        sign_batches: int,
        rows_per_batch: int,
        kind: str = "fisher",
        rows: Literal["memory", "previous_task"] = "memory",
    ) -> float:
        run = self._run
        if rows == "memory" and kind == "fisher" and self._shares_fisher():
            return self._shared_fisher(sign_batches=sign_batches, rows_per_batch=rows_per_batch)
        if rows == "memory":
            assert run.memory is not None, "the config refuses such a method without a memory"
            chosen, row_ids = run.memory.all_rows(), run.memory.keys()
        else:
            assert run.previous is not None, "no task has ended yet"
            data = run.previous.dataset
            chosen, row_ids = dataset_rows(data, np.arange(len(data)), np.zeros(len(data))), data.row_ids.tolist()
        return estimate_fisher(
            self._engine,
            chosen,
            row_ids,
            seed=self.seed,
            sign_batches=sign_batches,
            rows_per_batch=rows_per_batch,
            kind=kind,
        )

    def _shares_fisher(self) -> bool:
        """True where the estimate is that of the base model, and the store of artifacts has room for it."""
        run = self._run
        if run.plan is None or run.global_step > 0 or run.config.tasks[0].role == "align":
            return False
        if any(not p.requires_grad for p in self._engine.module.model.parameters()):
            return False  # the shared estimate is of all weights
        if not (room := has_room(run.config, self._engine.shards.numel)):
            run.log("fisher: too little room in the store of artifacts to keep it for other runs")
        return room

    def _shared_fisher(self, *, sign_batches: int, rows_per_batch: int) -> float:
        run = self._run
        assert run.plan is not None and run.plan.memory is not None and run.memory is not None
        header = header_of(
            run.config, run.plan.tokenizer, run.plan.memory, sign_batches=sign_batches, rows_per_batch=rows_per_batch
        )
        rows = run.memory.all_rows(), run.memory.keys()

        def build(path: Path) -> None:
            estimate_into(path, header, self._engine, rows, "fisher", run.log)

        return self.load_fisher(str(shared_fisher(run.config, header, build, run.log)))

    def load_fisher(self, path: str, kind: str = "fisher") -> float:
        load_fisher(open_fisher(path), self._engine.shards, self._engine.optimizer, kind)
        return self._engine.optimizer.fisher_means[kind]

    def fisher_mean(self, kind: str) -> float:
        return self._engine.optimizer.fisher_means[kind]

    def upper_threshold(self, kind: str, share: float) -> float:
        return upper_threshold(self._engine, kind, share)
