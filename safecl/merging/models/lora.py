"""A LoRA adapter over its base, as dense weights.

    W = W_base + s B A,    s = alpha / r,  or alpha / sqrt(r) with rslora          (Hu et al., arXiv 2106.09685)

A, B and s are those of peft (https://github.com/huggingface/peft): ranks and alphas by pattern, transposed layers
(fan_in_fan_out), adapters of embeddings, and tensors saved whole (modules_to_save, biases). Averaging A and B apart is
not averaging their products, so merges see only W. Memory: one tensor of the base, and the factors of one weight.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from safecl.merging.models.folder import FolderWeights, local_folder, read_settings_file
from safecl.merging.models.names import names_in_files
from safecl.merging.models.tensor_files import ReusedMemory, open_file
from safecl.storage.model_folder import ADAPTER
from safecl.storage.safetensors_file import Tensor
from safecl.storage.untrusted import UnusableWeights

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.*)\.lora_(?P<factor>(?:embedding_)?[AB])(?:\.weight)?$")
_UNREAD = {
    "use_dora": "DoRA, whose magnitudes are no low-rank term",
    "use_qalora": "QA-LoRA",
    "megatron_config": "Megatron layers",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trained single tokens",
    "target_parameters": "adapters of bare parameters",
    "alora_invocation_tokens": "an adapter that is switched on by tokens",
    "lora_bias": "biases of adapters",
}


@dataclass(frozen=True)
class _Factors:
    """The tensors of one weight's adapter in the file, its scaling, and whether the product is transposed."""

    a: str
    b: str
    scaling: float
    transposed: bool


class AdapterWeights:
    """The weights of a base with an adapter. Raises UnusableWeights where the adapter cannot be used."""

    def __init__(self, path: str, label: str, base: FolderWeights):
        self.label, self.base = label, base
        self.folder = local_folder(path)
        self.settings = base.settings
        self.adapter_settings = read_settings_file(self.folder / ADAPTER)
        _refuse_other_adapters(self.folder / ADAPTER, self.adapter_settings)
        self.file = open_file(self.folder / ADAPTER_WEIGHTS, label)
        self.shapes: Mapping[str, tuple[int, ...]] = base.shapes
        self.factors, self.replaced = self._assign()
        self._check_shapes()

    @property
    def stored(self) -> Mapping[str, Tensor]:
        return self.base.stored

    @property
    def factor_dtype(self) -> str:
        """Dtype of the first factor, by its name in safetensors."""
        return next(iter(self.file.stored.values())).dtype

    def close(self) -> None:
        self.file.close()
        self.base.close()

    def check_unchanged(self) -> None:
        self.file.check_unchanged()
        self.base.check_unchanged()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if name in self.replaced:
            return self.file.read(self.replaced[name], start, stop)
        weight = self.base.read(name, start, stop)
        if (factors := self.factors.get(name)) is not None:
            a, b = self.file.read(factors.a), self.file.read(factors.b)
            left, right = (a.T[start:stop], b.T) if factors.transposed else (b[start:stop], a)
            weight.addmm_(left, right, alpha=factors.scaling)
        return weight

    def reuse(self, memory: ReusedMemory | None) -> None:
        """Let values be read into this memory; None: into new tensors."""
        self.base.reuse(memory)
        self.file.reuse(memory)

    def raw(self, name: str) -> bytes:
        return self.base.raw(name)

    def read_ahead(self, name: str) -> None:
        self.base.read_ahead(name)

    def digest(self) -> str:
        """XXH3-128 of the adapter's own tensors."""
        return self.file.digest()

    def same_bytes(self, name: str, other: str) -> bool:
        changed = {name, other} & (self.factors.keys() | self.replaced.keys())
        return not changed and self.base.same_bytes(name, other)

    def _assign(self) -> tuple[dict[str, _Factors], dict[str, str]]:
        """Return the factors by weight, and the tensors that replace one of the base."""
        pairs: dict[str, dict[str, str]] = {}
        replaced: dict[str, str] = {}
        for name in self.file.shapes:
            bare = name.removeprefix(PREFIX)
            if found := _LORA.fullmatch(bare):
                pairs.setdefault(found["module"], {})[found["factor"]] = name
            else:
                replaced[self._in_base(bare.replace(".base_layer.", ".").replace(".modules_to_save.", "."), name)] = (
                    name
                )
        factors = {}
        for module, pair in pairs.items():
            weight = self._in_base(f"{module.replace('.base_layer', '')}.weight", module)
            factors[weight] = self._factors(module, pair)
        return factors, replaced

    def _in_base(self, name: str, given: str) -> str:
        """Return the name of a weight in the base's files: its own, or the one that it has in transformers' model."""
        if name in self.base.shapes:
            return name
        if name in self._model_names:
            return self._model_names[name]
        raise UnusableWeights(f"{self.label}: {given} is for {name}, which the base {self.base.folder} does not have")

    @functools.cached_property
    def _model_names(self) -> Mapping[str, str]:
        return names_in_files(self.base)

    def _factors(self, module: str, pair: Mapping[str, str]) -> _Factors:
        embedding = "embedding_A" in pair or "embedding_B" in pair
        a, b = ("embedding_A", "embedding_B") if embedding else ("A", "B")
        if set(pair) != {a, b}:
            raise UnusableWeights(
                f"{self.label}: the adapter of {module} has only {', '.join(sorted(pair))} of A and B"
            )
        rank = self.file.shapes[pair[a]][0]
        transposed = embedding or bool(self.adapter_settings.get("fan_in_fan_out"))
        return _Factors(pair[a], pair[b], self._scaling(module, rank), transposed)

    def _scaling(self, module: str, rank: int) -> float:
        settings = self.adapter_settings
        alpha = float(_by_pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha", rank)))
        named = int(_by_pattern(settings.get("rank_pattern"), module, settings.get("r", rank)))
        if named != rank:
            raise UnusableWeights(f"{self.label}: the adapter of {module} has rank {rank}, its settings say {named}")
        return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank

    def _check_shapes(self) -> None:
        for weight, factors in self.factors.items():
            a, b = self.file.shapes[factors.a], self.file.shapes[factors.b]
            product = (a[-1], b[0]) if factors.transposed else (b[0], a[-1])
            if len(a) != 2 or len(b) != 2 or a[0] != b[1] or product != self.shapes[weight]:
                raise UnusableWeights(
                    f"{self.label}: the adapter of {weight} has factors {list(a)} and {list(b)}, the weight is "
                    f"{list(self.shapes[weight])}; was it trained on another base?"
                )
        for name, own in self.replaced.items():
            if self.file.shapes[own] != self.shapes[name]:
                raise UnusableWeights(
                    f"{self.label}: {own} has shape {list(self.file.shapes[own])}, the base's {name} has "
                    f"{list(self.shapes[name])}"
                )


def _by_pattern(patterns: Any, module: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that names the module, as peft matches them."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            return value
    return otherwise


def _refuse_other_adapters(file: Path, settings: Mapping[str, Any]) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise UnusableWeights(f"{file}: an adapter of the type {kind}; merges read LORA")
    if found := next((what for key, what in _UNREAD.items() if settings.get(key)), None):
        raise UnusableWeights(
            f"{file}: uses {found}; merge it into its base with peft's merge_and_unload, and give that folder"
        )
