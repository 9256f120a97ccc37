"""Open a language model for an engine."""

from __future__ import annotations

from collections.abc import Callable

from safecl.config import ModelConfig
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

    The checks run in host memory, with a kernel that can; safecl.engine.passes.attention takes the chosen kernel into
    use on the device. `note` gets messages for the user. A collective call. Raises ConfigError.
    """
    loaded, store = load_model(config)
    for message in store.notes:
        note(message)
    model = LanguageModel(loaded)
    if not check_head(model):
        note("the model's logits are more than a linear head; its own logits are used (more memory)")
    attention, _ = choose_attention(config.attention, config.dtype)
    packed = packing == "packed" or (packing == "auto" and attention in ON_GPUS_ONLY)
    if packed:
        check_packing(model)
    layout = MicroBatchLayout(
        collectives.world_size(), tokens_per_microbatch, packed, pad_id=pad_id or 0, vocab_size=model.vocab_size
    )
    return model, layout, store
