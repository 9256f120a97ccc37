"""Penalties restricted to some modules pull these and no others."""

from __future__ import annotations

import pytest

from tests.engine import scenes

SIGNS = {"sign_batches": 2, "rows_per_batch": 4}


def distances(**changes):
    """How far each weight is from the start after some steps."""
    run, task = scenes.make_run(scenes.run_config(**changes))
    start = {name: value.clone() for name, value in scenes.state_of(run)["weights"].items()}
    for _ in range(4):
        run.train_step(task)
    return {name: float((value - start[name]).norm()) for name, value in scenes.state_of(run)["weights"].items()}


@pytest.mark.parametrize("method", ["ewc", "online_ewc"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_scoped_fisher_penalty_is_that_of_the_chosen_modules_alone(rank_pool, method, stage):
    def run(modules):
        settings = {"strength": 500.0, "modules": modules, **SIGNS}
        return rank_pool(2).run(
            distances, methods={method: settings}, deepspeed={"stage": stage}, train={"learning_rate": 1e-3}
        )[0]

    everywhere, attention = run("all"), run("attention")
    plain = rank_pool(2).run(distances, methods={}, deepspeed={"stage": stage}, train={"learning_rate": 1e-3})[0]
    mlp = [name for name in plain if ".mlp." in name]
    chosen = [name for name in plain if ".self_attn." in name]
    assert sum(attention[name] for name in chosen) < 0.97 * sum(plain[name] for name in chosen)
    assert sum(abs(attention[name] - plain[name]) for name in mlp) < 0.2 * sum(
        abs(everywhere[name] - plain[name]) for name in mlp
    )


def test_a_scope_without_weights_is_told(rank_pool):
    with pytest.raises(AssertionError, match=r"methods\.ewc\.modules: no trained weight is named like \*\.nothing"):
        rank_pool(1).run(distances, methods={"ewc": {"modules": ["*.nothing"], **SIGNS}})
