"""A new method is one file: in a family folder of safecl it has the file's name, anywhere else its module's."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from tests.engine.scenes import tiny_model
from tests.methods import scenes

STEPS = 3

DROPPED_IN = '''
"""Stops the training, and replays rows of its own stream."""

from collections.abc import Sequence
from typing import ClassVar

from safecl.config import MethodConfig
from safecl.methods import base


class Config(MethodConfig):
    """Scales gradients."""

    needs_memory: ClassVar[bool] = True

    factor: float = 0.0
    """Factor of the gradient."""


class Method(base.Method[Config]):
    def replay_terms(self) -> list[base.ReplayTerm]:
        return [base.ReplayTerm("dropped_in", ce_weight=1.0)]

    def transform_gradient(self, run: base.Run, shards: Sequence[base.Shard]) -> None:
        for shard in shards:
            shard.grad.mul_(self.config.factor)
'''

OUTSIDE = '''
"""Halves the weights after every step, and logs their distance to the start."""

from collections.abc import Sequence
from typing import ClassVar

from safecl.config import MethodConfig
from safecl.methods import base


class Config(MethodConfig):
    """Halves the weights."""

    state_kinds: ClassVar[tuple[str, ...]] = ("anchor",)


def moved(shard: base.Shard):
    return shard.param - shard.state["start"]


class Method(base.Method[Config]):
    def start_task(self, run: base.Run) -> None:
        run.set_anchor("start", moving=True)

    def after_update(self, run: base.Run, shards: Sequence[base.Shard]) -> None:
        for shard in shards:
            shard.param.mul_(0.5)
        (square,) = run.dots(shards, [(moved, moved)])
        run.log(f"{float(square.sqrt()):.6f}")
'''


@pytest.fixture
def folders(tmp_path):
    """A folder that joins a family of safecl, and one on the path of imports."""
    for folder, name, source in (("family", "dropped_in", DROPPED_IN), ("elsewhere/outside", "method", OUTSIDE)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"{name}.py").write_text(source)
    return tmp_path / "family", tmp_path / "elsewhere"


def train_with_new_methods(family: str, elsewhere: str, **changes):
    """Trains on this rank with both folders in their places, and takes them out again."""
    from safecl.config import method_registry as registry

    package = importlib.import_module("safecl.methods.projections")
    package.__path__.append(family)
    sys.path.insert(0, elsewhere)
    registry._modules.cache_clear()
    try:
        assert "dropped_in" in registry.builtin_methods()
        config = scenes.run_config(**changes)
        memory = scenes.random_dataset(20, seed=2)
        run, (task,) = scenes.make_run(config, tiny_model(), [scenes.random_dataset(60, seed=1)], memory)
        said: list[str] = []
        run.log = said.append
        run.begin_task(task, active=True)
        losses = [run.train_step(task).totals() for _ in range(STEPS)]
        return scenes.state_of(run)["weights"], losses, said
    finally:
        package.__path__.remove(family)
        sys.path.remove(elsewhere)
        registry._modules.cache_clear()
        for name in ("safecl.methods.projections.dropped_in", "outside.method", "outside"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_method_is_one_file_inside_or_outside_of_safecl(rank_pool, folders, stage):
    def run(**methods):
        family, elsewhere = map(str, folders)
        return rank_pool(2).run(
            train_with_new_methods, family=family, elsewhere=elsewhere, methods=methods, deepspeed={"stage": stage}
        )[0]

    start = {name: p.detach() for name, p in tiny_model().named_parameters()}

    moved, _, _ = run(dropped_in={"factor": 1.0})
    assert any(not torch.equal(moved[name], start[name]) for name in start)

    stopped, losses, _ = run(dropped_in={})
    assert all(torch.equal(stopped[name], start[name]) for name in start), "the gradient was scaled to 0"
    assert all("dropped_in" in step for step in losses), "its own stream was replayed"

    halved, _, said = run(**{"dropped_in": {}, "outside.method": {}})
    assert all(torch.equal(halved[name], start[name] * 0.5**STEPS) for name in start)
    norm = torch.cat([value.double().flatten() for value in start.values()]).norm()
    assert [float(line) for line in said] == pytest.approx(
        [float(norm) * (1 - 0.5**step) for step in range(1, STEPS + 1)], rel=1e-4
    )
