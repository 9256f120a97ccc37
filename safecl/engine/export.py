"""A Hugging Face model folder from the live model, parameter by parameter: no rank ever holds more than one file's worth of weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from safecl.engine import distributed
from safecl.engine.model import base_model
from safecl.engine.training import TrainingEngine

MAX_FILE_BYTES = 2 * 2**30


def save_model(engine: TrainingEngine, tokenizer, folder: Path, max_file_bytes: int = MAX_FILE_BYTES) -> None:
    """Writes the live weights in the model's dtype, config, generation config, tokenizer and chat template. A collective call.

    With LoRA the folder holds the adapter only. `AutoModelForCausalLM.from_pretrained(folder)` (or peft) loads it.
    """
    model = engine.module.model
    if distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "peft_config"):
        _save_adapter(engine, folder)
    else:
        _save_weights(engine, folder, max_file_bytes)
        if distributed.rank() == 0:
            model.config.save_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
    if distributed.rank() == 0:
        tokenizer.save_pretrained(folder)
    distributed.barrier()


def save_plain(engine: TrainingEngine, folder: Path, max_file_bytes: int = MAX_FILE_BYTES) -> None:
    """The live weights and the model's settings, nothing else: a folder for a teacher. Not for LoRA. A collective call."""
    if distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    _save_weights(engine, folder, max_file_bytes)
    if distributed.rank() == 0:
        engine.module.model.config.save_pretrained(folder)
    distributed.barrier()


def _full_tensors(engine: TrainingEngine):
    """(name, whole tensor on the CPU) of every parameter, gathered one at a time; the tensor is None on ranks other than 0."""
    for name, p in engine.module.model.named_parameters():
        with engine.shards.full_parameter(p):
            yield name, p.detach().to("cpu", copy=True).contiguous() if distributed.rank() == 0 else None


def _save_weights(engine: TrainingEngine, folder: Path, max_file_bytes: int) -> None:
    writer = _Writer(folder, max_file_bytes)
    for name, tensor in _full_tensors(engine):
        if tensor is not None:
            writer.add(name, tensor)
    if distributed.rank() == 0:
        for name, buffer in _saved_buffers(base_model(engine.module.model)):
            writer.add(name, buffer.detach().cpu().contiguous())
        writer.finish()


def _saved_buffers(model: torch.nn.Module):
    saved = set(model.state_dict().keys())
    return [(name, buffer) for name, buffer in model.named_buffers() if name in saved]


class _Writer:
    """safetensors files of bounded size with an index, in the layout of transformers."""

    def __init__(self, folder: Path, max_file_bytes: int):
        self.folder, self.max_file_bytes = folder, max_file_bytes
        self.files: list[dict[str, torch.Tensor]] = [{}]
        self.names: list[list[str]] = []
        self.pending_bytes = self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.pending_bytes and self.pending_bytes + size > self.max_file_bytes:
            self._flush()
        self.files[-1][name] = tensor
        self.pending_bytes += size
        self.total_bytes += size

    def _path(self, number: int) -> Path:
        return self.folder / f".model-{number:05d}.safetensors"

    def _flush(self) -> None:
        from safetensors.torch import save_file

        tensors = self.files.pop()
        self.names.append(list(tensors))
        save_file(tensors, self._path(len(self.names)), metadata={"format": "pt"})
        self.files.append({})
        self.pending_bytes = 0

    def finish(self) -> None:
        """Final names are known only when the number of files is."""
        self._flush()
        count = len(self.names)
        final = ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for number, name in enumerate(final):
            os.replace(self._path(number + 1), self.folder / name)
        for stale in self.folder.glob("model*.safetensors*"):
            if stale.name not in final:
                stale.unlink()
        if count > 1:
            weight_map = {name: final[number] for number, names in enumerate(self.names) for name in names}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _save_adapter(engine: TrainingEngine, folder: Path) -> None:
    trained = {name for name, p in engine.module.model.named_parameters() if p.requires_grad}
    state = {name: tensor for name, tensor in _full_tensors(engine) if tensor is not None and name in trained}
    if distributed.rank() == 0:
        engine.module.model.save_pretrained(folder, state_dict=state, safe_serialization=True)
