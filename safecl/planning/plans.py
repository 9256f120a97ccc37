"""The plan of a run: its tasks with their rows and steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from safecl.config import ConfigError, RunConfig, TaskConfig, TrainConfig
from safecl.data import (
    ChatRow,
    Prompt,
    TaskOrder,
    TokenDataset,
)
from safecl.methods.base import Method
from safecl.planning.loss_mean import median_targets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class TaskPlan:
    """One task: its rows, how many go into a step, and its held-out rows."""

    config: TaskConfig
    dataset: TokenDataset
    tokens_per_batch: int
    order: TaskOrder
    eval_rows: list[ChatRow] = field(default_factory=list)
    poisoned_rows: int = 0
    repeated_rows: int = 0
    """Rows left out because they repeat evaluation prompts."""
    longest_evaluated: int = 0
    """Tokens of the longest held-out row, as the measurement encodes it; `check_vocabulary` finds it."""
    row_weights: np.ndarray | None = None
    """fp32 [rows]: factors of the rows' cross-entropy; None is 1 everywhere."""
    median_targets: float = field(init=False)
    """Median number of supervised tokens of the rows as they were prepared, before a scan leaves any out."""

    def __post_init__(self) -> None:
        self.median_targets = median_targets(self.dataset.num_targets)

    @property
    def num_steps(self) -> int:
        return self.order.num_steps


@dataclass
class RunPlan:
    """A run that is ready to start."""

    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    tasks: list[TaskPlan]
    methods: list[Method[Any]]
    memory: TokenDataset | None = None
    harmful: dict[str, TokenDataset] = field(default_factory=dict)
    """Harmful rows that methods take gradients on, by file."""
    prompts: list[Prompt] = field(default_factory=list)
    keeps_freed_memory: bool = False
    """Without a GPU: freed host memory is kept for the next pass
    (safecl.planning.costs.memory_report.settle_memory)."""
    benign: list[Prompt] = field(default_factory=list)
    scanned: list[Prompt | ChatRow] = field(default_factory=list)
    """Prompts that a scan compares the upload with."""
    notes: list[str] = field(default_factory=list)
    """Messages for the user before the run starts."""


def apply_screening(config: RunConfig, task: TaskPlan, decision: dict[str, Any]) -> None:
    """Leave flagged rows out of a task, or lower their weight. decision: {"rows": row ids, "weight": factor}, where a
    factor of 0 leaves them out."""
    flagged = np.isin(task.dataset.row_ids, np.array(decision["rows"], np.uint64))
    if decision["weight"] == 0.0:
        replace_rows(config, task, task.dataset.select(np.flatnonzero(~flagged)))
    else:
        task.row_weights = np.where(flagged, decision["weight"], 1.0).astype(np.float32)


def replace_rows(config: RunConfig, task: TaskPlan, dataset: TokenDataset) -> None:
    """Give the task fewer rows. The batch size stays, and so does the number of epochs or of steps."""
    if len(dataset) == 0:
        raise ConfigError(f"scan: every row of task {task.config.name} is flagged, so nothing is left to train on")
    task.dataset, task.order = dataset, order_of_rows(config.train, dataset, task.tokens_per_batch)


def order_of_rows(train: TrainConfig, dataset: TokenDataset, tokens_per_batch: int) -> TaskOrder:
    """Return which rows each step takes."""
    length = {"epochs": train.epochs} if train.max_steps is None else {"max_steps": train.max_steps}
    return TaskOrder(dataset, seed=train.seed, tokens_per_batch=tokens_per_batch, **length)
