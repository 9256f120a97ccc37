"""`model.gradient_checkpointing: auto`: activations are recomputed only where half of a machine's memory is too little
without. The numbers do not depend on it."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from safecl.config import RunConfig, load_config
from safecl.planning.costs import memory_report
from safecl.planning.run_plan import plan_run
from tests.training.test_trainer import fit, tree


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    from safecl.demo.materials import write_materials

    folder = tmp_path_factory.mktemp("demo")
    write_materials(folder)
    return folder


def config(materials: Path, output: Path, value: bool | str, **changes) -> dict:
    model = {"path": str(materials / "random-model"), "dtype": "fp32", "gradient_checkpointing": value}
    train = {"max_steps": 3, "tokens_per_batch": 300, "tokens_per_microbatch": 512, "max_length": 96}
    train |= {"allow_few_steps": True}
    own = tree(materials, output, methods={"ewc": {"sign_batches": 2, "rows_per_batch": 4}}, train=train) | changes
    return own | {"model": model, "safety": None}


def test_activations_are_counted_only_where_a_bound_does_not_settle_it(materials, tmp_path, monkeypatch):
    plan = plan_run(RunConfig.model_validate(config(materials, tmp_path, "auto")))
    count = mock.Mock(side_effect=memory_report.shapes_of)
    monkeypatch.setattr(memory_report, "shapes_of", count)

    def needed(free: int) -> bool:
        monkeypatch.setattr(memory_report, "available_memory", lambda: free)
        return memory_report.has_to_recompute(plan)

    assert needed(2**20) and not needed(10**12) and not count.called
    monkeypatch.setattr(memory_report, "ACTIVATION_BYTES", 10**9)  # a bound that settles nothing
    assert not needed(10**12) and count.called


def settled(tree: dict, cache: str) -> bool | str:
    """Settle it on ranks that stand for a machine each, of which only the second has too little memory."""
    import os

    from safecl.distributed import collectives

    os.environ["SAFECL_CACHE"] = cache
    collectives.init_distributed()
    plan = plan_run(RunConfig.model_validate(tree))
    own = mock.patch.object(memory_report.environment, "local_rank", lambda: 0)
    needed = mock.patch.object(memory_report, "has_to_recompute", lambda plan: collectives.rank() == 1)
    with own, needed:
        return memory_report.settle_recomputing(plan).model.gradient_checkpointing


@pytest.mark.parametrize(("value", "chosen"), [("auto", True), (False, False)])
def test_all_ranks_recompute_where_one_machine_has_to(rank_pool, materials, tmp_path, value, chosen):
    asked = config(materials, tmp_path, value)
    assert rank_pool(2).run(settled, tree=asked, cache=str(materials / "cache")) == [chosen, chosen]


def test_a_run_writes_what_it_chose_and_its_weights_do_not_depend_on_it(rank_pool, materials, tmp_path):
    weights = {}
    for value in ("auto", True):
        folder = tmp_path / str(value)
        rank_pool(2).run(fit, tree=config(materials, folder, value), cache=str(materials / "cache"))
        weights[value] = (folder / "model" / "model.safetensors").read_bytes()
    assert load_config(tmp_path / "auto" / "config.yaml").model.gradient_checkpointing is False
    assert load_config(tmp_path / "True" / "config.yaml").model.gradient_checkpointing is True
    assert weights["auto"] == weights[True]
