"""Rebasing onto a re-aligned base: against fp64 over whole state dicts, and the verb."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from safecl.cli import app
from safecl.config import ConfigError
from safecl.merging import merge
from tests.merging import models
from tests.merging.memory import merged
from tests.merging.test_safety import is_matrix, made


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("rebase")
    return lambda family="llama": made(family, root / family)


def rebased(name: str, old: torch.Tensor, new: torch.Tensor, tuned: torch.Tensor, how: str, rank: int) -> torch.Tensor:
    update, task = new - old, tuned - old
    if how == "columns" and is_matrix(name, task):
        u = torch.linalg.svd(update)[0][:, :rank]
        return new + 0.8 * (task - u @ u.T @ task)
    along = float((task * update).sum())
    if how != "none" and along < 0:
        task = task - along / float((update * update).sum()) * update
    return new + 0.8 * task


@pytest.mark.parametrize("family", list(models.FAMILIES))
@pytest.mark.parametrize("how", ["conflict", "columns", "none"])
def test_the_task_vector_is_added_to_the_new_base_off_the_safety_update(folders, family, how, tmp_path):
    given = folders(family)
    old, new, tuned = (models.exact(given[role]) for role in ("base", "safe", "tuned"))
    settings = {"scale": 0.8, "projection": how, "rank": 3, "dtype": "fp32"}
    merge("rebase", base=given["base"], aligned=given["safe"], tuned=given["tuned"], out=tmp_path / "out", **settings)
    found = models.state(tmp_path / "out")
    assert found.keys() == old.keys()
    for name, value in found.items():
        expected = rebased(name, old[name], new[name], tuned[name], how, 3)
        assert float((value - expected).norm() / (expected - new[name]).norm()) < 1e-4, name


def test_only_what_goes_against_the_update_is_taken_away():
    against = merged("rebase", [3.0, 4.0], base=[4.0, 4.0], aligned=[5.0, 4.0])
    assert against == {"x": [5.0, 4.0]}
    assert merged("rebase", [5.0, 6.0], base=[4.0, 4.0], aligned=[5.0, 4.0]) == {"x": [6.0, 6.0]}
    assert merged("rebase", [3.0, 4.0], base=[4.0, 4.0], aligned=[5.0, 4.0], projection="none") == {"x": [4.0, 4.0]}


def test_the_verb_rebases_and_says_how_much_of_the_task_is_left(folders, tmp_path):
    given, out = folders(), tmp_path / "out"
    pair = ["--old-base", given["base"], "--new-base", given["aligned"], "--tuned", given["tuned"], "-o", out]
    done = CliRunner().invoke(app, ["rebase", *map(str, pair), "scale=0.5"])
    assert done.exit_code == 0, done.output
    assert "of its length off the safety update" in done.output and (out / "config.json").is_file()
    merge("rebase", base=given["base"], aligned=given["aligned"], tuned=given["tuned"], out=tmp_path / "two", scale=0.5)
    found, expected = models.state(out), models.state(tmp_path / "two")
    assert all(value.equal(expected[name]) for name, value in found.items())


def test_equal_bases_and_adapters_are_refused(folders, tmp_path):
    given, out = folders(), tmp_path / "out"
    with pytest.raises(ConfigError, match="so there is no direction of alignment"):
        merge("rebase", base=given["base"], aligned=given["base"], tuned=given["tuned"], out=out)
    with pytest.raises(ConfigError, match=r"rebase.adapter_rank: .*leave adapter_rank out"):
        merge("rebase", base=given["base"], aligned=given["safe"], tuned=given["tuned"], out=out, adapter_rank=4)
    assert not list(tmp_path.iterdir())
