"""The example and the sizes in docs/memory.md are right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from safecl.replay import ReplayBuffer
from tests.replay.samples import config, token_row, with_teacher

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"


def test_the_example_runs():
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S):
        exec(compile(block, str(PAGE), "exec"), {})


@pytest.mark.parametrize(
    ("k", "indices", "vocab"),
    [(0, "int32", None), (64, "int32", 150_000), (16, "packed", 60_000), (64, "packed", 150_000)],
)
def test_a_row_takes_the_bytes_of_the_formula(tmp_path, k, indices, vocab):
    index_bytes = 4 if indices == "int32" else 2 if vocab <= 2**16 else 3
    buffer = ReplayBuffer(config(teacher={"indices": indices}), tmp_path, vocab_size=vocab)
    offered = [token_row(i, length=64) for i in range(100)]
    buffer.insert(with_teacher(row, k=k, vocab=vocab) if k else row for row in offered)
    expected = sum(
        56 + -(-(4 * 64 + 8 + (m * (k * (2 + index_bytes) + 4) if k else 0)) // 8) * 8
        for m in (row.row.num_targets for row in offered)
    )
    on_disk = next(tmp_path.glob("*.segment")).stat().st_size
    assert expected < on_disk < expected + 300  # headers of the file and of its one block


def test_an_index_takes_75_bytes_a_row():
    buffer = ReplayBuffer(config())
    sizes = []
    for count in (2000, 2000):
        buffer.insert(token_row(i, length=4) for i in range(count))
        sizes.append(len(buffer.state_dict()["index"]))
    assert abs((sizes[1] - sizes[0]) / 2000 - 75) < 1
