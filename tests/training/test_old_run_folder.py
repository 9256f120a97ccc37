"""The trainer resumes a run that an earlier safecl has left in the middle, and refuses one of another format.

tests/equality/stopped_run.py made the folder. Its run trains by DER, EWC and EMA, three tasks of 16 steps, on two ranks
in ZeRO stage 3, and SIGTERM stopped it after step 21. The folder `finished` holds the end that the same safecl reached.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from tests.equality.ranks import Ended
from tests.equality.stopped_run import memory_rows, train

FIXTURE = Path(__file__).parent.parent / "fixtures" / "run-format-1"
CHECKPOINT = "step-00000021"
STEPS_BEFORE, STEPS = 21, 48
COUNTED = ("step", "task", "tokens", "skipped_steps")
USAGE = 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the run and of all that it needs, at another place than the one where it began."""
    return Path(shutil.copytree(FIXTURE, tmp_path / "moved"))


def steps_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def difference(one: Path, other: Path) -> float:
    """The norm of the difference of two models, as a share of the norm of the second."""
    found, expected = load_file(one), load_file(other)
    assert found.keys() == expected.keys()
    apart = sum(torch.sum((found[name] - expected[name]).double() ** 2) for name in expected)
    return float((apart / sum(torch.sum(value.double() ** 2) for value in expected.values())).sqrt())


def check_the_end(folder: Path, ended: Ended, share: float) -> None:
    """The run went on at its checkpoint, saw the same rows, and has the stored weights up to a share of their norm."""
    assert set(ended.codes) == {0}, ended.said
    assert f"resuming from {CHECKPOINT}, step {STEPS_BEFORE}" in ended.said
    found, expected = steps_of(folder / "stopped/metrics.jsonl"), steps_of(folder / "finished/metrics.jsonl")
    assert found[:STEPS_BEFORE] == expected[:STEPS_BEFORE] and len(found) == len(expected) == STEPS
    for one, other in zip(found, expected, strict=True):
        assert one.keys() - {"time"} == other.keys()  # which the other safecl did not write
        assert [one[name] for name in COUNTED] == [other[name] for name in COUNTED]
        assert one["loss/task"] == pytest.approx(other["loss/task"], rel=100 * share)
    assert memory_rows(folder) == json.loads((folder / "finished/memory-rows.json").read_text(encoding="utf-8"))
    for name in ("model", "model-live"):
        assert difference(folder / f"stopped/{name}/model.safetensors", folder / f"finished/{name}.safetensors") < share


def test_a_stopped_run_of_format_1_goes_on_to_the_end_that_its_own_safecl_gave_it(folder):
    check_the_end(folder, train(folder), share=1e-5)


def test_a_stopped_run_of_format_1_goes_on_with_one_rank_and_nothing_sharded(folder):
    check_the_end(folder, train(folder, "deepspeed.stage=0", ranks=1), share=1e-5)


def test_a_run_of_another_format_is_refused_with_both_versions_and_left_as_it_is(folder):
    """The message names the version that is there and the version that this safecl reads."""
    checkpoint = folder / "stopped" / "checkpoints" / CHECKPOINT
    give_version(checkpoint / "manifest.json", 3)
    ended = train(folder, ranks=1)
    assert ended.codes == [USAGE], ended.said
    said = " ".join(ended.said.split())
    assert "safecl-checkpoint version 3, this safecl reads safecl-checkpoint versions 1 and 2" in said
    assert [path.name for path in sorted(checkpoint.parent.iterdir())] == ["latest", CHECKPOINT]


def give_version(manifest: Path, version: int) -> None:
    """Changes the version of a manifest, and the hash of its text in the first line."""
    tree = json.loads(manifest.read_bytes().partition(b"\n")[2])
    assert tree["version"] != version
    body = json.dumps(tree | {"version": version}, indent=1, sort_keys=True).encode()
    manifest.write_bytes(xxhash.xxh3_128_hexdigest(body).encode() + b"\n" + body)
