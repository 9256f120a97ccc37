"""LoRA's adapters: how they are added, and which weights have them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import nn

from safecl.config import ConfigError, LoraConfig, ModelConfig
from safecl.config.errors import install_extra
from safecl.distributed.library_warnings import no_future_warnings
from safecl.engine.model.dtypes import CONFIG_DTYPES
from safecl.storage.untrusted import library_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Adapter(NamedTuple):
    """The adapter of one weight; the merged weight is the weight + scaling * B A."""

    weight_name: str
    a: nn.Linear  # its weight is [r, in]
    b: nn.Linear  # its weight is [out, r]
    scaling: float  # alpha / r


def base_model(model: nn.Module) -> PreTrainedModel:
    """The causal language model under peft's wrapper, or the model itself."""
    return cast("PreTrainedModel", cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model)


def adapters(model: nn.Module, patterns: tuple[str, ...] = ()) -> Iterator[Adapter]:
    """The adapters of the weights whose name matches one of the patterns; all without patterns."""
    for module_name, module in base_model(model).named_modules():
        name = f"{module_name}.weight"
        for adapter, a in getattr(module, "lora_A", {}).items():
            if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns):
                lora = cast(Any, module)
                yield Adapter(name, a, lora.lora_B[adapter], lora.scaling[adapter])


def weight_names(model: nn.Module) -> list[str]:
    """Names of the trained weights; with LoRA, of the weights that have adapters."""
    return [adapter.weight_name for adapter in adapters(model)] or [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Makes the model what it was before adapters were added, without dropout."""
    training = model.training
    model.eval()
    try:
        with cast(Any, model).disable_adapter():
            yield
    finally:
        model.train(training)


def add_adapters(model: nn.Module, config: ModelConfig) -> nn.Module:
    """Return the model in peft's wrapper, with the adapters that `config.lora` describes, in the run's dtype.

    Raises ConfigError where peft is missing or finds none of the target modules.
    """
    try:
        import peft
    except ImportError:
        raise ConfigError(f"model.lora needs the extra `lora`: {install_extra('lora')}") from None
    lora = config.lora
    assert lora is not None, "adapters are added only where the config has them"
    settings = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides it by r, so a float is as good
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    refuse_targets_without_modules(model, lora)
    try:
        with no_future_warnings():  # peft asks transformers for a name that is to go
            adapted = peft.get_peft_model(cast("PreTrainedModel", model), settings)
    except ValueError as error:
        raise ConfigError(f"model.lora: {library_error(error)}") from None
    _name_base(adapted, config.path)
    for p in adapted.parameters():
        if p.requires_grad:
            p.data = p.data.to(CONFIG_DTYPES[config.dtype])  # a shard has one dtype
    return adapted


def refuse_targets_without_modules(model: nn.Module, lora: LoraConfig) -> None:
    """Raise ConfigError that names each target that is no module of the model. peft complains only where none is."""
    if lora.target_modules == "all-linear":
        return
    leaves = [name for name, module in model.named_modules() if name and not any(module.children())]
    nowhere = [target for target in lora.target_modules if not any(is_target(name, target) for name in leaves)]
    if not nowhere:
        return
    known = sorted({name.rpartition(".")[2] for name in leaves if not name.rpartition(".")[2].isdigit()})
    near = [match for target in nowhere for match in get_close_matches(target.rpartition(".")[2], known, 1)]
    hint = f"; did you mean {', '.join(dict.fromkeys(near))}?" if near else f"; the model has {', '.join(known)}"
    raise ConfigError(f"model.lora.target_modules: no module is named {', '.join(nowhere)}{hint}")


def is_target(name: str, target: str) -> bool:
    """Whether peft gives the module of this name an adapter for the target: the whole name, or its last parts."""
    return name == target or name.endswith(f".{target}")


def _name_base(adapted: nn.Module, path: str) -> None:
    """Write the base's absolute path into the adapter's settings, so that it is found from any folder; a hub id
    stays."""
    local = Path(path).expanduser()
    if local.exists():
        for settings in cast(Any, adapted).peft_config.values():
            settings.base_model_name_or_path = os.fspath(local.resolve())
