"""An engine's live model as evaluation uses it, in any ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch

from safecl.distributed import collectives
from safecl.distributed.node import this_node
from safecl.engine.model.adapters import base_model
from safecl.engine.model.features import layer_numbers
from safecl.engine.passes.engine import ModelEngine
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.engine.zero.shards import LIVE, PREFETCHED, whole_model, whole_model_bytes
from safecl.evaluation.answers.model import eos_ids_of
from safecl.evaluation.answers.sketch import padded
from safecl.storage.sizes import available_memory

Item = TypeVar("Item")

SHARE_FOR_WEIGHTS = 0.6
"""Of the free memory of a device, the part that gathered weights may take; activations and caches take the rest."""
SHARE_FOR_ROWS = 0.6
"""Of the free memory of a device beside the layers that are gathered, the part that the prompts may take that go
through streamed weights together."""


class LiveModel:
    """safecl.evaluation's EvalModel over an engine. It generates from the live shards, without a second model."""

    def __init__(self, engine: ModelEngine, *, streams: bool = False):
        """streams: every pass gathers the weights, so as many rows as there is room for share one."""
        self._engine, self._streams = engine, streams
        self.device = engine.device
        self.rank = collectives.rank()
        self.world_size = collectives.world_size()
        settings = engine.module.text_settings
        self.vocab_size = settings.vocab_size
        self.max_positions = getattr(settings, "max_position_embeddings", None)
        self.eos_ids = eos_ids_of(base_model(engine.module.model))

    def logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: Any = None,
        use_cache: bool = False,
        last_only: bool = False,
    ) -> tuple[torch.Tensor, Any]:
        """Return logits [batch, length or 1, vocab] and the cache, which is `past` itself: it grows in place."""
        if use_cache and past is None:
            from transformers import DynamicCache

            past = DynamicCache(config=base_model(self._engine.module.model).config)
        logits = self._engine.logits(input_ids, attention_mask, position_ids, past, use_cache, last_only)
        return logits, past

    def mean_states(self, prompts: Sequence[Sequence[int]], depth: float) -> torch.Tensor:
        """Return the mean over each prompt's tokens of the hidden states at this depth, fp32 [prompts, H]. depth: share
        of the layers, in (0, 1]. A collective call; every rank gives at least one prompt."""
        module, width = self._engine.module, max(map(len, prompts))
        layers = layer_numbers([max(1, round(depth * module.num_layers))], module.num_layers)
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        for place, prompt in enumerate(prompts):  # what stands behind a prompt does not reach it
            ids[place, : len(prompt)] = torch.as_tensor(prompt)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        inside = torch.arange(width) < lengths[:, None]
        output = self._engine.deepspeed(
            task="hidden",
            input_ids=ids.to(self.device),
            position_ids=torch.arange(width, device=self.device).expand(len(prompts), -1),
            positions=inside.flatten().nonzero().flatten().to(self.device),
            layers=layers,
        )
        parts = output["hidden"].float().split(lengths.tolist())
        return torch.stack([part.mean(0) for part in parts])

    def answer_sketches(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> torch.Tensor:
        """Return the sketch of the gradient of each answer at the output head, fp32 [answers, 4096]. A collective call;
        every rank gives at least one answer."""
        batch = {key: value.to(self.device) for key, value in padded(prompts, answers).items()}
        width = batch["input_ids"].shape[1]
        output = self._engine.deepspeed(  # what stands behind an answer does not reach it
            task="sketch",
            input_ids=batch["input_ids"],
            position_ids=torch.arange(width, device=self.device).expand(len(prompts), -1),
            positions=batch["positions"],
            targets=batch["targets"],
            row_of=batch["row_of"],
            num_rows=len(prompts),
        )
        return output["sketches"]

    def rows_at_once(self, width: int, new: int) -> int:
        """Return how many prompts of `width` tokens, with answers of `new` tokens, should share a pass; 0 where it
        makes no difference. Ranks may find different numbers."""
        free = free_bytes(self.device) if self._streams else None
        if free is None:
            return 0
        module = self._engine.module
        size = next(module.parameters()).element_size()
        gathered = min((LIVE + PREFETCHED) * size, whole_model_bytes(module))
        room = SHARE_FOR_ROWS * max(0, free - gathered)
        return int(room // bytes_of_a_row(module.text_settings, width, new, size))

    def any(self, flag: bool) -> bool:
        return collectives.any_rank(flag)

    def gather(self, items: list[Item]) -> list[Item]:
        return collectives.gather_objects(items)


@contextmanager
def evaluating(engine: TrainingEngine, average: bool, *, many_passes: bool = False) -> Iterator[LiveModel]:
    """The model in evaluation mode, with the EMA as its weights where `average` is true.

    many_passes: see `generating`. Leaving restores weights and mode exactly.
    """
    with engine.evaluation_mode():
        if average:
            engine.shards.swap(engine.optimizer.tensors("ema"))
        try:
            with generating(engine) if many_passes else nullcontext(LiveModel(engine)) as model:
                yield model
        finally:
            if average:
                engine.shards.swap(engine.optimizer.tensors("ema"))


@contextmanager
def generating(engine: ModelEngine) -> Iterator[LiveModel]:
    """The model for passes that generate, one per token. A collective call.

    Under ZeRO-3 a pass gathers every layer from all ranks. Where all weights fit every device, they are gathered once
    for the whole block. Otherwise they are streamed: each layer is gathered once per token of all prompts of a rank,
    which go through it together, and DeepSpeed gathers the next one ahead.
    """
    if engine.stage == 3 and is_whole(engine):
        with whole_model(engine.module):
            yield LiveModel(engine)
    else:
        yield LiveModel(engine, streams=engine.stage == 3)


def is_whole(engine: ModelEngine) -> bool:
    """Return whether an evaluation gathers all weights at once: as the config says, or else where every rank has room
    for them beside what it holds. A collective call."""
    if engine.evaluation != "auto":
        return engine.evaluation == "whole"
    wanted = whole_model_bytes(engine.module)
    room = free_bytes(engine.device)
    return not collectives.any_rank(room is not None and wanted > SHARE_FOR_WEIGHTS * room)


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that this rank may still take on its device; None where that is unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    there = available_memory()
    return None if there is None else there // len(this_node().ranks)


def bytes_of_a_row(settings: Any, width: int, new: int, size: int) -> int:
    """Return an upper bound of the bytes that a prompt takes in a pass over many: its cache of keys and values, its
    activations in a layer, its mask and its logits.

    settings: transformers' settings of the language model. width, new: tokens of the prompt and of the answer. size:
    bytes of a value.
    """
    heads = settings.num_attention_heads
    head_size = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    layers, kept = settings.num_hidden_layers, getattr(settings, "num_key_value_heads", None) or heads
    cache = 2 * (layers + 1) * kept * head_size * (width + new)  # a layer's cache is copied to a longer one
    inner = max(getattr(settings, "intermediate_size", 0) or 0, 4 * settings.hidden_size)
    activations = width * (12 * settings.hidden_size + 4 * inner)
    return size * (cache + activations) + 4 * width * width + (size + 4) * settings.vocab_size
