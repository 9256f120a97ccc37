"""Open a language model for an engine."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from safecl.config import ConfigError, ModelConfig
from safecl.distributed import collectives
from safecl.engine.model.attention import ON_GPUS_ONLY
from safecl.engine.model.checks import check_head, check_packing
from safecl.engine.model.language_model import LanguageModel
from safecl.engine.model.settings import choose_attention
from safecl.engine.passes.micro_batches import MicroBatchLayout
from safecl.engine.reference.loading import load_model
from safecl.engine.reference.store import ReferenceStore


def open_language_model(
    config: ModelConfig, *, packing: str, tokens_per_microbatch: int, pad_id: int | None, note: Callable[[str], None]
) -> tuple[LanguageModel, MicroBatchLayout, ReferenceStore]:
    """Load a model and check it; return it with the layout of its micro-batches and the store of its weights.

    The checks run on the first rank alone, in host memory and with a kernel that can: all ranks have the same weights.
    safecl.engine.passes.attention takes the chosen kernel into use on the device. `note` gets messages for the user. A
    collective call. Raises ConfigError.
    """
    loaded, store = load_model(config)
    for message in store.notes:
        note(message)
    model = LanguageModel(loaded)
    attention, _ = choose_attention(config.attention, config.dtype)
    packed = packing == "packed" or (packing == "auto" and attention in ON_GPUS_ONLY)
    model.fused = collectives.on_first_rank(lambda: _check(model, packed), (ConfigError,), ConfigError)
    if not model.fused:
        note("the model's logits are more than a linear head; its own logits are used (more memory)")
    layout = MicroBatchLayout(
        collectives.world_size(), tokens_per_microbatch, packed, pad_id=pad_id or 0, vocab_size=model.vocab_size
    )
    return model, layout, store


def _check(model: LanguageModel, packed: bool) -> bool:
    """Return whether the fused head gives the model's logits. Raises ConfigError where packed documents see each other.

    Launchers give each rank one thread; here the others wait, and this rank uses all cores that it may.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, len(os.sched_getaffinity(0))))
    try:
        if packed:
            check_packing(model)
        return check_head(model)
    finally:
        torch.set_num_threads(threads)
