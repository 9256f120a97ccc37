"""The whole run config, put together from its sections, and the checks between them.

Importing it imports no torch, so mistakes are reported in well under three seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from safecl.config.base import MethodConfig, Section, Text
from safecl.config.data import PoisonConfig, TaskConfig
from safecl.config.gate import CORRECT
from safecl.config.launch import LaunchConfig
from safecl.config.memory import MemoryConfig
from safecl.config.method_registry import load_methods, methods_that
from safecl.config.model import ModelConfig
from safecl.config.presets import with_sections
from safecl.config.safety import PrivacyConfig, SafetyConfig, ScanConfig
from safecl.config.stream import StreamConfig, with_stream
from safecl.config.training import ArtifactsConfig, CheckpointConfig, DeepSpeedConfig, LogConfig, TrainConfig


class RunConfig(Section):
    """One run: a model, a sequence of tasks, the methods that preserve its behaviour, and the measurements."""

    model: ModelConfig
    """The model that is tuned."""
    tasks: Annotated[list[TaskConfig], Field(min_length=1)]
    """Tasks, trained one after the other."""
    stream: StreamConfig | None = None
    """A stream in which the tasks recur. It is written out as tasks when the config is read."""
    memory: MemoryConfig | None = None
    """Rows whose behaviour must be kept."""
    methods: Annotated[dict[str, SerializeAsAny[MethodConfig]], BeforeValidator(load_methods)] = {}
    """Continual-learning methods, one or several; without one it is plain fine-tuning. Or a preset: `balanced` where
    uploads are screened, `strict` where poison is expected (both need a `memory`), `no-data` without safety data."""
    teacher: Literal["streamed", "resident"] = "streamed"
    """Place of the weights of an online teacher (methods.lwf.outputs, memory.teacher.kind: online). streamed: one copy
    per node in host memory, read through two buffers of a layer's size on each device; resident: a copy on each
    device."""
    train: TrainConfig = TrainConfig()
    """Optimization."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """ZeRO stage and offload."""
    safety: SafetyConfig | None = None
    """Measurement of safety."""
    poison: PoisonConfig = PoisonConfig()
    """Harmful rows mixed into the task's data."""
    scan: ScanConfig | None = None
    """Screen of the rows before training; `safecl scan` runs it alone."""
    privacy: PrivacyConfig = PrivacyConfig()
    """Limits on showing the users' text."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving the run's state."""
    artifacts: ArtifactsConfig = ArtifactsConfig()
    """Results that runs on the same base model share."""
    launch: LaunchConfig = LaunchConfig()
    """Nodes and ranks of `safecl launch`."""
    log: LogConfig = LogConfig()
    """Reports of the run's progress."""
    output: Text
    """Run folder; it is created."""

    @model_validator(mode="before")
    @classmethod
    def _presets_and_streams_are_written_out(cls, tree: Any) -> Any:
        return with_stream(with_sections(tree)) if isinstance(tree, Mapping) else tree

    # -------------------------------------------------------------------------------------- checks between the sections

    @model_validator(mode="after")
    def _task_names_differ(self) -> RunConfig:
        names = [task.name for task in self.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"tasks: the name {twice[0]!r} is used twice; metrics are kept by task name")
        return self

    @model_validator(mode="after")
    def _only_the_first_task_aligns(self) -> RunConfig:
        if late := [task.name for task in self.tasks[1:] if task.role == "align"]:
            raise ValueError(f"tasks: only the first task can have role `align`, not {late[0]!r}")
        return self

    @model_validator(mode="after")
    def _methods_have_a_task_to_act_on(self) -> RunConfig:
        for name, settings in self.methods.items():
            if settings.acts_on == "align" and self.tasks[0].role != "align":
                raise ValueError(
                    f"methods: {name} acts on the alignment stage; make the first task one with `role: align`, its "
                    "rows being prompts with safe answers"
                )
        return self

    @model_validator(mode="after")
    def _methods_have_the_memory_they_need(self) -> RunConfig:
        for name, settings in self.methods.items():
            if settings.needs_memory and self.memory is None:
                raise ValueError(
                    f"methods: {name} needs `memory: {{source: ...}}`, the rows whose behaviour must be kept, or "
                    "`memory: {prompts: ...}`, disallowed prompts alone; or `methods: no-data`"
                )
        return self

    @model_validator(mode="after")
    def _the_model_that_answers_is_aligned(self) -> RunConfig:
        if self.memory is not None and self.memory.prompts is not None and self.tasks[0].role == "align":
            raise ValueError(
                "memory.prompts: the aligned model answers them before the run, and here the first task (role: align) "
                "makes it; name rows with memory.source, or align in a run of its own"
            )
        return self

    @model_validator(mode="after")
    def _methods_have_the_harmful_rows_they_need(self) -> RunConfig:
        for name, settings in self.methods.items():
            if settings.needs_harmful and settings.harmful_source is None:
                raise ValueError(
                    f"methods: {name} needs `{name}: {{harmful: FILE}}`, disallowed prompts with answers that comply, "
                    "from which it learns what must not happen"
                )
        return self

    @model_validator(mode="after")
    def _methods_have_the_answers_they_need(self) -> RunConfig:
        for name, settings in self.methods.items():
            if settings.needs_answers and settings.answers_file is None:
                raise ValueError(
                    f"methods: {name} needs `{name}: {{answers: FILE}}`; `safecl memory rewrite CFG`, with a config "
                    "without it, writes the file"
                )
        return self

    @model_validator(mode="after")
    def _methods_have_the_models_they_need(self) -> RunConfig:
        for name, settings in self.methods.items():
            if missing := [key for key, model in settings.scoring_models.items() if model is None]:
                raise ValueError(f"methods: {name} needs `{name}: {{{missing[0]}: MODEL}}`, a folder or hub id")
            if settings.needs_base_model and settings.base_model is None:
                raise ValueError(f"methods: {name} needs `{name}: {{base: MODEL}}`, the model before its alignment")
        return self

    @model_validator(mode="after")
    def _clipping_does_not_contain_a_proximal_step(self) -> RunConfig:
        for name, settings in self.methods.items():
            if settings.is_proximal and self.train.clip_scope == "total":
                raise ValueError(
                    f"methods: {name}.proximal is a step of its own, so train.clip_scope: total cannot contain it; "
                    "use task"
                )
        return self

    @model_validator(mode="after")
    def _methods_accept_adapters(self) -> RunConfig:
        for name, settings in self.methods.items():
            if self.model.lora is not None and (reason := settings.refuses_lora) is not None:
                raise ValueError(f"methods: {name} with model.lora: {reason}")
            if self.model.lora is None and (reason := settings.needs_lora) is not None:
                raise ValueError(f"methods: {name} without model.lora: {reason}")
        return self

    @model_validator(mode="after")
    def _an_alignment_trains_all_weights(self) -> RunConfig:
        for name, settings in self.methods.items():
            if settings.freezes and self.tasks[0].role == "align":
                raise ValueError(
                    f"methods: {name} freezes weights from the start of the run, so the first task (role: align) could "
                    "not train them; align in a run of its own"
                )
        return self

    @model_validator(mode="after")
    def _a_micro_batch_holds_the_longest_row(self) -> RunConfig:
        tokens, longest = self.train.tokens_per_microbatch, self.train.max_length
        if tokens < longest:
            raise ValueError(
                f"train: tokens_per_microbatch ({tokens}) is below max_length ({longest}), so a long row would not "
                f"fit; set tokens_per_microbatch: {longest} or a smaller max_length"
            )
        return self

    @model_validator(mode="after")
    def _one_average(self) -> RunConfig:
        averages = [name for name, settings in self.methods.items() if settings.keeps_average]
        if len(averages) > 1:
            raise ValueError(
                f"methods: {' and '.join(averages)} each keep an average of the weights, but only one can be saved; "
                "leave one out"
            )
        return self

    @model_validator(mode="after")
    def _one_method_moves_a_pass(self) -> RunConfig:
        """A step has one forward and backward pass of its own, so it begins at one place."""
        for what, moving in (
            ("hidden states", [name for name, settings in self.methods.items() if settings.moves_hidden]),
            (
                "weights",
                [name for name, settings in self.methods.items() if settings.moves_weights == "until_update"],
            ),
        ):
            if len(moving) > 1:
                raise ValueError(
                    f"methods: {' and '.join(moving)} each move the {what} of the pass that trains the rows, and a "
                    "step has one such pass; leave one out"
                )
        return self

    @model_validator(mode="after")
    def _what_a_change_makes_hold_stays(self) -> RunConfig:
        """Factors for whole tensors leave true what holds inside of them, and nothing leaves true what holds for all
        tensors together."""
        for place, other in (("gradient", "step"), ("step", "gradient")):
            for role in ("task", "align"):
                found = {
                    name: change.by
                    for name, settings in self.methods.items()
                    if (change := settings.changes) is not None and change.to == place and settings.acts_on == role
                }
                binding = [name for name, by in found.items() if by != "factors"]
                clash = list(found) if "whole" in found.values() else binding
                if len(clash) > 1:
                    raise ValueError(
                        f"methods: {' and '.join(clash)} each change every {place}, and one undoes what another makes "
                        f"hold; leave one out, or let one change the {other} if it has such a setting"
                    )
        return self

    @model_validator(mode="after")
    def _a_proximal_step_is_alone(self) -> RunConfig:
        """The proximal step ends the optimizer's pass. The pass has room for one penalty and one kind of Fisher, so a
        masked average must read the penalty's own."""
        penalties = [name for name, settings in self.methods.items() if settings.has_penalty]
        for name, settings in self.methods.items():
            masks = [
                other
                for other, average in self.methods.items()
                if average.mask_fisher is not None and average.mask_fisher not in settings.state_kinds
            ]
            others = [other for other in [*penalties, *masks] if other != name]
            if settings.is_proximal and others:
                raise ValueError(
                    f"methods: {name}.proximal cannot be combined with {', '.join(others)}; use proximal: false"
                )
        return self

    @model_validator(mode="after")
    def _one_method_rewrites_rows(self) -> RunConfig:
        rewriting = [name for name, settings in self.methods.items() if settings.rewrites]
        if len(rewriting) > 1:
            raise ValueError(f"methods: {' and '.join(rewriting)} each rewrite the task's rows; leave one out")
        return self

    @model_validator(mode="after")
    def _an_average_that_teaches_is_kept(self) -> RunConfig:
        if any(settings.keeps_average for settings in self.methods.values()):
            return self
        for key, source in self.online_teachers.items():
            if source == "ema":
                known = " or ".join(methods_that(lambda settings: settings.keeps_average))
                raise ValueError(
                    f"{key}: ema is the average of the weights, and no method here keeps one; {known} does by default"
                )
        return self

    @model_validator(mode="after")
    def _adapters_have_no_previous_model(self) -> RunConfig:
        for key, source in self.online_teachers.items():
            if source == "previous" and self.model.lora is not None:
                raise ValueError(
                    f"{key}: previous cannot be an online teacher with model.lora, whose adapters have changed since; "
                    "use recorded or stored outputs (the method's outputs: recorded, memory.teacher.kind: topk), or "
                    "the aligned model"
                )
        return self

    @model_validator(mode="after")
    def _what_acts_on_safety_has_a_memory(self) -> RunConfig:
        if self.memory is None and self.safety is not None:
            for key, acts in (
                ("controller", self.safety.controller is not None),
                (f"on_fail: {CORRECT}", self.safety.on_fail == CORRECT),
            ):
                if acts:
                    raise ValueError(f"safety.{key} acts by replayed rows; it needs `memory: {{source: ...}}`")
        return self

    @model_validator(mode="after")
    def _a_scan_has_prompts_that_are_refused(self) -> RunConfig:
        scan = self.scan
        if scan is None or (scan.refusals and scan.benign):
            return self
        if self.memory is None and self.safety is None and scan.disallowed is None:
            raise ValueError(
                "scan: needs prompts that the model is known to refuse, `scan: {disallowed: ...}`, "
                "`memory: {source: ...}` or `safety: {prompts: ...}`; without them set scan.refusals and scan.benign"
            )
        return self

    @model_validator(mode="after")
    def _a_refusing_scan_knows_harmless_rows(self) -> RunConfig:
        if self.scan is not None and self.scan.action == "refuse" and self.scan.benign is None:
            raise ValueError(
                "scan.action: refuse needs scan.benign: only known harmless rows show how many are flagged by chance"
            )
        return self

    # ---------------------------------------------------------------------------------------------- values of the whole

    @property
    def needs_teacher(self) -> bool:
        """True where a method compares replayed rows with a teacher."""
        return any(settings.needs_teacher for settings in self.methods.values())

    @property
    def online_teachers(self) -> dict[str, str]:
        """The online teachers by the key that names them: aligned, previous, ema, or a folder."""
        found = {
            f"methods.{name}.teacher": source
            for name, settings in self.methods.items()
            if (source := settings.online_teacher)
        }
        if self.memory is not None and self.memory.teacher.kind == "online" and self.needs_teacher:
            found["memory.teacher.source"] = self.memory.teacher.source
        return found


def scoring_models(config: RunConfig) -> dict[str, str]:
    """The models that score the task's rows before training, by the key that names each."""
    return {
        f"methods.{name}.{key}": model
        for name, settings in config.methods.items()
        for key, model in settings.scoring_models.items()
        if model is not None
    }


def harmful_sources(config: RunConfig) -> dict[str, str]:
    """The files of harmful rows that methods take gradients on, by method."""
    return {name: path for name, settings in config.methods.items() if (path := settings.harmful_source) is not None}


def most_replayed(config: RunConfig) -> float:
    """Largest replay ratio of a step: the configured one, times what the controller may make of it."""
    assert config.memory is not None, "only a config with a memory replays rows"
    controller = config.safety.controller if config.safety is not None else None
    return config.memory.largest_replay_ratio * (1.0 if controller is None else controller.replay[1])


def memory_tokens(config: RunConfig) -> int:
    """Number of tokens that the memory's rows are cut to."""
    assert config.memory is not None, "only a config with a memory has memory rows"
    return min(config.memory.max_tokens, config.train.max_length)
