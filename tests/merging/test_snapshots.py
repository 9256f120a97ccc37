"""Post-hoc averages from the checkpoints that a run has kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from safecl.config import ConfigError
from safecl.engine.checkpoint import format
from safecl.engine.model.dtypes import tensor_bytes
from safecl.merging import merge
from safecl.storage.durable import write_file
from tests.merging import models


def write_checkpoint(run: Path, step: int, kinds: dict[str, dict[str, torch.Tensor]]) -> Path:
    """A checkpoint of two ranks: each has a part of every parameter, in the format that safecl resumes from."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    files = {}
    for rank in range(2):
        values = {}
        for kind, state in kinds.items():
            for name, value in state.items():
                flat = value.float().flatten()
                cut = flat.numel() // 3
                offset, part = ((0, flat[:cut]), (cut, flat[cut:]))[rank]
                values[format.Slice(kind, name, offset, part.numel(), "F32")] = part
        placed = format.arrange(values)
        data = torch.cat([values[one] for one, _ in placed])
        files[format.rank_file(rank)] = format.write_slices(
            folder / format.rank_file(rank), placed, [tensor_bytes(data)]
        )
    shapes = {name: tuple(value.shape) for name, value in kinds["weights"].items()}
    manifest = format.Manifest(folder.name, step, 2, files, shapes, dict.fromkeys(kinds, "F32"))
    write_file(folder / format.MANIFEST, [format.dump_manifest(manifest)])
    return folder


@pytest.fixture
def run(parents, tmp_path):
    """A run folder of a base with three checkpoints, and their weights and averages."""
    model, folder = models.tiny("llama"), tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"path": str(parents()["base"])}}))
    kept = {}
    for step in (100, 200, 400):
        kinds = {"weights": models.moved(model, step), "ema": models.moved(model, step + 1)}
        kept[step] = (write_checkpoint(folder, step, kinds), kinds)
    return kept


def average(kept: dict, kind: str, factors: dict[int, float]) -> dict[str, torch.Tensor]:
    names = kept[100][1][kind]
    return {name: sum(x * kept[step][1][kind][name].double() for step, x in factors.items()) for name in names}


def factors_in(report) -> dict[int, float]:
    parts = report.notes[-1].removeprefix("factors of the snapshots: ").partition(";")[0].split(", ")
    return {int(part.split()[1].rstrip(":")): float(part.split()[2]) for part in parts}


@pytest.mark.parametrize("settings", [{}, {"profile": "ema", "decay": 0.99}], ids=["weights", "averages"])
def test_kept_checkpoints_are_averaged_in_the_names_and_dtype_of_the_base(run, parents, settings, tmp_path):
    report = merge(
        "post_hoc_ema",
        tuned=[folder for folder, _ in run.values()],
        out=tmp_path / "out",
        sigma_rel=0.2,
        dtype="fp32",
        **settings,
    )
    factors = factors_in(report)
    assert sum(factors.values()) == pytest.approx(1, abs=1e-3) and factors[400] > factors[100]
    expected = average(run, "ema" if settings else "weights", factors)
    for name, value in models.exact(tmp_path / "out").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
    merge("post_hoc_ema", tuned=[folder for folder, _ in run.values()], out=tmp_path / "same")
    found, base = models.state(tmp_path / "same"), models.state(parents()["base"])
    assert {n: (v.shape, v.dtype) for n, v in found.items()} == {n: (v.shape, v.dtype) for n, v in base.items()}
    assert (tmp_path / "same" / "tokenizer.json").read_bytes() == (parents()["base"] / "tokenizer.json").read_bytes()


def test_checkpoints_that_cannot_be_averaged_are_named(run, parents, tmp_path):
    first, second = run[100][0], run[200][0]
    with pytest.raises(ConfigError, match=r"step-00000100: is a checkpoint of a run, which soup does not take"):
        merge("soup", tuned=[first, second], out=tmp_path / "out")
    file = second / format.rank_file(1)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"rank-00001.safetensors: its bytes are not those that were written"):
        merge("post_hoc_ema", tuned=[first, second], out=tmp_path / "out")
    (first.parent.parent / "config.yaml").write_text(json.dumps({"model": {}}))
    with pytest.raises(ConfigError, match=r"config.yaml: does not name the run's base model"):
        merge("post_hoc_ema", tuned=[first, second], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
