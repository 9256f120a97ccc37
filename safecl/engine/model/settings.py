"""A model's own settings, read without its weights, and the models that safecl refuses."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from safecl.config import ConfigError, ModelConfig
from safecl.config.errors import install_extra
from safecl.data.hub import refuse_unreachable
from safecl.distributed import devices
from safecl.storage.model_folder import is_adapter, is_gguf, settings_source
from safecl.storage.untrusted import library_error

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def choose_attention(wanted: str, dtype: str = "bf16") -> tuple[str, str]:
    """Return the attention implementation to use and the reason for it. dtype: bf16 or fp32, that of the run."""
    if wanted != "auto":
        return wanted, "as configured"
    if not devices.on_gpu():
        return "sdpa", "no GPU"
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        return "sdpa", "flash_attn is not installed"
    if dtype != "bf16":
        return "sdpa", "flash_attn computes in 16 bits only"
    return "flash_attention_2", "flash_attn is installed"


def read_model_settings(config: ModelConfig) -> PretrainedConfig:
    """Read the model's own settings (transformers' config). Raises ConfigError for a model that cannot be tuned."""
    refuse_unreachable("model.path", config.path)
    _refuse_without_package(config)
    from transformers import AutoConfig

    source, options = settings_source(config.path)
    try:
        settings = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code, **options)
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # the library's classes check their values in many ways
        raise ConfigError(f"model.path: {config.path}: no model can be read there: {library_error(error)}") from None
    _refuse_unsupported(settings, config.path)
    _refuse_absurd(settings, config.path)
    return settings


def _refuse_without_package(config: ModelConfig) -> None:
    """Raise ConfigError where a package is missing that reads the model's files."""
    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if is_gguf(config.path) and missing:
        needed = " and ".join(missing)
        raise ConfigError(
            f"model.path: {config.path}: reading a .gguf file needs the package {needed}: "
            f"pip install {' '.join(missing)}"
        )
    if is_adapter(config.path):
        if find_spec("peft") is None:
            raise ConfigError(
                f"model.path: {config.path} holds an adapter, which needs the extra `lora`: {install_extra('lora')}"
            )
        if config.lora is not None:
            raise ConfigError(
                f"model.lora: {config.path} holds an adapter already, so the new one would have no base of its own; "
                "merge it into its base first, or leave model.lora out"
            )


_LARGEST = {
    "num_hidden_layers": 1000,
    "num_attention_heads": 10_000,
    "num_key_value_heads": 10_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 10_000_000,
    "head_dim": 100_000,
    "vocab_size": 10_000_000,
    "max_position_embeddings": 10**9,
}
"""Sizes beyond which a model's settings are a mistake or an attack: its structure alone would fill the memory."""


def _refuse_absurd(settings: PretrainedConfig, path: str) -> None:
    text = settings.get_text_config()
    for key, most in _LARGEST.items():
        value = getattr(text, key, None)
        if value is None or isinstance(value, list):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            shown = f"{value:,}" if isinstance(value, int) else repr(value)[:80]
            raise ConfigError(f"model.path: {path}: its config.json has {key} {shown}; it must be 1 to {most:,}")


def _refuse_unsupported(settings: PretrainedConfig, path: str) -> None:
    text = settings.get_text_config()
    if any(getattr(text, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts")):
        raise ConfigError(
            f"model.path: {path} ({settings.model_type}) is a mixture of experts; "
            "safecl tunes dense decoder-only models"
        )
    if getattr(settings, "is_encoder_decoder", False):
        raise ConfigError(
            f"model.path: {path} ({settings.model_type}) is an encoder-decoder; safecl tunes dense decoder-only models"
        )
    if getattr(settings, "quantization_config", None):
        raise ConfigError(f"model.path: {path} holds quantised weights; safecl trains bf16 or fp32 weights")
