"""The run config: one typed tree with strict keys. Loading it imports no torch, so mistakes are told in well under three seconds.

Its sections are in safecl/config_sections.py. Every field's unit and meaning stand in the string under it; `safecl init` and docs/config.md
are generated from these strings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

from safecl.config_errors import ConfigError, explain, line_of
from safecl.config_sections import (
    ArtifactsConfig,
    CheckpointConfig,
    DeepSpeedConfig,
    EvalConfig,
    FieldMap,
    GateConfig,
    GuardConfig,
    LogConfig,
    LoraConfig,
    MemoryConfig,
    MethodConfig,
    ModelConfig,
    PoisonConfig,
    PrivacyConfig,
    SafetyConfig,
    ScanConfig,
    Section,
    TaskConfig,
    Text,
    TrainConfig,
    parse_bytes,
)
from safecl.config_yaml import apply_overrides, key_lines, parse_yaml, read_tree
from safecl.methods.presets import preset_methods

__all__ = [
    "ConfigError",
    "DeepSpeedConfig",
    "EvalConfig",
    "FieldMap",
    "GateConfig",
    "GuardConfig",
    "LoraConfig",
    "MemoryConfig",
    "MethodConfig",
    "ModelConfig",
    "RunConfig",
    "SafetyConfig",
    "ScanConfig",
    "TaskConfig",
    "TrainConfig",
    "apply_overrides",
    "dump_config",
    "load_config",
    "parse_bytes",
    "parse_yaml",
    "validate_tree",
]


def _load_methods(value: Any) -> dict[str, MethodConfig]:
    if value is None:
        return {}
    if isinstance(value, str):
        value = preset_methods(value)
    if not isinstance(value, Mapping):
        raise ValueError(
            "must be a mapping from method names to their settings, e.g. `methods: {ewc: {strength: 0.1}, ema: {}}`, or a preset, "
            "e.g. `methods: balanced`"
        )
    return {str(name): _load_method_config(str(name), settings) for name, settings in value.items()}


def _load_method_config(name: str, settings: Any) -> MethodConfig:
    from safecl.methods import method_module

    config_class = method_module(name).Config
    try:
        return settings if isinstance(settings, config_class) else config_class.model_validate({} if settings is None else settings)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, config_class, prefix=("methods", name)))) from None


class RunConfig(Section):
    """One run: a model, a sequence of tasks, the methods that keep what must be kept, and what is measured."""

    model: ModelConfig
    """The model that is tuned."""
    tasks: Annotated[list[TaskConfig], Field(min_length=1)]
    """Tasks, trained one after the other."""
    memory: MemoryConfig | None = None
    """Rows whose behaviour must be kept."""
    methods: Annotated[dict[str, SerializeAsAny[MethodConfig]], BeforeValidator(_load_methods)] = {}
    """Continual-learning methods, freely combined; none is plain fine-tuning. Or a preset: `balanced` with safety data in `memory`,
    `no-data` without."""
    teacher: Literal["streamed", "resident"] = "streamed"
    """Weights of a teacher that is asked in every step (methods.lwf.outputs, memory.teacher.kind: online). streamed: in host memory, once a
    node, and through two buffers of a layer's size on each device; resident: on each device."""
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
                raise ValueError(f"methods: {name}.proximal is a step of its own, so train.clip_scope: total cannot contain it; use task")
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
        """Of each key that names a teacher which is asked in every step, which one: aligned, previous, ema, or a folder."""
        found = {f"methods.{name}.teacher": source for name, settings in self.methods.items() if (source := settings.online_teacher)}
        replayed = any(getattr(settings, "needs_teacher", False) for settings in self.methods.values())
        if self.memory is not None and self.memory.teacher.kind == "online" and replayed:
            found["memory.teacher.source"] = self.memory.teacher.source
        return found

    @model_validator(mode="after")
    def _one_average(self) -> RunConfig:
        averages = [name for name, settings in self.methods.items() if getattr(settings, "keeps_average", False)]
        if len(averages) > 1:
            raise ValueError(f"methods: {' and '.join(averages)} each keep an average of the weights, and one can be saved; leave one out")
        return self

    @model_validator(mode="after")
    def _one_proximal_step(self) -> RunConfig:
        """It is the last thing in the optimizer's pass, which has room for one penalty, on the Fisher that a masked average reads."""
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
            if source == "ema" and not any(getattr(settings, "keeps_average", False) for settings in self.methods.values()):
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
            raise ValueError("scan.action: refuse needs scan.benign: only known harmless rows tell how many are flagged by chance")
        return self


# ---------------------------------------------------------------------------------------------------------------- loading


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads, overrides and checks a run config.

    Args: `path` of a YAML file; `overrides` like `"train.learning_rate=2e-5"`.
    Raises: ConfigError with one line per mistake: file and line, section, key, what is wrong, the nearest key that exists.
    """
    path, overrides = Path(path), list(overrides)
    tree = read_tree(path)
    for override in overrides:
        apply_overrides(_expand_preset(tree, str(path)), [override])
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = key_lines(path.read_text(encoding="utf-8-sig")) | {override.partition("=")[0]: None for override in overrides}
        raise _told(error, str(path), lines) from None


def _expand_preset(tree: dict[str, Any], source: str) -> dict[str, Any]:
    """So that an override can change one setting of a preset: `methods.der.alpha=2` behind `methods: balanced`."""
    if isinstance(tree.get("methods"), str):
        try:
            tree["methods"] = preset_methods(tree["methods"])
        except ValueError as error:
            raise ConfigError(f"{source}: methods: {error}") from None
    return tree


def validate_tree(tree: dict[str, Any], source: str) -> RunConfig:
    """Checks a config given as a tree of dicts and lists; `source` opens each line of a ConfigError."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise _told(error, source) from None


def _told(error: ValidationError, source: str, lines: Mapping[str, int | None] = MappingProxyType({})) -> ConfigError:
    mistakes = "\n".join(explain(error, RunConfig)).splitlines()
    numbers = [line_of(mistake, lines) for mistake in mistakes]
    places = [f"{source}:{number}" if number else source for number in numbers]
    return ConfigError("\n".join(f"{place}: {mistake}" for place, mistake in zip(places, mistakes, strict=True)))


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML, defaults included; `load_config` reads it back to the same tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
