"""torch's compiler is loaded where something is compiled, and not when a run starts."""

from __future__ import annotations

import sys

import torch

from safecl.engine.zero.compiling import compiling_late
from tests.engine import scenes
from tests.pool import RankPool

COMPILER = "torch._inductor.compile_fx"


def loads_the_compiler(stage: int) -> bool:
    run, task = scenes.make_run(scenes.run_config(deepspeed={"stage": stage}))
    run.train_step(task).totals()
    return COMPILER in sys.modules


def test_a_run_starts_without_the_compiler():
    pool = RankPool(1, forked=True)
    try:
        assert [pool.run(loads_the_compiler, stage=stage) for stage in (2, 3)] == [[False], [False]]
    finally:
        pool.close()


def test_a_function_is_compiled_at_its_first_call(monkeypatch):
    compiled = []

    def compile_now(function, **options):
        compiled.append(options)
        return lambda value: function(value) + 10

    monkeypatch.setattr(torch, "compile", compile_now)
    with compiling_late():

        @torch.compile(dynamic=False)
        def double(value):
            return 2 * value

    assert torch.compile is compile_now and not compiled
    assert [double(1), double(2)] == [12, 14] and compiled == [{"dynamic": False}]
