"""Checkpoints pass through host memory of a bounded size; their bytes do not depend on it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from safecl.config import ConfigError, validate_tree
from safecl.engine.checkpoint.staging import Staging, staging_bytes
from tests.engine.checkpoint import memory_scenes

SIZE = dict(hidden=64, layers=1, vocabulary=257)
PAGE = 4096


def passed_through(num_bytes: int, limit: int) -> tuple[bytes, Staging, int]:
    """(the bytes that arrive, the buffers, the number of copies)."""
    source = torch.arange(num_bytes, dtype=torch.int64).to(torch.uint8)
    staging, arrived, copies = Staging(limit, locked=False), bytearray(), []

    def copy(low: int, high: int, target: torch.Tensor) -> None:
        copies.append((low, high))
        target.copy_(source[low:high])

    staging.begin(num_bytes)
    reader = threading.Thread(target=lambda: [arrived.extend(block) for block in staging.blocks()])
    reader.start()
    staging.fill(num_bytes, copy)
    reader.join(20)
    assert bytes(arrived) == source.numpy().tobytes()
    return bytes(arrived), staging, len(copies)


@pytest.mark.parametrize("num_bytes", [0, 1, 3 * PAGE, 8 * PAGE, 8 * PAGE + 1, 25 * PAGE + 17])
def test_all_bytes_arrive_in_order_through_at_most_the_limit(num_bytes):
    _, staging, copies = passed_through(num_bytes, 8 * PAGE)
    assert staging.nbytes == staging_bytes(num_bytes, 8 * PAGE) <= max(8 * PAGE, 0)
    assert copies == (1 if 0 < num_bytes <= 8 * PAGE else -(-num_bytes // (4 * PAGE)))


def test_a_copy_that_fits_returns_before_anything_is_read():
    staging = Staging(8 * PAGE, locked=False)
    staging.begin(8 * PAGE)
    staging.fill(8 * PAGE, lambda low, high, target: target.zero_())
    assert sum(map(len, staging.blocks())) == 8 * PAGE


def test_a_writer_that_gives_up_lets_the_training_go_on():
    staging = Staging(8 * PAGE, locked=False)
    staging.begin(100 * PAGE)
    thread = threading.Thread(target=staging.fill, args=(100 * PAGE, lambda low, high, target: target.zero_()))
    thread.start()
    next(staging.blocks())
    staging.abandon()
    thread.join(20)
    assert not thread.is_alive()


def test_an_error_of_the_copy_reaches_the_writer():
    staging = Staging(8 * PAGE, locked=False)
    staging.begin(100 * PAGE)

    def fail(low: int, high: int, target: torch.Tensor) -> None:
        raise RuntimeError("CUDA error")

    with pytest.raises(RuntimeError, match="CUDA error"):
        staging.fill(100 * PAGE, fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        list(staging.blocks())


def files_of_a_save(folder: str, stage: int, staging: int) -> dict[str, str]:
    """Hashes of the ranks' files, by name."""
    from safecl.engine.checkpoint.format import read_manifest
    from safecl.engine.checkpoint.writing import CheckpointWriter

    run, task, writer = memory_scenes.build(folder, SIZE, stage)
    run.train_step(task)
    writer.close()
    writer = CheckpointWriter(run.engine.shards, run.engine.optimizer, writer.folder, staging=staging)
    for step in (1, 2):  # the second save uses the buffers again
        writer.save(step, keep=1, files={})
        assert writer.finish().problem is None
    assert writer._staging.nbytes <= max(staging, 2 * PAGE)
    manifest = read_manifest(Path(folder) / "checkpoints" / "step-00000002")
    writer.close()
    return {name: record.xxh3_128 for name, record in manifest.files.items()}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_checkpoint_in_small_pieces_has_the_bytes_of_one_in_a_single_copy(rank_pool, tmp_path, stage):
    whole, pieces = (
        rank_pool(2).run(files_of_a_save, folder=str(tmp_path / str(staging)), stage=stage, staging=staging)
        for staging in (2**30, 3 * PAGE)
    )
    assert whole == pieces and set(whole[0]) == {"rank-00000.safetensors", "rank-00001.safetensors"}


def test_a_staging_that_is_too_small_or_no_size_is_refused():
    tree = {"model": {"path": "m"}, "tasks": [{"name": "t", "train": "t.jsonl"}], "output": "out"}
    assert validate_tree({**tree, "checkpoint": {"staging": "512MiB"}}, "run.yaml").checkpoint.staging == "512MiB"
    for value, words in (("1KB", "too little; write 1MB or more"), ("2 gigs", "is not a size; write bytes like 500MB")):
        with pytest.raises(ConfigError, match=words):
            validate_tree({**tree, "checkpoint": {"staging": value}}, "run.yaml")
