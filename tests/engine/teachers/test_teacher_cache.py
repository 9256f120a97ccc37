"""The shared cache of teacher outputs: written on any number of ranks, continued, and used by training."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from safecl.config import ConfigError, DeepSpeedConfig, RunConfig
from safecl.engine.artifacts import teacher_outputs
from safecl.replay import CacheHeader, CacheReader, ReplayError, SharedOutputs
from tests.engine.passes.oracle import relative_distance
from tests.engine.scenes import VOCAB, build_run, random_dataset, run_config, state_of, tiny_model

HEADER = CacheHeader("model", "tokenizer", VOCAB, k=8)
DER = {"der": {"alpha": 1.0, "beta": 0.5}}


def forward_engine(stage: int):
    from safecl.distributed import collectives
    from safecl.engine.model.language_model import LanguageModel
    from safecl.engine.passes.forward_engine import ForwardEngine
    from safecl.engine.passes.micro_batches import MicroBatchLayout

    collectives.init_distributed()
    layout = MicroBatchLayout(collectives.world_size(), 64, packed=True)
    with contextlib.redirect_stdout(io.StringIO()):
        return ForwardEngine(LanguageModel(tiny_model()), layout, dtype="fp32", sharding=DeepSpeedConfig(stage=stage))


def build(folder: str, stage: int = 2, num_rows: int = 20, header: CacheHeader = HEADER) -> int:
    """Writes the outputs of the first rows; returns how many this rank wrote."""
    from unittest import mock

    from safecl.replay import CacheWriter

    written, add = [], CacheWriter.add
    with mock.patch.object(CacheWriter, "add", lambda self, ids, *rest: (written.extend(ids), add(self, ids, *rest))):
        rows = random_dataset(20, seed=2).select(np.arange(num_rows))
        teacher_outputs.write_outputs(forward_engine(stage), rows, header, Path(folder))
    return len(written)


def contents(folder: Path, header: CacheHeader = HEADER) -> dict[int, list[np.ndarray]]:
    reader = CacheReader(folder, header)
    assert reader.verify() == []
    return {int(i): [*vars(reader.get(int(i))).values(), np.array(reader.prior_nll(int(i)))] for i in reader.row_ids()}


def test_the_cache_is_the_same_from_one_rank_and_from_two_in_zero_3(rank_pool, tmp_path):
    rank_pool(1).run(build, folder=str(tmp_path / "one"))
    written = rank_pool(2).run(build, folder=str(tmp_path / "two"), stage=3)
    assert sum(written) == 20 and min(written) > 0
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys() == set(random_dataset(20, seed=2).row_ids.tolist())
    for row_id, parts in one.items():
        # where two log-probabilities differ by rounding alone their order may differ, not the values
        for a, b in zip((parts[0], parts[2], parts[3]), (two[row_id][0], two[row_id][2], two[row_id][3]), strict=True):
            assert np.allclose(a.astype(float), b.astype(float), atol=2e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_cache_holds_the_models_outputs_and_its_loss_at_temperature_1(rank_pool, tmp_path, temperature):
    header = CacheHeader("model", "tokenizer", VOCAB, k=8, temperature=temperature)
    rank_pool(1).run(build, folder=str(tmp_path), header=header)
    model, data = tiny_model().double(), random_dataset(20, seed=2)
    for i, (log_probs, indices, log_tail, nll) in enumerate(contents(tmp_path, header).values()):
        row = data.row(i)
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0, :-1]
        logits = logits[torch.from_numpy(row.loss_mask[1:].copy())]
        expected, order = (logits / temperature).log_softmax(-1).sort(-1, descending=True)
        assert np.allclose(log_probs, expected[:, :8], atol=4e-3) and np.array_equal(indices[:, 0], order[:, 0])
        assert np.allclose(log_tail, expected[:, 8:].logsumexp(-1), atol=1e-5)
        targets = torch.from_numpy(row.input_ids[row.loss_mask].astype(np.int64))
        assert float(nll) == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)), abs=1e-5)


def test_a_build_goes_on_where_it_was_stopped_and_takes_in_further_rows(rank_pool, tmp_path):
    assert rank_pool(1).run(build, folder=str(tmp_path), num_rows=7) == [7]
    assert sum(rank_pool(2).run(build, folder=str(tmp_path), num_rows=20)) == 13
    assert len(contents(tmp_path)) == 20
    assert rank_pool(1).run(build, folder=str(tmp_path)) == [0]


def train(folder: str, shared: bool, steps: int = 6, **changes) -> dict:
    """State and losses of a run of DER whose outputs are in a shared cache, or in the memory itself."""
    from safecl.distributed import collectives
    from safecl.training.replay_memory import fill_memory

    config, rows = run_config(methods=DER, **changes), random_dataset(20, seed=2)
    run, task = build_run(config)
    outputs = None
    if shared:
        teacher_outputs.write_outputs(run.engine, rows, HEADER, Path(folder) / "cache")
        collectives.barrier()
        outputs = SharedOutputs(Path(folder) / "cache", HEADER)
    run.memory = fill_memory(
        run.engine,
        rows,
        config.memory,
        seed=3,
        source="test",
        with_teacher=True,
        folder=Path(folder) / "memory",
        shared=outputs,
    )
    run.begin_task(task, active=True)
    losses = [run.train_step(task).totals() for _ in range(steps)]
    sizes = run.memory.buffer.table["nbytes"].sum()
    run.memory.buffer.close()
    return state_of(run) | {"losses": losses, "bytes": int(sizes)}


@pytest.mark.parametrize(("stage", "world_size"), [(2, 1), (3, 2)])
def test_training_from_the_cache_is_training_from_outputs_in_the_memory(rank_pool, tmp_path, stage, world_size):
    arguments = dict(deepspeed={"stage": stage})
    own = rank_pool(world_size).run(train, folder=str(tmp_path / "own"), shared=False, **arguments)[0]
    shared = rank_pool(world_size).run(train, folder=str(tmp_path / "shared"), shared=True, **arguments)[0]
    start = {name: p.detach() for name, p in tiny_model().named_parameters()}
    assert relative_distance(own["weights"], shared["weights"], start) < 1e-5
    assert shared["bytes"] < own["bytes"] / 3, "the outputs are not stored twice"


def test_outputs_that_are_gone_or_made_with_another_model_are_told(rank_pool, tmp_path):
    rank_pool(1).run(build, folder=str(tmp_path / "cache"))
    SharedOutputs(tmp_path / "cache", HEADER).link(tmp_path / "memory")
    assert SharedOutputs.of(tmp_path / "memory")(2001, 1) is not None
    other = CacheHeader("another", "tokenizer", VOCAB, k=8)
    with pytest.raises(ConfigError, match="model model in the cache, another in this run"):
        SharedOutputs(tmp_path / "cache", other)(2001, 1)
    (tmp_path / "cache").rename(tmp_path / "moved")
    with pytest.raises(ReplayError, match="are gone; `safecl memory cache` builds them again"):
        SharedOutputs.of(tmp_path / "memory")(2001, 1)


def test_outputs_are_asked_for_by_methods_guards_and_draws_that_need_them():
    tree = {"model": {"path": "m"}, "tasks": [{"name": "t", "train": "t"}], "output": "o", "memory": {"source": "s"}}

    def needs(methods=None, **memory) -> bool:
        changed = tree | {"methods": methods or {}, "memory": tree["memory"] | memory}
        return teacher_outputs.needs_outputs(RunConfig.model_validate(changed))

    assert (
        not needs({"er": {}})
        and not needs({"er": {}}, draw="loss_aware")
        and not needs({"er": {}}, guard={"flag_tag": "bad"})
    )
    assert needs({"der": {}}) and needs({"er": {}}, draw="mix_cd") and needs({"er": {}}, guard={"max_nll": 3.0})


def build_parts(folder: str, parts: list[list[int]]) -> None:
    """Write the outputs of these rows in several builds, each on the rows that are missing then."""
    for rows in parts:
        chosen = random_dataset(20, seed=2).select(np.array(rows))
        teacher_outputs.write_outputs(forward_engine(2), chosen, HEADER, Path(folder))


def test_outputs_do_not_depend_on_the_builds_that_they_come_from(rank_pool, tmp_path):
    """A build that was killed anywhere, and another memory that came first, leave no trace in the numbers."""
    whole = [list(range(20))]
    rank_pool(1).run(build_parts, folder=str(tmp_path / "whole"), parts=whole)
    expected = contents(tmp_path / "whole")
    for number, first in enumerate(([0], [3, 1, 19], list(range(7)), list(range(1, 20, 2)))):
        for ranks in (1, 2):
            folder = tmp_path / f"{number}-{ranks}"
            rank_pool(ranks).run(build_parts, folder=str(folder), parts=[first, *whole])
            found = contents(folder)
            assert found.keys() == expected.keys()
            for row_id, parts in expected.items():
                assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(parts, found[row_id], strict=True))
