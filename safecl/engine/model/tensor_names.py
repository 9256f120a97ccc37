"""The places of a checkpoint's tensors in a model, found by transformers' own loader on tensors without memory.

transformers renames, joins and leaves out tensors while it loads. Here it loads tensors of the checkpoint's names and
shapes on the meta device. A parameter that shares its storage with one of them is that tensor under another name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from safecl.storage.untrusted import UnusableWeights, library_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Matches:
    """The tensors of a checkpoint, as transformers loads them."""

    sources: Mapping[str, str]
    """{name in the model: name in the checkpoint}, for tensors of which nothing but the name changes."""
    missing: tuple[str, ...]
    """Tensors of the model for which the checkpoint has none."""
    unused: tuple[str, ...]
    """Tensors of the checkpoint that the model has no place for."""
    conversions: list[Any]
    """transformers' renamings and conversions that the checkpoint needs; a saved model gets their reverse."""


def match_tensors(model: PreTrainedModel, shapes: Shapes, path: str) -> Matches:
    """Return what transformers makes of tensors of these names and shapes in a model of this class and settings.

    Raises UnusableWeights where it cannot load them.
    """
    tensors = {name: torch.empty(shape, device="meta", dtype=torch.float32) for name, shape in shapes.items()}
    load: Any = type(model).from_pretrained  # its type leaves output_loading_info out
    try:
        with _quiet():
            loaded, info = load(
                None,
                config=model.config,
                state_dict=dict(tensors),
                dtype=torch.float32,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UnusableWeights(f"model.path: {path}: cannot be loaded: {library_error(error)}") from None
    return Matches(
        _sources(loaded, tensors),
        tuple(sorted(info["missing_keys"])),
        tuple(sorted(info["unexpected_keys"])),
        list(getattr(loaded, "_weight_conversions", None) or ()),
    )


def keep_conversions(model: PreTrainedModel, conversions: list[Any]) -> None:
    """Keep the conversions of the files where transformers looks for them when it saves the model."""
    model._weight_conversions = conversions  # type: ignore[assignment]  # a list, as transformers itself sets it


def saved_names(model: PreTrainedModel, shapes: Shapes) -> dict[str, str]:
    """Return {name in the model: name in a folder that `save_pretrained` writes}.

    A name stays where saving would split or join tensors: transformers loads the model's own names as well.
    """
    from transformers.core_model_loading import revert_weight_conversion

    tensors = {name: torch.empty(shape, device="meta", dtype=torch.float32) for name, shape in shapes.items()}
    own_names = {_storage(tensor): name for name, tensor in tensors.items()}
    reverted = revert_weight_conversion(model, dict(tensors))
    names = {own_names[_storage(t)]: name for name, t in reverted.items() if _is_whole(t, tensors, own_names)}
    return {name: names.get(name, name) for name in shapes} if len(names) == len(shapes) else {n: n for n in shapes}


def _sources(loaded: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    own_names = {_storage(tensor): name for name, tensor in tensors.items()}
    places = [*loaded.named_parameters(remove_duplicate=False), *loaded.named_buffers()]
    return {name: own_names[_storage(t)] for name, t in places if _is_whole(t, tensors, own_names)}


def _is_whole(tensor: torch.Tensor, tensors: Mapping[str, torch.Tensor], names: Mapping[int, str]) -> bool:
    """Whether the tensor is one of the named ones, neither a part of it nor transposed."""
    name = names.get(_storage(tensor)) if tensor.is_meta else None
    if name is None:
        return False
    whole = tensors[name]
    return (tensor.shape, tensor.stride(), tensor.storage_offset()) == (whole.shape, whole.stride(), 0)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' progress bar and report away: safecl reports what it finds itself."""
    from transformers.utils import logging

    level, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bar:
            logging.enable_progress_bar()
