"""Loads a whole model with transformers: one whose tensors must be converted, a .gguf file, or an adapter and its
base."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from safecl.config import ConfigError
from safecl.distributed.library_warnings import no_future_warnings
from safecl.storage.model_folder import adapter_base, is_adapter, settings_source
from safecl.storage.untrusted import UnusableWeights, library_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def converted_state(
    path: str, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return a model's weights as transformers loads them, adapters merged, and the names of those that are missing.

    Raises UnusableWeights.
    """
    try:
        model, missing = _load(path, dtype, trust_remote_code)
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # pickle, zip, peft and transformers raise many kinds
        raise UnusableWeights(f"model.path: {path}: cannot be loaded: {library_error(error)}") from None
    return model.state_dict(), missing


def _load(path: str, dtype: torch.dtype, trust_remote_code: bool) -> tuple[PreTrainedModel, list[str]]:
    if is_adapter(path):
        return _load_adapter(path, dtype, trust_remote_code)
    from transformers import AutoModelForCausalLM

    load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained  # its type leaves output_loading_info out
    source, options = settings_source(path)
    model, info = load(source, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True, **options)
    return model, sorted(info["missing_keys"])


def _load_adapter(path: str, dtype: torch.dtype, trust_remote_code: bool) -> tuple[PreTrainedModel, list[str]]:
    """Merge in fp32, so that the sum is rounded once."""
    import peft

    base, missing = _load(adapter_base(path), torch.float32, trust_remote_code)
    with no_future_warnings():
        adapted: Any = peft.PeftModel.from_pretrained(base, path)
        return adapted.merge_and_unload().to(dtype), missing
