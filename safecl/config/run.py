"""The run config: one typed tree with strict keys. Loading it imports no torch, so mistakes are told in well under
three seconds.

Its sections are in safecl/config/base.py. Every field's unit and meaning stand in the string under it; `safecl init`
and docs/config.md are generated from these strings.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from safecl.config.base import MethodConfig, Section, Text
from safecl.config.data import PoisonConfig, TaskConfig
from safecl.config.memory import MemoryConfig
from safecl.config.methods import load_methods
from safecl.config.model import ModelConfig
from safecl.config.safety import PrivacyConfig, SafetyConfig, ScanConfig
from safecl.config.training import ArtifactsConfig, CheckpointConfig, DeepSpeedConfig, LogConfig, TrainConfig


class RunConfig(Section):
    """One run: a model, a sequence of tasks, the methods that keep what must be kept, and what is measured."""

    model: ModelConfig
    """The model that is tuned."""
    tasks: Annotated[list[TaskConfig], Field(min_length=1)]
    """Tasks, trained one after the other."""
    memory: MemoryConfig | None = None
    """Rows whose behaviour must be kept."""
    methods: Annotated[dict[str, SerializeAsAny[MethodConfig]], BeforeValidator(load_methods)] = {}
    """Continual-learning methods, freely combined; none is plain fine-tuning. Or a preset: `balanced` with safety data
    in `memory`, `no-data` without."""
    teacher: Literal["streamed", "resident"] = "streamed"
    """Weights of a teacher that is asked in every step (methods.lwf.outputs, memory.teacher.kind: online). streamed: in
    host memory, once a node, and through two buffers of a layer's size on each device; resident: on each device."""
    train: TrainConfig = TrainConfig()
    """Optimization."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """ZeRO stage and offload."""
    safety: SafetyConfig | None = None
    """Safety measured beside the loss."""
    poison: PoisonConfig = PoisonConfig()
    """Harmful rows mixed into the task's data."""
    scan: ScanConfig | None = None
    """Screen of the rows before training; `safecl scan` does it alone."""
    privacy: PrivacyConfig = PrivacyConfig()
    """What of the users' text may be shown."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving the run's state."""
    artifacts: ArtifactsConfig = ArtifactsConfig()
    """What runs on the same base model share."""
    log: LogConfig = LogConfig()
    """Where progress goes."""
    output: Text
    """Run folder; created."""

    @model_validator(mode="after")
    def _parts_fit_together(self) -> RunConfig:
        names = [task.name for task in self.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"tasks: the name {twice[0]!r} is used twice; metrics are kept by task name")
        if late := [task.name for task in self.tasks[1:] if task.role == "align"]:
            raise ValueError(f"tasks: only the first task can have role `align`, not {late[0]!r}")
        for name, config in self.methods.items():
            if getattr(config, "needs_memory", False) and self.memory is None:
                raise ValueError(
                    f"methods: {name} needs `memory: {{source: ...}}`, the rows whose behaviour must be kept; or `methods: no-data`"
                )
            if self.train.clip_scope == "total" and getattr(config, "proximal", False):
                raise ValueError(
                    f"methods: {name}.proximal is a step of its own, so train.clip_scope: total cannot contain it; use task"
                )
            if self.model.lora is not None and (reason := getattr(config, "refuses_lora", None)):
                raise ValueError(f"methods: {name} with model.lora: {reason}")
        if self.train.tokens_per_microbatch < self.train.max_length:
            raise ValueError(
                f"train: tokens_per_microbatch ({self.train.tokens_per_microbatch}) is below max_length ({self.train.max_length}), "
                f"so a long row would not fit; set tokens_per_microbatch: {self.train.max_length} or a smaller max_length"
            )
        return self

    @property
    def online_teachers(self) -> dict[str, str]:
        """Of each key that names a teacher which is asked in every step, which one: aligned, previous, ema, or a
        folder."""
        found = {
            f"methods.{name}.teacher": source
            for name, settings in self.methods.items()
            if (source := settings.online_teacher)
        }
        replayed = any(getattr(settings, "needs_teacher", False) for settings in self.methods.values())
        if self.memory is not None and self.memory.teacher.kind == "online" and replayed:
            found["memory.teacher.source"] = self.memory.teacher.source
        return found

    @model_validator(mode="after")
    def _one_average(self) -> RunConfig:
        averages = [name for name, settings in self.methods.items() if getattr(settings, "keeps_average", False)]
        if len(averages) > 1:
            raise ValueError(
                f"methods: {' and '.join(averages)} each keep an average of the weights, and one can be saved; leave one out"
            )
        return self

    @model_validator(mode="after")
    def _one_proximal_step(self) -> RunConfig:
        """It is the last thing in the optimizer's pass, which has room for one penalty, on the Fisher that a masked
        average reads."""
        penalties = {name: settings for name, settings in self.methods.items() if hasattr(settings, "proximal")}
        for name, settings in penalties.items():
            masked = "psmt" in self.methods and "fisher" not in settings.state_kinds
            if settings.proximal and (len(penalties) > 1 or masked):
                others = ", ".join(other for other in [*penalties, *(["psmt"] if masked else [])] if other != name)
                raise ValueError(f"methods: {name}.proximal cannot be combined with {others}; use proximal: false")
        return self

    @model_validator(mode="after")
    def _teachers_exist(self) -> RunConfig:
        for key, source in self.online_teachers.items():
            if source == "ema" and not any(
                getattr(settings, "keeps_average", False) for settings in self.methods.values()
            ):
                raise ValueError(f"{key}: ema needs the method ema (write_back: never), which keeps the average")
            if source == "previous" and self.model.lora is not None:
                raise ValueError(
                    f"{key}: previous cannot be asked in every step with model.lora, whose adapters have moved on; use recorded or stored "
                    "outputs (methods.lwf.outputs: recorded, memory.teacher.kind: topk), or the aligned model"
                )
        return self

    @model_validator(mode="after")
    def _scan_knows_what_it_needs(self) -> RunConfig:
        if self.scan is None:
            return self
        known = self.memory is not None or self.safety is not None or self.scan.disallowed is not None
        if not known and not (self.scan.refusals and self.scan.benign):
            raise ValueError(
                "scan: needs prompts that the model is known to refuse, `scan: {disallowed: ...}`, `memory: {source: ...}` or "
                "`safety: {prompts: ...}`; without them set scan.refusals and scan.benign"
            )
        if self.scan.action == "refuse" and self.scan.benign is None:
            raise ValueError(
                "scan.action: refuse needs scan.benign: only known harmless rows tell how many are flagged by chance"
            )
        return self


# -------------------------------------------------------------------------------------------------------------- loading


def memory_tokens(config: RunConfig) -> int:
    """What the memory's rows are cut to."""
    return min(config.memory.max_tokens, config.train.max_length)
