"""The rows of a task: a part of them, and rows of earlier tasks mixed in."""

from __future__ import annotations

import json

import numpy as np
import pytest

from safecl.config import validate_tree
from safecl.data import DataError
from safecl.data.config_rows import part_of, prepare_task
from safecl.demo.model import train_tokenizer


@pytest.fixture
def tree(tmp_path, monkeypatch) -> dict:
    monkeypatch.setenv("SAFECL_CACHE", str(tmp_path / "cache"))
    for name, count in (("a", 20), ("b", 11), ("poison", 9)):
        rows = [{"prompt": f"{name} {number}", "completion": f"answer {number}"} for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"path": "unused"},
        "tasks": [{"name": name, "train": str(tmp_path / f"{name}.jsonl")} for name in "ab"],
        "output": str(tmp_path / "run"),
    }


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a b poison answer 0 1 2 3 4 5 6 7 8 9"], vocab_size=300)


def rows_of(tree: dict, tokenizer, number: int, **changes):
    tasks = [dict(task) for task in tree["tasks"]]
    tasks[number] |= changes
    config = validate_tree(tree | {"tasks": tasks}, "run.yaml")
    return prepare_task(config, config.tasks[number], tokenizer)


def test_parts_are_disjoint_make_up_the_whole_and_hold_poison_of_their_own(tree, tokenizer, tmp_path):
    whole = set(rows_of(tree, tokenizer, 0)[0].row_ids.tolist())
    parts = [rows_of(tree, tokenizer, 0, part=[k, 3])[0].row_ids.tolist() for k in (1, 2, 3)]
    assert sorted(map(len, parts)) == [6, 7, 7] and set().union(*parts) == whole
    tree["poison"] = {"ratio": 0.25, "source": str(tmp_path / "poison.jsonl")}
    (one, poisoned), (two, _) = (rows_of(tree, tokenizer, 0, part=[k, 2]) for k in (1, 2))
    assert poisoned == 3 and len(one) == 13
    assert set(one.row_ids.tolist()[-3:]) != set(two.row_ids.tolist()[-3:])


def test_parts_are_a_function_of_seed_and_rows():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 2**62, 50).astype(np.uint64)
    assert part_of(ids, 4, seed=1).tolist() == part_of(ids, 4, seed=1).tolist() != part_of(ids, 4, seed=2).tolist()
    assert sorted(np.bincount(part_of(ids, 4, seed=1))[1:].tolist()) == [12, 12, 13, 13]


def test_a_share_of_each_earlier_tasks_rows_is_mixed_in(tree, tokenizer):
    first, second = (set(rows_of(tree, tokenizer, number)[0].row_ids.tolist()) for number in (0, 1))
    mixed, _ = rows_of(tree, tokenizer, 1, mix=0.25)
    assert len(mixed) == 11 + 5 and second < set(mixed.row_ids.tolist()) < first | second
    assert rows_of(tree, tokenizer, 0, mix=0.25)[0].row_ids.tolist() == rows_of(tree, tokenizer, 0)[0].row_ids.tolist()


def test_an_empty_part_is_told(tree, tokenizer):
    with pytest.raises(DataError, match=r"task b: no row of .*b.jsonl is in part 12 of 12; make fewer parts"):
        rows_of(tree, tokenizer, 1, part=[12, 12])
