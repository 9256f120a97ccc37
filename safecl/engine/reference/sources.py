"""Finds each weight in a model's files and reads it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from safecl.distributed import devices
from safecl.engine.model.dtypes import DTYPE_NAMES, DTYPES, FLOAT_DTYPES, tensor_bytes
from safecl.engine.model.stored_tensors import check_adapter, stored_shapes
from safecl.engine.model.tensor_names import Matches, Shapes, keep_conversions, match_tensors
from safecl.engine.reference.converting import converted_state
from safecl.engine.reference.layout import Layout
from safecl.kernels.finite import count_nonfinite
from safecl.storage.durable import open_regular, read_into
from safecl.storage.model_folder import ModelFiles, adapter_base, is_adapter, is_gguf, read_model_files
from safecl.storage.safetensors_file import Tensor
from safecl.storage.untrusted import UnusableWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK_BYTES = 16 * 2**20
_MOST_NAMED = 4

Sources = Mapping[str, tuple[Path, Tensor]]
"""The file of each parameter, and its place there."""


def find_weights(
    path: str, layout: Layout, model: PreTrainedModel, trust_remote_code: bool = False
) -> Reader | Converter:
    """Find each parameter in the model's files; where its tensor must be converted, leave it to transformers.

    model: the model's structure. Raises UnusableWeights where a parameter is missing or does not fit.
    """
    if is_adapter(path):
        check_adapter(path)
        base = find_weights(adapter_base(path), layout, model, trust_remote_code)
        return Converter(layout, None, path, trust_remote_code, base.notes)
    if is_gguf(path):
        return Converter(layout, None, path, trust_remote_code)
    files = read_model_files(path)
    shapes = stored_shapes(path)
    matches = match_tensors(model, shapes, path)
    keep_conversions(model, matches.conversions)
    found = {
        name: tensor for name in layout.shapes if (tensor := _tensor_of(name, layout, matches, shapes)) is not None
    }
    if missing := [name for name in layout.shapes if name not in found and name in matches.missing]:
        raise UnusableWeights(_missing(path, missing, shapes))
    notes = _notes(path, matches)
    if files is None or len(found) < len(layout.shapes):
        return Converter(layout, files, path, trust_remote_code, notes)
    sources = {name: files.tensors[tensor] for name, tensor in found.items()}
    for name, (file, stored) in sources.items():
        _check_tensor(name, layout, file, stored)
    return Reader(layout, files, path, sources, notes)


def _tensor_of(name: str, layout: Layout, matches: Matches, shapes: Shapes) -> str | None:
    """Return the name that a parameter has in the files: the one that transformers finds, else one of its own names,
    which has another shape there."""
    names = [name, *(alias for alias, kept in layout.aliases.items() if kept == name and alias != name)]
    matched = [matches.sources[each] for each in names if each in matches.sources]
    bare = [each.removeprefix(f"{layout.prefix}.") for each in names if layout.prefix]
    return next((each for each in [*matched, *names, *bare] if each in shapes), None)


_WRAPPERS = {
    "_orig_mod.": "torch.compile's wrapper",
    "module.": "the wrapper of data-parallel training",
    "base_model.model.": "peft's wrapper",
    "_fsdp_wrapped_module.": "FSDP's wrapper",
}


def _missing(path: str, missing: list[str], shapes: Shapes) -> str:
    """Name the first missing tensor, and the reason where the names show it."""
    message = f"model.path: {path}: tensor {missing[0]} is missing" + _and_more(missing)
    wrapper = next((prefix for prefix in _WRAPPERS if any(name.startswith(prefix) for name in shapes)), None)
    if wrapper is not None:
        return f"{message}; names there begin with `{wrapper}`, so save the model without {_WRAPPERS[wrapper]}"
    return message


def _notes(path: str, matches: Matches) -> tuple[str, ...]:
    """Name the tensors of the files that are left out."""
    if not matches.unused:
        return ()
    named = ", ".join(matches.unused[:_MOST_NAMED])
    more = f" and {len(matches.unused) - _MOST_NAMED} more" if len(matches.unused) > _MOST_NAMED else ""
    count = f"{len(matches.unused)} unused tensor{'s' * (len(matches.unused) != 1)}"
    return (
        f"model.path: {path}: {count}, for which config.json has no place; left out, as transformers does: "
        f"{named}{more}",
    )


def _check_tensor(name: str, layout: Layout, file: Path, tensor: Tensor) -> None:
    wanted = layout.shapes[name]
    if tensor.shape != wanted:
        if name == layout.embedding and tensor.shape[1:] == wanted[1:]:
            raise UnusableWeights(
                f"{file}: a vocabulary of {tensor.shape[0]:,} tokens, but the model's config.json says {wanted[0]:,}"
            )
        raise UnusableWeights(
            f"{file}: {name} has shape {list(tensor.shape)}, the model's config.json says {list(wanted)}"
        )
    if tensor.dtype not in FLOAT_DTYPES:
        raise UnusableWeights(f"{file}: {name} is stored as {tensor.dtype}; safecl reads {', '.join(FLOAT_DTYPES)}")


def _and_more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


@dataclass(frozen=True)
class Reader:
    """Reads parameters straight from the model's files."""

    layout: Layout
    files: ModelFiles
    path: str
    sources: Sources
    notes: tuple[str, ...] = ()
    """Messages to the user about the files."""

    def loader(self) -> Callable[[str, torch.Tensor], Any]:
        """Return a function that fills a flat tensor with a parameter; several threads may call it."""
        return lambda name, target: _load(self.sources[name], target)

    def buffers(self) -> dict[str, torch.Tensor]:
        found = {name: self.files.tensors[name] for name in self.layout.buffers if name in self.files.tensors}
        values = {name: torch.empty(source[1].shape, dtype=DTYPES[source[1].dtype]) for name, source in found.items()}
        for name, source in found.items():
            _load(source, values[name].view(-1))
        return values

    def check_unchanged(self) -> None:
        self.files.check_unchanged()

    def obstacle_to_mapping(self) -> str | None:
        """Say why the files cannot be mapped in place of a segment; None where they can."""
        if devices.on_gpu():
            return "a GPU needs pinned memory"
        for name, (file, tensor) in self.sources.items():
            if FLOAT_DTYPES[tensor.dtype] != self.layout.dtype:
                return f"{file} holds {name} as {tensor.dtype}, the run needs {DTYPE_NAMES[self.layout.dtype]}"
            if tensor.position % self.layout.dtype.itemsize:
                return f"{file} is not aligned"
        return None

    def check_finite(self) -> None:
        """Raise UnusableWeights for a parameter that is not finite in the run's dtype, as filling a segment does.

        Reads all files.
        """
        _check_finite(self.path, self.sources, self.layout.dtype)

    def digest(self) -> str:
        """Digest of the parameters, the same as that of a segment with their values.

        Raises UnusableWeights for one that is not finite.
        """
        hashes = {}
        for name, source in self.sources.items():
            digest, nonfinite = xxhash.xxh3_128(), 0
            for part in _chunks(source):
                digest.update(tensor_bytes(part))
                nonfinite += count_nonfinite(part)
            _refuse(self.path, name, nonfinite, source[1].shape)
            hashes[name] = digest.digest()
        return combine(self.layout, hashes)


def _chunks(source: tuple[Path, Tensor]) -> Iterator[torch.Tensor]:
    """Yield one stored tensor in parts, each valid until the next."""
    path, tensor = source
    stored = DTYPES[tensor.dtype]
    numel, chunk = tensor.nbytes // stored.itemsize, _CHUNK_BYTES // stored.itemsize
    scratch = torch.empty(min(chunk, numel), dtype=stored)
    with open_regular(path.resolve()) as file:
        for start in range(0, numel, chunk):
            part = scratch[: min(chunk, numel - start)]
            read_into(file, tensor.position + start * stored.itemsize, tensor_bytes(part))
            yield part


def _check_finite(path: str, sources: Sources, dtype: torch.dtype) -> None:
    for name, source in sources.items():
        if source[1].dtype in FLOAT_DTYPES:
            _refuse(path, name, sum(count_nonfinite(part.to(dtype)) for part in _chunks(source)), source[1].shape)


def refuse_nonfinite(path: str, name: str, values: torch.Tensor) -> None:
    """Raise UnusableWeights where a parameter of the model at `path` is NaN or infinite somewhere."""
    _refuse(path, name, count_nonfinite(values), values.shape)


def _refuse(path: str, name: str, nonfinite: int, shape: Sequence[int]) -> None:
    if nonfinite:
        raise UnusableWeights(
            f"model.path: {path}: {nonfinite:,} of the {math.prod(shape):,} values of {name} are not finite (NaN or "
            "infinite); such a model cannot be trained or measured"
        )


@torch.no_grad()
def _load(source: tuple[Path, Tensor], target: torch.Tensor) -> None:
    """Read one tensor in chunks, each rounded to the target's dtype."""
    path, tensor = source
    stored = DTYPES[tensor.dtype]
    chunk = _CHUNK_BYTES // stored.itemsize
    scratch = None if stored == target.dtype else torch.empty(min(chunk, target.numel()), dtype=stored)
    with open_regular(path.resolve()) as file:
        for start in range(0, target.numel(), chunk):
            part = target[start : start + chunk]
            read = part if scratch is None else scratch[: part.numel()]
            read_into(file, tensor.position + start * stored.itemsize, tensor_bytes(read))
            if scratch is not None:
                part.copy_(read)


@dataclass(frozen=True)
class Converter:
    """Reads parameters of a checkpoint whose names or tensors must be converted: transformers does so, once per
    node."""

    layout: Layout
    files: ModelFiles | None
    path: str
    trust_remote_code: bool
    notes: tuple[str, ...] = ()
    """Messages to the user about the files."""

    @functools.cached_property
    def _state(self) -> dict[str, torch.Tensor]:
        state, missing = converted_state(self.path, self.layout.dtype, self.trust_remote_code)
        if missing:
            raise UnusableWeights(f"model.path: {self.path}: tensor {missing[0]} is missing" + _and_more(missing))
        return state

    def loader(self) -> Callable[[str, torch.Tensor], Any]:
        state = self._state
        return lambda name, target: target.copy_(state[name].view(-1))

    def buffers(self) -> dict[str, torch.Tensor]:
        return {name: self._state[name] for name in self.layout.buffers}

    def check_finite(self) -> None:
        """Raise UnusableWeights for a tensor that is not finite in the run's dtype. Reads all of them."""
        if self.files is not None:
            _check_finite(self.path, self.files.tensors, self.layout.dtype)
            return
        for name in self.layout.shapes:
            refuse_nonfinite(self.path, name, self._state[name])

    def check_unchanged(self) -> None:
        """Do nothing: all values are in memory already."""

    def obstacle_to_mapping(self) -> str | None:
        return "their tensors must be converted"


@dataclass
class Given:
    """Takes the values of parameters from a function, which fills a flat tensor with the parameter of that name."""

    fill: Callable[[str, torch.Tensor], Any]
    path: str
    """Name of the model in messages."""
    files: None = None

    def loader(self) -> Callable[[str, torch.Tensor], Any]:
        return self.fill

    def buffers(self) -> dict[str, torch.Tensor]:
        return {}

    def check_unchanged(self) -> None:
        """Do nothing: there are no files."""

    def obstacle_to_mapping(self) -> str | None:
        return "there are none"


def combine(layout: Layout, hashes: Mapping[str, bytes]) -> str:
    """Digest of all parameters from the hashes of each one's bytes in the layout's dtype."""
    digest = xxhash.xxh3_128(str(layout.dtype).encode())
    for name in sorted(hashes):
        digest.update(name.encode() + hashes[name])
    return digest.hexdigest()
