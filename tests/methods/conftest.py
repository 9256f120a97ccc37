"""The comparison of a run with weights that an independent loop has found."""

from __future__ import annotations

import pytest

from tests.engine.passes import oracle
from tests.methods import every_method
from tests.methods.fp64_scene import Weights


@pytest.fixture
def compare(rank_pool, tmp_path):
    """Compares a run with a method's settings with the expected weights."""

    def check(expected: Weights, start: Weights, stage: int = 3, others: dict | None = None, **methods) -> dict:
        found = rank_pool(2).run(
            every_method.train,
            method=None,
            folder=str(tmp_path),
            methods=methods,
            deepspeed={"stage": stage},
        )[0]
        assert oracle.relative_distance(found["state"]["weights"], expected, start) <= 1e-3
        for kind, state in (others or {}).items():
            assert oracle.relative_distance(found["state"][kind], state, start) <= 1e-3
        return found

    return check
