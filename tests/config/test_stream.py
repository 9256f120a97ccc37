"""A stream is written out as tasks when a config is read, and reads back as these tasks."""

from __future__ import annotations

from collections import Counter

import pytest
import yaml

from safecl.config import ConfigError, RunConfig, dump_config, validate_tree
from safecl.config.stream import StreamConfig

TREE = {
    "model": {"path": "m"},
    "tasks": [{"name": name, "train": f"{name}.jsonl", "eval": {"path": f"{name}-eval.jsonl"}} for name in "abc"],
    "output": "runs/a",
}


def read(**changes) -> RunConfig:
    return validate_tree(TREE | changes, "run.yaml")


def test_recurring_tasks_come_in_rounds_each_with_a_part_of_its_rows():
    config = read(stream={"rounds": 2})
    assert [(task.name, task.part) for task in config.tasks] == [
        ("a.1", (1, 2)), ("b.1", (1, 2)), ("c.1", (1, 2)), ("a.2", (2, 2)), ("b.2", (2, 2)), ("c.2", (2, 2)),
    ]  # fmt: skip
    assert [task.eval is not None for task in config.tasks] == [True] * 3 + [False] * 3
    assert config.tasks[3].train == "a.jsonl" and config.stream is None


def test_a_power_law_makes_the_first_task_the_most_frequent():
    order = StreamConfig(kind="power_law", length=22, exponent=1.0).order(3)
    assert Counter(order) == {0: 12, 1: 6, 2: 4} and order != sorted(order)
    assert order == StreamConfig(kind="power_law", length=22).order(3)
    assert order != StreamConfig(kind="power_law", length=22, seed=1).order(3)
    assert Counter(StreamConfig(kind="power_law", length=4, exponent=9.0).order(3)) == {0: 4, 1: 1, 2: 1}
    config = read(stream={"kind": "power_law", "length": 22})
    assert {task.name for task in config.tasks} >= {"a.12", "b.6", "c.4"} and len(config.tasks) == 22
    assert config.tasks[-1].part is not None and config.tasks[-1].part[1] in (12, 6, 4)


def test_the_alignment_stage_comes_once_and_first():
    first = {"name": "alignment", "train": "r.jsonl", "role": "align"}
    config = read(tasks=[first, *TREE["tasks"]], stream={"rounds": 2})
    assert config.tasks[0].name == "alignment" and config.tasks[0].part is None and len(config.tasks) == 7


def test_a_written_config_has_the_tasks_and_no_stream():
    config = read(stream={"rounds": 2})
    assert validate_tree(yaml.safe_load(dump_config(config)), "config.yaml") == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": {"rounds": 0}}, r"stream\.rounds"),
        ({"stream": {"round": 2}}, r"stream"),
        ({"stream": {}, "tasks": [{"name": "a"}]}, r"tasks"),
        ({"tasks": [TREE["tasks"][0] | {"part": [3, 2]}]}, r"part: there is no part 3 of 2; the first is \[1, 2\]"),
    ],
)
def test_a_mistake_is_told(changes, message):
    with pytest.raises(ConfigError, match=message):
        read(**changes)
