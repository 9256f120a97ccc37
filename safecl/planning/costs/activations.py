"""Counts the bytes that a forward and backward pass takes besides weights and gradients.

The model's own code runs in PyTorch's fake mode, where tensors have shapes and no data, and every storage that an
operation makes is counted while it lives. This works for any architecture, with and without gradient checkpointing or
adapters, and needs no device. All decoder layers take the same, so the model is run with two layers and with four, and
the difference gives the rest.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safecl.config import ModelConfig
from safecl.engine.model.adapters import base_model
from safecl.engine.model.attention import rows_are_not_packed
from safecl.engine.model.dtypes import CONFIG_DTYPES
from safecl.engine.model.language_model import LanguageModel
from safecl.engine.model.structure import parameters_on_meta, prepare_for_training

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LAYERS = (2, 4)
_COUNTED: dict[tuple[str, str, tuple[int, int], bool], int] = {}


def activation_bytes(
    settings: PretrainedConfig, config: ModelConfig, shape: tuple[int, int], *, masked: bool = False
) -> int:
    """Return the peak bytes of one micro-batch in the run's dtype, without the head's logits.

    settings: transformers' settings of the model. shape: [rows, tokens] of the micro-batch. masked: rows are packed,
    and a mask [tokens, tokens] separates them. Counting takes up to a second, so a process remembers what it found.
    """
    key = (settings.to_json_string(use_diff=False), config.model_dump_json(), shape, masked)
    if key not in _COUNTED:
        model = structure(settings, config)
        _COUNTED[key] = bytes_of_all_layers(model, lambda model: _peak(model, *shape), masked=masked)
    return _COUNTED[key]


def bytes_of_all_layers(model: nn.Module, measure: Callable[[nn.Module], int], *, masked: bool = False) -> int:
    """Return what `measure` finds for the model, from what it finds for a few of its layers in fake mode."""
    layers = _layers(model)
    count, found = len(layers), {}
    with FakeTensorMode() as mode, contextlib.nullcontext() if masked else rows_are_not_packed():
        _take_away_memory(model, mode)
        for kept in sorted({min(count, number) for number in LAYERS}, reverse=True):
            del layers[kept:]
            found[kept] = measure(model)
    if count <= LAYERS[1]:
        return found[count]
    few, more = (found[number] for number in LAYERS)
    return few + (more - few) * (count - LAYERS[0]) // (LAYERS[1] - LAYERS[0])


def structure(settings: PretrainedConfig, config: ModelConfig) -> nn.Module:
    """Return the model as it is trained, with its parameters on the meta device."""
    from transformers import AutoModelForCausalLM

    # sdpa in place of flash attention, which takes as many bytes
    chosen = {"attn_implementation": "eager"} if config.attention == "eager" else {}
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(settings),
            dtype=CONFIG_DTYPES[config.dtype],
            trust_remote_code=config.trust_remote_code,
            **chosen,
        )
    model.config.use_cache = False
    return prepare_for_training(model, config).train()


def _take_away_memory(model: nn.Module, mode: FakeTensorMode) -> None:
    """Turn parameters and buffers into fake tensors on the CPU; tied parameters stay the same object."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
                    made[id(made[id(p)])] = made[id(p)]
                module._parameters[name] = made[id(p)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)


def _layers(model: nn.Module) -> nn.ModuleList:
    decoder = base_model(model).get_decoder()
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))


def _peak(model: nn.Module, num_rows: int, length: int) -> int:
    """Return the peak bytes of a forward and backward pass. Each gradient of a weight is dropped as soon as it is
    complete."""
    wrapped, tokens = LanguageModel(model), num_rows * length
    inputs = dict(
        input_ids=torch.zeros(num_rows, length, dtype=torch.int64),
        position_ids=torch.arange(length).expand(num_rows, -1),
        positions=torch.arange(tokens),
        targets=torch.zeros(tokens, dtype=torch.int64),
        ce_weights=torch.ones(tokens),
    )
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in model.parameters() if p.requires_grad]
    live = LiveBytes(known=[*model.parameters(), *model.buffers(), *inputs.values()])
    try:
        with live:
            wrapped(task="loss", **inputs)["loss"].backward()
    finally:
        for hook in hooks:
            hook.remove()
    return live.peak


def _drop_gradient(p: nn.Parameter) -> None:
    p.grad = None


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, as long as something holds them. Those of `known` are not counted."""

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        arguments: tuple[Any, ...] = (),
        options: dict[str, Any] | None = None,
    ) -> Any:
        made = function(*arguments, **(options or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.now -= nbytes
