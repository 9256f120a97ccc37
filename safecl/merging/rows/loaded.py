"""A model in memory, made of what the merge sees as one model's weights: a folder, or an adapter over its base.

Memory: the whole model, in the dtype that it is loaded in, on the GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from safecl.distributed import devices
from safecl.engine.model.structure import empty_model
from safecl.engine.model.tensor_names import match_tensors
from safecl.engine.reference.loading import take_generation_settings
from safecl.merging.base import Models, Unmergeable, Weights
from safecl.merging.rows.reading import TokenRow
from safecl.storage.untrusted import library_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model. parameters: by the names of the merge, tied ones once."""

    model: PreTrainedModel
    parameters: Mapping[str, nn.Parameter]

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def linear_layers(self) -> dict[str, LinearLayer]:
        """Return the linear layers of the blocks, by the names of their weights in the merge."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        ends = {id(self.model.get_output_embeddings())}  # type: ignore[no-untyped-call]  # transformers' own
        found = {}
        for module in self.model.modules():
            weight = getattr(module, "weight", None)
            is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            if is_linear and id(module) not in ends and id(weight) in names:
                found[names[id(weight)]] = LinearLayer(module, not isinstance(module, nn.Linear))
        return found

    def run(self, rows: Sequence[TokenRow]) -> Iterator[tuple[TokenRow, torch.Tensor]]:
        """Yield each row with its logits, [length, vocabulary]."""
        for row in rows:
            logits = self.model(input_ids=row.ids[None].to(self.device), use_cache=False).logits[0]
            yield row, logits


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer. transposed: its weight is [inputs, outputs], as GPT-2's."""

    module: nn.Module
    transposed: bool


def load(
    models: Models,
    weights: Weights,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    attention: str | None = None,
) -> LoadedModel:
    """Make the model that the first tuned model's settings describe, with these weights. attention: the kernel;
    transformers chooses it by default.

    Raises Unmergeable where transformers' model has no place for a tensor, or none of its name.
    """
    path = models.folders["tuned"]
    try:
        model = empty_model(path, dtype, attention=attention, trust_remote_code=trust_remote_code)
    except Exception as error:  # the library's classes check their settings in many ways
        raise Unmergeable(f"{path}: cannot be run by transformers: {library_error(error)}") from None
    sources = match_tensors(model, weights.shapes, path).sources
    if homeless := [name for name in models.places if name not in sources.values()]:
        raise Unmergeable(f"{path}: transformers' model has no parameter for {homeless[0]}; rows cannot run through it")
    named = dict(model.named_parameters())  # holds the parameters, so that their ids stay theirs
    if missing := [name for name in named if name not in sources]:
        raise Unmergeable(f"{path}: there are no weights for {missing[0]} of transformers' model")
    made = {id(p): nn.Parameter(weights.read(sources[name]).to(dtype)) for name, p in named.items()}
    for module in model.modules():
        for leaf, p in module._parameters.items():
            if p is not None:
                module._parameters[leaf] = made[id(p)]
    for name, buffer in model.named_buffers():
        if sources.get(name) in models.places:
            buffer.copy_(weights.read(sources[name]))
    take_generation_settings(model, path)
    model.to(devices.device())  # type: ignore[arg-type]  # transformers' decorator hides the signature
    model.eval()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    return LoadedModel(model, {sources[n]: p for n, p in model.named_parameters() if n in sources})


def answer_loss(logits: torch.Tensor, row: TokenRow) -> torch.Tensor:
    """Mean negative log-likelihood of a row's answer. logits: [length, vocabulary]."""
    wanted = row.targets[1:]
    targets = row.ids[1:][wanted].to(logits.device)
    return nn.functional.cross_entropy(logits[:-1][wanted.to(logits.device)].float(), targets)
