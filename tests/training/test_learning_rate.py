"""The learning rate of a step, and the share of replay over a task."""

from __future__ import annotations

import pytest

from safecl.config import TrainConfig
from safecl.config.memory import MemoryConfig
from safecl.training.steps.learning_rate import learning_rate


def rates(is_first: bool, steps: int = 100, **settings) -> list[float]:
    train = TrainConfig(learning_rate=1.0, **settings)
    return [learning_rate(train, step, steps, is_first=is_first) for step in range(steps)]


def test_the_infinite_schedule_warms_up_once_and_anneals_at_every_end():
    first, later = (rates(is_first, schedule="infinite", warmup_ratio=0.1) for is_first in (True, False))
    assert first[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert first[10] == pytest.approx(1.0) and first[60:85] == [0.55] * 25
    assert sorted(first[10:61], reverse=True) == first[10:61]
    assert first[35] == pytest.approx(0.55 + 0.45 / 2)
    assert later[:85] == [0.55] * 85 and later[85:] == first[85:]
    assert later[99] == pytest.approx(0.01) and later[86] / later[85] == pytest.approx(later[99] / later[98])


def test_other_schedules_do_not_know_which_task_it_is():
    for schedule in ("cosine", "linear", "constant"):
        assert rates(True, schedule=schedule) == rates(False, schedule=schedule)
    assert rates(True, schedule="infinite", steps=1) == [1.0]


def test_the_share_of_replay_moves_evenly():
    fixed = MemoryConfig(source="m.jsonl", replay_ratio=0.3)
    assert {fixed.replay_ratio_at(i / 7) for i in range(8)} == {0.3}
    moving = MemoryConfig(source="m.jsonl", replay_ratio=0.1, replay_ratio_end=0.5)
    assert [moving.replay_ratio_at(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.1, 0.3, 0.5])
    assert moving.largest_replay_ratio == pytest.approx(0.5)
