"""The distance that a run has moved from the aligned model: the KL on the users' own rows at each measurement, and at
the end the distance of the weights, layer by layer.

The aligned model's outputs are kept in `aligned-outputs.npz` of the run folder until the run has its results: token ids
on users' rows are users' text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from safecl.config import ConfigError, DriftConfig
from safecl.data.order import keyed_hash
from safecl.evaluation.answers.divergence import ScoredRow, TopOutputs, divergence, top_outputs
from safecl.evaluation.answers.model import EvalModel
from safecl.evaluation.statistics.intervals import Mean
from safecl.planning.plans import RunPlan
from safecl.storage.durable import DamagedCheckpoint, read_arrays, write_arrays
from safecl.storage.model_records import model_files

FILE = "aligned-outputs.npz"
LAYER = re.compile(r"\.(\d+)\.")


class Drift:
    """Measures one run. Its methods are collective calls, unless they say otherwise."""

    def __init__(self, plan: RunPlan, settings: DriftConfig, folder: Path):
        """folder: the run folder."""
        self.path = folder / FILE
        self.rows = [row for task in plan.tasks if task.config.role != "align" for row in _sample(task, settings.rows)]
        self._aligned: list[TopOutputs] = []

    def measure(self, model: EvalModel, *, is_aligned: bool) -> Mean:
        """Return the mean KL to the aligned model, of the model in evaluation mode."""
        if is_aligned:
            self._aligned = top_outputs(model, self.rows)
            if model.rank == 0:
                self._save()
        return divergence(model, self.rows, self._aligned)

    def _save(self) -> None:
        parts: dict[str, Any] = {f"log_probs_{i}": row.log_probs for i, row in enumerate(self._aligned)}
        parts |= {f"indices_{i}": row.indices for i, row in enumerate(self._aligned)}
        write_arrays(self.path, parts)

    def reopen(self) -> None:
        """Read what this run kept before it was stopped. Not a collective call."""
        names = [(f"log_probs_{i}", f"indices_{i}") for i in range(len(self.rows))]
        try:
            kept = read_arrays(self.path, [name for pair in names for name in pair])
        except DamagedCheckpoint as damage:
            raise ConfigError(
                f"{damage}; safety.drift compares with the aligned model's outputs, which this file keeps, so the run "
                "cannot resume; start it anew"
            ) from None
        self._aligned = [TopOutputs(kept[log_probs], kept[indices]) for log_probs, indices in names]

    def finish(self) -> None:
        """Remove the file. Rank 0 calls it; not a collective call."""
        self.path.unlink(missing_ok=True)


def _sample(task: Any, count: int) -> list[ScoredRow]:
    """Choose rows of a task by their ids; a larger sample contains the smaller one."""
    chosen = np.sort(np.argsort(keyed_hash(task.dataset.row_ids, "drift", 0), kind="stable")[:count])
    rows = [task.dataset.row(int(i)) for i in chosen]
    return [ScoredRow(row.input_ids, row.loss_mask) for row in rows if row.num_targets]


def weight_drift(base: str, tuned: Path) -> dict[str, dict[str, float]]:
    """Compute ||w - w_0|| / ||w_0|| by layer of a saved model, in fp64. Not a collective call.

    base: folder or hub id of the model that the run began with. Tensors without a layer's number count by their last
    module's name ("embed_tokens", "norm", "lm_head"). Returns by layer `relative` and `absolute`; empty for adapters.
    """
    from safetensors import safe_open

    if not (tuned / "config.json").is_file():
        return {}
    files = [file for file in model_files(base) if file.suffix == ".safetensors"]
    places: dict[str, Path] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            places |= dict.fromkeys(opened.keys(), file)
    squares: dict[str, list[float]] = {}
    for file in sorted(tuned.glob("*.safetensors")):
        with safe_open(file, "pt") as new:
            for name in new.keys():
                if name not in places:
                    continue
                with safe_open(places[name], "pt") as old:
                    start = old.get_tensor(name)
                moved, size = _squares(new.get_tensor(name), start)
                total = squares.setdefault(_layer_of(name), [0.0, 0.0])
                total[0], total[1] = total[0] + moved, total[1] + size
    return {
        layer: {"relative": (moved / size) ** 0.5 if size else 0.0, "absolute": moved**0.5}
        for layer, (moved, size) in sorted(squares.items(), key=lambda item: _order(item[0]))
    }


def _squares(new: torch.Tensor, old: torch.Tensor) -> tuple[float, float]:
    old = old.double()
    return float((new.double() - old).square().sum()), float(old.square().sum())


def _layer_of(name: str) -> str:
    match = LAYER.search(name)
    return f"layer {match[1]}" if match else name.split(".")[-2]


def _order(layer: str) -> tuple[int, str]:
    return (int(layer.split()[1]), "") if layer.startswith("layer ") else (-1, layer)
