"""Teacher outputs on a task's rows, recorded before the task trains, so that no second model is needed.

A folder has one file per rank that wrote, and an index that is published last. Any rank of any number of ranks can read
any row:

    rank-00000.bin   the rows' outputs one after the other
    index.npy        int64 [rows, 3]: file, offset in bytes, tokens
    meta.json        the form of the outputs, and the rows

Bytes per token: hidden states take hidden_size * 2 in a bf16 run (4 in fp32) for each layer that is compared, and are
stored as computed, without rounding; outputs take 6 k + 4. Example: 10,000 rows of 300 tokens at hidden size 4,096 are
24.6 GB for all tokens of one layer; with k = 64 on 100 supervised tokens a row they are 0.39 GB. Files are
memory-mapped, so the page cache keeps what fits. Several nodes need a shared folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from safecl.config import ConfigError
from safecl.data import TokenDataset
from safecl.distributed import collectives
from safecl.engine.model.features import layer_numbers
from safecl.engine.passes.step_rows import count_tokens
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.engine.teachers.outputs import outputs_of_rows
from safecl.methods.terms import TaskTerm, Tokens
from safecl.replay import TeacherOutputs
from safecl.storage.durable import DamagedCheckpoint, map_array, open_regular, replace_file

TEACHER = "teacher"
"""Name of the run's subfolder for teacher data that only an unfinished run needs."""


@dataclass(frozen=True)
class Form:
    """The form of the recorded outputs."""

    task: str
    """The `task` argument of LanguageModel.forward."""
    settings: dict[str, Any]
    """Further arguments of LanguageModel.forward."""
    tokens: Tokens
    bytes_per_token: int
    dtype: torch.dtype

    @staticmethod
    def of(term: TaskTerm, engine: TrainingEngine) -> Form:
        model = engine.module
        if term.divergence == "hidden":
            dtype = next(model.parameters()).dtype
            layers = layer_numbers(term.layers, model.num_layers)
            size = model.text_settings.hidden_size * dtype.itemsize * max(1, len(layers))
            settings = {"layers": list(layers)} if layers else {}
            return Form("hidden", settings, term.tokens, size, dtype)
        k = min(term.k, model.text_settings.vocab_size)
        return Form("topk", {"k": k, "temperature": term.temperature}, "supervised", 6 * k + 4, torch.float16)

    def pack(self, output: dict[str, torch.Tensor]) -> bytes:
        if self.task == "hidden":
            return output["hidden"].to(self.dtype).contiguous().view(torch.uint8).numpy().tobytes()
        parts = output["log_probs"].half(), output["indices"].int(), output["log_tail"].float()
        return b"".join(part.contiguous().numpy().tobytes() for part in parts)

    def unpack(self, data: np.ndarray, num_tokens: int) -> TeacherOutputs | torch.Tensor:
        """Return hidden states [tokens, H], or top-k outputs."""
        data = data.copy()
        if self.task == "hidden":
            return torch.from_numpy(data).view(self.dtype).view(num_tokens, -1)
        k = self.settings["k"]
        log_probs, indices, log_tail = np.split(data, np.cumsum([2 * k * num_tokens, 4 * k * num_tokens]))
        return TeacherOutputs(
            log_probs.view(np.float16).reshape(-1, k), indices.view(np.int32).reshape(-1, k), log_tail.view(np.float32)
        )


class RecordedOutputs:
    """Reads a folder of `record_outputs`; `load(i)` returns the outputs of row i of the data set."""

    def __init__(self, folder: Path, form: Form):
        self.folder, self.form = folder, form
        self._index = map_array(folder / "index.npy")
        self._files: dict[int, np.ndarray] = {}
        self._refuse_torn()

    def _refuse_torn(self) -> None:
        """Raise DamagedCheckpoint where the index does not fit the files."""
        if self._index.dtype != np.int64 or self._index.ndim != 2 or self._index.shape[1] != 3:
            raise DamagedCheckpoint(f"{self.folder / 'index.npy'}: not int64 [rows, 3]")
        for number in np.unique(self._index[:, 0]).tolist():
            rows, path = self._index[self._index[:, 0] == number], _data_path(self.folder, number)
            end = int((rows[:, 1] + rows[:, 2] * self.form.bytes_per_token).max())
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
            if rows.min() < 0 or size < end:
                raise DamagedCheckpoint(f"{path}: {size:,} bytes long, {end:,} are recorded")

    def load(self, row: int) -> TeacherOutputs | torch.Tensor:
        """Return the outputs of the row's supervised tokens, or its hidden states [tokens, H] in the run's dtype."""
        number, offset, num_tokens = self._index[row].tolist()
        if number not in self._files:
            self._files[number] = np.memmap(_data_path(self.folder, number), np.uint8, mode="r")
        end = offset + num_tokens * self.form.bytes_per_token
        return self.form.unpack(self._files[number][offset:end], num_tokens)

    @property
    def num_bytes(self) -> int:
        return int(self._index[:, 2].sum()) * self.form.bytes_per_token

    def discard(self) -> None:
        """Remove the folder once all ranks are done with it. A collective call."""
        self._files.clear()
        collectives.barrier()
        if collectives.rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)


def teacher_folder(output: str, task: str, term: str) -> Path:
    """The folder of the teacher's outputs on a task's rows."""
    return Path(output) / TEACHER / re.sub(r"[^\w.-]+", "-", f"{task}-{term}")


def _data_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.bin"


def _meta(form: Form, dataset: TokenDataset) -> dict[str, Any]:
    settings = {"task": form.task, **form.settings, "all_tokens": form.tokens == "all", "dtype": str(form.dtype)}
    if form.tokens not in ("all", "supervised"):
        settings["tokens"] = form.tokens
    return settings | {"num_rows": len(dataset), "rows": dataset.key}


def record_outputs(engine: TrainingEngine, dataset: TokenDataset, term: TaskTerm, folder: Path) -> RecordedOutputs:
    """Write the current model's outputs on all rows into `folder`. A collective call.

    Raises ConfigError where the disk has too little room.
    """
    form = Form.of(term, engine)
    num_tokens = int(count_tokens(form.tokens, dataset.lengths, dataset.num_targets).sum())
    _refuse_full_disk(folder, num_tokens * form.bytes_per_token)
    if engine.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    collectives.barrier()
    written = _write_share(engine, dataset, form, _data_path(folder, engine.rank))
    index = np.zeros((len(dataset), 3), np.int64)
    for rank, part in enumerate(collectives.gather_objects([written])):
        index[part[:, 0]] = np.stack([np.full(len(part), rank), part[:, 1], part[:, 2]], axis=1)
    if engine.rank == 0:
        np.save(folder / "index.npy", index, allow_pickle=False)
        replace_file(folder / "meta.json", json.dumps(_meta(form, dataset)))
    collectives.barrier()
    return RecordedOutputs(folder, form)


def open_recorded(engine: TrainingEngine, dataset: TokenDataset, term: TaskTerm, folder: Path) -> RecordedOutputs:
    """Open the outputs that an interrupted run has recorded.

    Raises ConfigError where they are missing or belong to other rows.
    """
    form = Form.of(term, engine)
    try:
        found = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError, RecursionError):
        raise ConfigError(
            f"{folder}: the aligned model's recorded outputs are not there, so the run cannot resume; start it anew"
        ) from None
    if found != _meta(form, dataset):
        raise ConfigError(
            f"{folder}: these outputs were recorded of other rows or settings; resume with the same config, "
            "or start anew"
        )
    try:
        return RecordedOutputs(folder, form)
    except DamagedCheckpoint as damage:
        raise ConfigError(f"{damage}; the run cannot resume; start it anew") from None


def _write_share(engine: TrainingEngine, dataset: TokenDataset, form: Form, path: Path) -> np.ndarray:
    """Write this rank's rows; return int64 [its rows, 3]: row, offset, tokens."""
    written, offset = [], 0
    with path.open("wb") as file:
        for row, output in outputs_of_rows(engine, dataset, form.task, tokens=form.tokens, **form.settings):
            data = form.pack(output)
            file.write(data)
            written.append((row, offset, len(next(iter(output.values())))))
            offset += len(data)
    return np.array(written, np.int64).reshape(-1, 3)


def _refuse_full_disk(folder: Path, num_bytes: int) -> None:
    nearest = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(nearest).free
    if collectives.any_rank(free < num_bytes):
        raise ConfigError(
            f"{nearest}: recording the teacher's outputs on the task's rows needs {num_bytes / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free; use `tokens: supervised` or `form: output`, fewer rows, or another "
            "`output` folder"
        )
