"""The grid of a sweep: axes, cells, runs, and the overrides of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from safecl.config import ConfigError
from safecl.sweeping.axes import plan_runs, read_axes, split_values


def test_every_combination_is_a_run_and_seeds_are_runs_of_one_cell():
    axes = read_axes(["methods=balanced,ewc,plain", "train.seed=0,1", "poison.ratio=0,0.1"])
    runs = plan_runs(axes, Path("out"))
    assert len(runs) == 12 and len({run.folder for run in runs}) == 12
    assert list(dict.fromkeys(run.cell for run in runs))[:3] == [
        "balanced, ratio 0",
        "balanced, ratio 0.1",
        "ewc, ratio 0",
    ]
    assert runs[0].overrides == ("methods=balanced", "poison.ratio=0", "train.seed=0")
    assert runs[0].folder == Path("out/balanced-ratio-0-seed-0") and runs[0].seed == "0"
    assert {run.overrides[0] for run in runs} == {"methods=balanced", "methods={ewc: {}}", "methods={}"}


def test_methods_may_be_joined_and_a_sweep_may_have_no_seeds():
    (run,) = plan_runs(read_axes(["methods=der+ema"]), Path("out"))
    assert run.overrides == ("methods={der: {}, ema: {}}",) and run.seed is None and run.folder == Path("out/der+ema")
    (run,) = plan_runs(read_axes(["methods=my_package.my_method"]), Path("out"))
    assert run.overrides == ("methods={my_package.my_method: {}}",)
    (run,) = plan_runs(read_axes(["train.seed=3"]), Path("out"))
    assert run.cell == "run" and run.name == "run-seed-3"


def test_commas_in_brackets_and_quotes_separate_nothing():
    assert split_values("{a: [1,2]},'x,y',3") == ["{a: [1,2]}", "'x,y'", "3"]
    runs = plan_runs(read_axes(["methods={ewc: {strength: 1}, ema: {}},plain"]), Path("out"))
    assert runs[0].overrides == ("methods={ewc: {strength: 1}, ema: {}}",) and len(runs) == 2


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["train.seed"], "write key=value,value"),
        (["train.seed=1,,2"], "write key=value,value"),
        (["train.seed=1,1"], "1 is there twice"),
        (["a=1", "a=2"], "give all its values at once"),
        (["x='a b',a b"], "the folder"),
    ],
)
def test_an_axis_that_is_none_is_refused(axes, message):
    with pytest.raises(ConfigError, match=message):
        plan_runs(read_axes(axes), Path("out"))
