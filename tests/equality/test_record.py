"""The comparison of recordings sees every field, and a recording holds nothing that a clock decides."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import save_file

from tests.equality.contents import contents_of
from tests.equality.record import compare, differences

STEP = {"step": 0, "loss/task": 1.5, "tokens_per_second": 7.0, "memory_bytes": 9}


def test_the_first_field_that_differs_is_told_first(capsys):
    before = {"runs": {"plain": {"metrics": [{"loss": 1.0}, {"loss": 2.0}], "model": "a"}}}
    after = {"runs": {"plain": {"metrics": [{"loss": 1.0}, {"loss": 2.5}, {"loss": 3.0}], "other": "b"}}}
    assert list(differences(before, after)) == [
        "runs > plain > metrics: 2 entries before, 3 after",
        "runs > plain > metrics[1] > loss: 2.0 before, 2.5 after",
        "runs > plain > model: 'a' before, None after",
        "runs > plain > other: None before, 'b' after",
    ]
    assert compare(before, after) == 1 and compare(before, before) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["4 fields differ", "every field is equal"]


def test_contents_are_numbers_and_bits_without_the_clock_and_the_place(tmp_path):
    save_file({"weight": np.arange(3, dtype=np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "metrics.jsonl").write_text(json.dumps(STEP) + "\n")
    (tmp_path / "results.json").write_text(json.dumps({"seconds": 3.5, "cost": {"memory_bytes": 4}}))
    (tmp_path / "link.json").write_text(json.dumps({"cache": f"{tmp_path}/cache"}))
    (tmp_path / "run.lock").write_text("process 1")
    found = contents_of(tmp_path, below=tmp_path)
    bits = found.pop("model.safetensors")["weight"]
    assert bits.startswith("F32 [3] ") and len(bits.split()[-1]) == 64
    assert found == {
        "link.json": {"cache": ".../cache"},
        "metrics.jsonl": [{"step": 0, "loss/task": 1.5}],
        "results.json": {"cost": {"memory_bytes": 4}},
    }
    save_file({"weight": np.array([0, 1, 2.0000002], dtype=np.float32)}, tmp_path / "model.safetensors")
    assert contents_of(tmp_path, below=tmp_path)["model.safetensors"]["weight"] != bits
