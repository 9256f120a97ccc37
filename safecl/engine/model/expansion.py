"""Block expansion: a model with more decoder blocks, which computes what it did before.

A new block is a copy of the block below it whose last maps of attention and feed-forward part are 0, so that it adds
nothing to the residual stream (Wu et al. 2024, "LLaMA Pro", arXiv 2401.02415).
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from safecl.config import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAST_MAPS = ("o_proj", "out_proj", "down_proj", "fc2")
"""Names of the maps with which attention and feed-forward part write to the residual stream."""
TOLERANCE = 1e-5


def expand_folder(path: str, out: Path, blocks: int) -> list[int]:
    """Write the model of a folder with `blocks` more decoder blocks to `out`; return the numbers of the new blocks.

    The new blocks are spread evenly: one on top of each group of blocks. Raises ConfigError where the groups are not
    equal, where `out` exists, and for an architecture whose blocks would not add nothing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if out.exists():
        raise ConfigError(f"--output: {out} exists already; name another folder")
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    before = _logits(model)
    added = expand(model, blocks)
    try:
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(path).save_pretrained(out)
        after = _logits(AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval())
        if before.shape != after.shape or not torch.allclose(before, after, atol=TOLERANCE, rtol=TOLERANCE):
            raise ConfigError(f"{path}: the new blocks change what the model computes; its architecture is not known")
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return added


@torch.no_grad()
def expand(model: PreTrainedModel, blocks: int) -> list[int]:
    """Add blocks to a model in place; return their numbers."""
    settings = model.config.get_text_config()
    layers = _layers(model, settings.num_hidden_layers)
    group, rest = divmod(len(layers), blocks)
    if rest or group == 0:
        fitting = ", ".join(str(n) for n in range(1, len(layers) + 1) if len(layers) % n == 0)
        raise ConfigError(
            f"--blocks: {blocks} new blocks cannot be spread evenly over {len(layers)}; possible: {fitting}"
        )
    added = [(number + 1) * (group + 1) - 1 for number in range(blocks)]
    types = list(getattr(settings, "layer_types", None) or [])
    for number in added:
        layers.insert(number, _adding_nothing(layers[number - 1]))
        types[number:number] = types[number - 1 : number]
    settings.num_hidden_layers = len(layers)
    if types:
        settings.layer_types = types
    return added


def _adding_nothing(layer: nn.Module) -> nn.Module:
    """Return a copy of a block whose last maps are 0."""
    new = copy.deepcopy(layer)
    for name, module in new.named_modules():
        if name.rpartition(".")[2] in LAST_MAPS:
            for p in module.parameters():
                p.zero_()
    return new


def _layers(model: PreTrainedModel, count: int) -> nn.ModuleList:
    """Return the decoder's list of blocks."""
    decoder = cast(nn.Module, cast(Any, model).get_decoder())
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ConfigError(f"the model has no list of {count} decoder blocks; its architecture is not known")


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(1, 17)[None] % model.config.get_text_config().vocab_size
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits
