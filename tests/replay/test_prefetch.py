"""Reading ahead."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch

from safecl.replay import Prefetcher, ReplayBuffer, pinned, prefetch
from tests.replay.samples import config, rows, same_row


def test_the_next_step_is_loaded_before_it_is_asked_for():
    loaded, steps = threading.Event(), []

    def load(step: int) -> int:
        steps.append((step, threading.current_thread().name.startswith("safecl-prefetch")))
        if step == 1:
            loaded.set()
        return step * 10

    with Prefetcher(load, stop=3) as fetch:
        assert fetch.get(0) == 0
        assert loaded.wait(10), "step 1 was not begun by itself"
        assert [fetch.get(step) for step in (1, 2)] == [10, 20]
    assert steps == [(0, True), (1, True), (2, True)]


def test_any_step_may_follow_and_load_never_runs_twice_at_once():
    inside, most = [], []

    def load(step: int) -> int:
        inside.append(step)
        most.append(len(inside))
        inside.pop()
        return step

    with Prefetcher(load) as fetch:
        assert [fetch.get(step) for step in (0, 1, 7, 3, 3, 4)] == [0, 1, 7, 3, 3, 4]
    assert max(most) == 1


def test_an_error_is_raised_by_the_step_that_it_belongs_to():
    def load(step: int) -> int:
        if step == 1:
            raise ValueError("no such rows")
        return step

    with Prefetcher(load) as fetch:
        assert fetch.get(0) == 0
        with pytest.raises(ValueError, match="no such rows"):
            fetch.get(1)
        assert fetch.get(2) == 2


def test_waiting_is_counted():
    gate = threading.Event()

    def load(step: int) -> int:
        gate.wait(0.05)
        return step

    with Prefetcher(load) as fetch:
        fetch.get(0)
        assert fetch.wait_seconds >= 0.05


def test_rows_fetched_ahead_are_those_of_the_draw():
    buffer, offered = ReplayBuffer(config()), rows(80)
    buffer.insert(offered)
    with Prefetcher(
        lambda step: [(key, buffer.get(key)) for key in buffer.draw(step, 200, "replay")], stop=20
    ) as fetch:
        for step in range(20):
            fetched = fetch.get(step)
            assert [key for key, _ in fetched] == buffer.draw(step, 200, "replay")
            assert all(same_row(row, offered[key]) for key, row in fetched)


@dataclasses.dataclass
class Batch:
    inputs: dict
    count: int


def test_pinning_reaches_every_tensor_and_leaves_the_rest(monkeypatch):
    touched = []
    monkeypatch.setattr(prefetch, "can_pin", lambda: True)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: touched.append(self) or self)
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    batch = pinned([Batch({"a": a, "more": (b, "text")}, 3), c, None])
    assert len(touched) == 3 and batch[0].count == 3 and batch[0].inputs["more"][1] == "text"
    monkeypatch.undo()
    if not torch.cuda.is_available():
        assert pinned(a) is a
