"""Attention kernels: how a model gets one that runs on GPUs only, and how one is compared with exact attention.

A model starts with a kernel that runs anywhere, since its weights are views of host memory then. flash-attention takes
its place when the weights are on the device, and is told where documents begin (`cu_seqlens`): so packed rows need
neither a mask [tokens, tokens] nor a question to the device per layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from safecl.engine.model.adapters import base_model

if TYPE_CHECKING:
    pass

ON_GPUS_ONLY = {"flash_attention_2"}
"""Kernels that take no CPU tensors. They know documents by their bounds and need no mask."""

LARGEST_DIFFERENCE = 0.02
"""Relative distance of a layer's attention in the run's dtype from exact attention; rounding to bf16 makes 0.003."""


class Sequences(TypedDict):
    """The documents of a micro-batch [batch, length], whose tokens are put end to end."""

    cu_seqlens: Tensor
    """int32 [documents + 1], the flat index at which each begins, and the end."""
    max_length: int
    """Tokens of the longest."""
    packed: bool
    """Whether a row holds several documents."""


def use_attention(model: nn.Module, name: str) -> None:
    """Let the model use another kernel from now on. Raises ValueError or ImportError where it cannot."""
    pretrained = base_model(model)
    pretrained.set_attn_implementation(name)
    if (used := pretrained.config.get_text_config()._attn_implementation) != name:
        raise ValueError(f"{type(pretrained).__name__} keeps {used}")


def attention_of(model: nn.Module) -> str:
    """Return the name of the kernel that the model uses."""
    return str(base_model(model).config.get_text_config()._attn_implementation)


def document_arguments(model: nn.Module, sequences: Sequences | None) -> dict[str, Any]:
    """Return the arguments by which a kernel that needs no mask knows the documents; none for other kernels, and for
    trunks that do not pass them on."""
    if sequences is None or attention_of(model) not in ON_GPUS_ONLY:
        return {}
    parameters = inspect.signature(base_model(model).get_decoder().forward).parameters.values()
    if not any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters):
        return {}
    bounds, longest = sequences["cu_seqlens"], sequences["max_length"]
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def rows_are_not_packed() -> AbstractContextManager[None]:
    """Tell transformers that rows are not packed. It would look at the positions' values, and assume packed rows where
    positions have none (meta tensors)."""
    return _finding_documents(lambda position_ids: None)


def rows_are_packed() -> AbstractContextManager[None]:
    """Tell transformers that rows hold several documents. It would ask the device whether they do."""
    return _finding_documents(_document_of_tokens)


def _document_of_tokens(position_ids: Tensor) -> Tensor:
    """Return the number of each token's document in its row, int64 [rows, length]: one begins where positions do not go
    on."""
    return (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)


@contextmanager
def _finding_documents(find: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    before = getattr(masking_utils, name, None)
    setattr(masking_utils, name, find)
    try:
        yield
    finally:
        setattr(masking_utils, name, before)


@contextmanager
def watched_attention(model: nn.Module, see: Callable[[nn.Module, tuple[Tensor, ...], Tensor, dict[str, Any]], None],
                      ) -> Iterator[None]:  # fmt: skip
    """Show each call of the model's kernel: `see(layer, (query, key, value), output, options)`.

    query, key and value are [batch, heads, tokens, width], the output [batch, tokens, heads, width].
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = attention_of(model)
    kernel = ALL_ATTENTION_FUNCTIONS[name]

    def watched(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        output = kernel(layer, query, key, value, *rest, **options)
        see(layer, (query, key, value), output[0], options)
        return output

    ALL_ATTENTION_FUNCTIONS[name] = watched
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[name] = kernel


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Causal attention within documents, in fp32, by its formula: softmax(scaling Q K^T) V.

    query: [1, heads, tokens, width], key and value may have fewer heads. Returns [1, tokens, heads, width].
    """
    groups, tokens = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (t.float().repeat_interleave(groups, dim=1) for t in (key, value))
    place = torch.arange(tokens, device=query.device)
    document = torch.bucketize(place, cu_seqlens[1:].long(), right=True)
    seen = (document[:, None] == document) & (place[:, None] >= place)
    if window is not None:
        seen &= place[:, None] - place < window
    scores = query.float() @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2)
