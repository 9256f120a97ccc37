"""The run config: one typed tree with strict keys. Importing it imports no torch, so mistakes are reported in well
under three seconds."""

from __future__ import annotations

from safecl.config.base import MethodConfig, Section, parse_bytes
from safecl.config.data import EvalConfig, FieldMap, PoisonConfig, TaskConfig
from safecl.config.errors import ConfigError
from safecl.config.gate import ControllerConfig, DriftConfig, GateConfig, ProbeConfig, RateLimit, RecoveryConfig
from safecl.config.launch import KubernetesConfig, LaunchConfig, SlurmConfig
from safecl.config.load import dump_config, load_config, validate_tree
from safecl.config.memory import GuardConfig, MemoryConfig
from safecl.config.model import LoraConfig, ModelConfig
from safecl.config.parsing import apply_overrides, parse_yaml
from safecl.config.run import RunConfig
from safecl.config.safety import PrivacyConfig, SafetyConfig, ScanConfig, VllmConfig
from safecl.config.training import (
    ArtifactsConfig,
    CheckpointConfig,
    DeepSpeedConfig,
    LogConfig,
    LossMean,
    TrainConfig,
)

__all__ = [
    "ArtifactsConfig",
    "CheckpointConfig",
    "ConfigError",
    "ControllerConfig",
    "DeepSpeedConfig",
    "DriftConfig",
    "EvalConfig",
    "FieldMap",
    "GateConfig",
    "GuardConfig",
    "KubernetesConfig",
    "LaunchConfig",
    "LogConfig",
    "LoraConfig",
    "LossMean",
    "MemoryConfig",
    "MethodConfig",
    "ModelConfig",
    "PoisonConfig",
    "PrivacyConfig",
    "ProbeConfig",
    "RateLimit",
    "RecoveryConfig",
    "RunConfig",
    "SafetyConfig",
    "ScanConfig",
    "Section",
    "SlurmConfig",
    "TaskConfig",
    "TrainConfig",
    "VllmConfig",
    "apply_overrides",
    "dump_config",
    "load_config",
    "parse_bytes",
    "parse_yaml",
    "validate_tree",
]
