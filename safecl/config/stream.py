"""Streams of tasks: the tasks of a config come again and again, each time with another part of their rows.

    recurring   every round has all tasks in their order
    power_law   task i of the config, counted from 1, comes about c / i^exponent times, in an order drawn by the seed

A task that comes n times has its rows cut into n parts, which are disjoint and about equal. A stream is written out
when the config is read: a run's own config.yaml has the tasks one by one, named `name.1`, `name.2` and so on."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from safecl.config.base import Section


class StreamConfig(Section):
    """A stream in which tasks recur, each time with another part of their rows."""

    kind: Literal["recurring", "power_law"] = "recurring"
    """recurring: rounds of all tasks; power_law: the first task comes most often, the last one least."""
    rounds: Annotated[int, Field(ge=1, le=1000)] = 2
    """recurring only: number of rounds."""
    length: Annotated[int, Field(ge=1, le=1000)] = 10
    """power_law only: number of tasks in the stream, about: each comes at least once."""
    exponent: Annotated[float, Field(ge=0)] = 1.0
    """power_law only: task i comes about 1 / i^exponent as often as the first."""
    seed: int = 0
    """power_law only: decides the order."""

    def order(self, num_tasks: int) -> list[int]:
        """Return the tasks of the stream, by their number in the config."""
        if self.kind == "recurring":
            return list(range(num_tasks)) * self.rounds
        shares = [(number + 1) ** -self.exponent for number in range(num_tasks)]
        counts = [max(1, round(self.length * share / sum(shares))) for share in shares]
        found = [number for number, count in enumerate(counts) for _ in range(count)]
        random.Random(self.seed).shuffle(found)
        return found


def with_stream(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's tree with its stream written out as tasks. A tree with a mistake in either stays as it is, for
    the check of the whole to report it."""
    given, tasks = tree.get("stream"), tree.get("tasks")
    if given is None or not isinstance(tasks, Sequence) or not all(_is_task(task) for task in tasks):
        return dict(tree)
    try:
        stream = StreamConfig.model_validate(given)
    except ValidationError:
        return dict(tree)
    first = [task for task in tasks if task.get("role") == "align"]
    recurring = [task for task in tasks if task.get("role") != "align"]
    order = stream.order(len(recurring))
    total, seen, written = Counter(order), Counter[int](), []
    for number in order:
        seen[number] += 1
        written.append(_occurrence(recurring[number], seen[number], total[number]))
    return {**tree, "tasks": [*first, *written], "stream": None}


def _is_task(task: Any) -> bool:
    return isinstance(task, Mapping) and isinstance(task.get("name"), str)


def _occurrence(task: Mapping[str, Any], number: int, total: int) -> dict[str, Any]:
    """Return a task's `number`-th occurrence of `total`. Its utility is measured as that of the first."""
    again = {key: value for key, value in task.items() if key != "eval" or number == 1}
    return {**again, "name": f"{task['name']}.{number}", "part": [number, total]}
