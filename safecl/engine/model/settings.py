"""A model's own settings, read without its weights, and what safecl refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from safecl.config import ConfigError, ModelConfig
from safecl.data.hub import refuse_unreachable

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def choose_attention(wanted: str) -> tuple[str, str]:
    """(attention implementation, why)."""
    if wanted != "auto":
        return wanted, "as configured"
    if not torch.cuda.is_available():
        return "sdpa", "no GPU"
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        return "sdpa", "flash_attn is not installed"
    return "flash_attention_2", "flash_attn is installed"


def read_model_settings(config: ModelConfig) -> PretrainedConfig:
    """The model's own settings (transformers' config), without reading weights. Raises ConfigError for a model that
    cannot be tuned."""
    refuse_unreachable("model.path", config.path)
    from transformers import AutoConfig

    try:
        settings = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {config.path}: no model can be read there: {first_line(error)}") from None
    _refuse_unsupported(settings, config.path)
    return settings


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def _refuse_unsupported(settings, path: str) -> None:
    text = settings.get_text_config()
    if any(getattr(text, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts")):
        raise ConfigError(
            f"model.path: {path} ({settings.model_type}) is a mixture of experts; safecl tunes dense decoder-only models"
        )
    if getattr(settings, "is_encoder_decoder", False):
        raise ConfigError(
            f"model.path: {path} ({settings.model_type}) is an encoder-decoder; safecl tunes dense decoder-only models"
        )
    if getattr(settings, "quantization_config", None):
        raise ConfigError(f"model.path: {path} holds quantised weights; safecl trains bf16 or fp32 weights")
