"""The state of a run: its parts, and its place in the sequence of tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from safecl.config import RunConfig
from safecl.data import TokenDataset
from safecl.engine.model.adapters import adapters
from safecl.engine.passes.step_losses import StepLosses
from safecl.engine.passes.step_rows import StepRow
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.engine.teachers.online import OnlineTeachers
from safecl.methods.base import Method
from safecl.planning.plans import RunPlan, TaskPlan
from safecl.training.recorded.prompts import PromptAnchors
from safecl.training.recorded.scores import RowScores
from safecl.training.recorded.teachers import RecordedTeachers
from safecl.training.replay_memory import ReplayMemory
from safecl.training.steps.read_ahead import Ready
from safecl.training.steps.steering import Steering


class RunState:
    """The parts and the counters of a run; `safecl.training.run.Run` adds the work on them."""

    def __init__(
        self,
        config: RunConfig,
        engine: TrainingEngine,
        methods: Sequence[Method[Any]],
        log: Callable[[str], None],
        tasks: Sequence[TaskPlan] = (),
    ):
        """log: prints a line on rank 0. tasks: all tasks of the run, in order; a run without them is given each task
        when it begins."""
        self.config, self.engine, self.methods, self.log = config, engine, list(methods), log
        self.tasks = [task for task in tasks if task.config.role != "align"]
        """The tasks that methods act on, in order."""
        self.plan: RunPlan | None = None
        """The plan of the whole run. With it, the Fisher of the base model is shared between runs."""
        self.base_digest: str | None = None
        """Hash of the base model's weights, see ReferenceStore.digest."""
        self.memory: ReplayMemory | None = None
        self.harmful: dict[str, TokenDataset] = {}
        """Harmful rows that methods take gradients on, by file."""
        self.screening: dict[str, dict[str, Any]] = {}
        """By task: the rows that a scan has flagged and their weight, see safecl.planning.plans.apply_screening."""
        self.has_adapters = next(adapters(engine.module.model), None) is not None
        self.online_teachers = OnlineTeachers(config, engine, log=lambda message: self.log(message))
        self.recorded_teachers = RecordedTeachers(engine, config.output, self.has_adapters)
        self.row_scores = RowScores(engine, config.output)
        self.prompt_anchors = PromptAnchors(engine, config.output)

        self.task: TaskPlan | None = None
        """The current task."""
        self.previous: TaskPlan | None = None
        """The task before it: online EWC consolidates its rows, and some of them may enter the memory."""
        self.active_methods: list[Method[Any]] = []
        """The methods that act on the current task; none in the alignment task."""
        self.step = self.num_steps = 0
        """Steps made in the current task, and its number of steps."""
        self.global_step = self.skipped_steps = 0
        """Steps made over all tasks, and how many of them were skipped."""
        self.first_step = 0
        """The global step in which the current task began."""
        controller = config.safety.controller if config.safety is not None else None
        self.steering = Steering() if controller is None else Steering(controller.replay, controller.distillation)
        """Factors of replay and distillation, which the controller sets."""
        self.last_learning_rate = 0.0
        self.ready: dict[str, Ready] = {}
        """The rows and micro-batches read for the current step, by gradient; each is removed when it is used."""
        self.passes: list[tuple[list[StepRow], StepLosses]] = []
        """The passes of the last step, for draws that follow losses and for messages."""
        self.learning_rate_factor = 1.0
        """Factor of the schedule's learning rate, below 1 after a rollback."""

    def methods_of(self, role: str) -> list[Method[Any]]:
        """The methods that act on tasks of a role."""
        return [method for method in self.methods if method.config.acts_on == role]

    @property
    def seed(self) -> int:
        return self.config.train.seed

    @property
    def saves_average(self) -> bool:
        """True where the model to evaluate and to save is the EMA."""
        return any(method.saves_average for method in self.active_methods) and self.engine.optimizer.has("ema")
