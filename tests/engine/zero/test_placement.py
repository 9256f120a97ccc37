"""The places of anchor, Fisher and EMA change nothing but memory: in the store or beside the shard, in one piece or in
chunks."""

from __future__ import annotations

import itertools

import pytest
import torch

from safecl.distributed import devices
from safecl.engine.reference.store import ReferenceStore
from safecl.engine.zero.pieces import Hosted, Served, Stream
from safecl.engine.zero.placement import allocate, role_of
from safecl.engine.zero.shard import Shard
from safecl.kernels import page_locked
from tests.engine import scenes

STAGES = [(0, "none"), (1, "none"), (1, "cpu"), (2, "none"), (2, "cpu"), (3, "none"), (3, "cpu")]
SIGNS = {"sign_batches": 4, "rows_per_batch": 4}
METHODS = {
    "ewc": {"strength": 0.5, **SIGNS},
    "l2_sp": {"strength": 0.3, "modules": "attention"},
    "ema": {"decay": 0.9},
}


def deepspeed(stage: int, optimizer: str, reference: str) -> dict:
    offload = {"optimizer": optimizer, "parameters": optimizer if stage == 3 else "none", "reference": reference}
    return {"stage": stage, "offload": offload}


def train(path: str, steps: int = 3, dtype: str = "bf16", **changes):
    """Train from a model folder; return state, penalties by step, the number of the anchor's parts that differ from the
    file, and this rank's kinds of state."""
    from safecl.engine.reference.loading import load_model

    model = {"path": path, "dtype": dtype, "gradient_checkpointing": False}
    config = scenes.run_config(model=model, **changes)
    loaded, store = load_model(config.model)
    run, task = scenes.build_run(config, loaded, store)
    scenes.begin(run, task)
    shards, optimizer = run.engine.shards, run.engine.optimizer
    anchors, start = (
        optimizer.tensors("anchor"),
        ReferenceStore.open(path, dtype=store.dtype),
    )  # the run's own may be given back by now
    wrong = sum(
        not torch.equal(shards.view(f, anchors), start.tensor(f.name).view(-1)[f.offset : f.offset + f.length])
        for f in shards.fragments
    )
    penalties = [run.train_step(task).totals()["penalty"] for _ in range(steps)]
    kept = sorted(run.view.shards()[0].state)
    fishers = [shard.state["fisher"].dtype for shard in run.view.shards()] if optimizer.has("fisher") else []
    return {"state": scenes.state_of(run), "penalties": penalties, "wrong": wrong, "kept": kept, "fishers": fishers}


@pytest.mark.parametrize(
    ("stage", "optimizer", "dtype"), [*((*place, "bf16") for place in STAGES), (0, "none", "fp32"), (3, "none", "fp32")]
)
def test_an_anchor_in_the_store_gives_bitwise_the_steps_of_one_beside_the_shard(
    rank_pool, tmp_path, stage, optimizer, dtype
):
    scenes.tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    near, served = (
        rank_pool(2).run(
            train, path=str(tmp_path), dtype=dtype, methods=METHODS, deepspeed=deepspeed(stage, optimizer, reference)
        )
        for reference in ("none", "cpu")
    )
    for beside, read in zip(near, served, strict=True):
        assert "anchor" in beside["kept"] and "anchor" not in read["kept"]
        assert beside["wrong"] == read["wrong"] == 0
        assert beside["penalties"][0] == read["penalties"][0] == 0.0 < beside["penalties"][1]
        assert read["penalties"] == pytest.approx(beside["penalties"], rel=1e-5)
        for kind, values in beside["state"].items():
            assert all(torch.equal(read["state"][kind][name], value) for name, value in values.items()), kind
        assert set(read["fishers"]) == {torch.bfloat16 if dtype == "bf16" else torch.float32}


@pytest.mark.parametrize(
    "changes",
    [{"train": {"clip_scope": "total"}}, {"methods": {"ema": {"decay": 0.1, "write_back": "anchor", "every": 2}}}],
)
def test_norms_with_penalties_and_pulls_to_the_start_read_the_store_as_well(rank_pool, tmp_path, changes):
    scenes.tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    arguments = {"path": str(tmp_path), "methods": METHODS, **changes}
    near, served = (
        rank_pool(2).run(train, **arguments, deepspeed=deepspeed(3, "none", reference))[0]
        for reference in ("none", "cpu")
    )
    for name, value in near["state"]["weights"].items():
        assert torch.allclose(served["state"]["weights"][name], value, rtol=1e-5, atol=1e-7), name


def two_tasks(path: str, **changes):
    """Penalty of the first step of each task, and whether the second task's anchor is the first one's end."""
    from safecl.engine.reference.loading import load_model

    config = scenes.run_config(model={"path": path, "dtype": "bf16", "gradient_checkpointing": False}, **changes)
    loaded, store = load_model(config.model)
    run, task = scenes.build_run(config, loaded, store)
    scenes.begin(run, task)
    first = run.train_step(task).totals()["penalty"]
    run.train_step(task)
    run.end_task()
    ends = scenes.state_of(run)["weights"]
    run.begin_task(task, active=True)
    anchors = {name: run.engine.shards.read(name, run.engine.optimizer.tensors("online_anchor")) for name in ends}
    return first, run.train_step(task).totals()["penalty"], all(torch.equal(anchors[name], ends[name]) for name in ends)


@pytest.mark.parametrize(("stage", "optimizer"), [(0, "none"), (2, "none"), (3, "cpu")])
def test_the_penalty_is_exactly_zero_at_every_tasks_start(rank_pool, tmp_path, stage, optimizer):
    scenes.tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    methods = {"online_ewc": {"strength": 0.5, **SIGNS}}
    for first, second, is_the_end in rank_pool(2).run(
        two_tasks, path=str(tmp_path), methods=methods, deepspeed=deepspeed(stage, optimizer, "cpu")
    ):
        assert first == second == 0.0 and is_the_end


# --------------------------------------------------------------------------------------------------------------- chunks


class _Fragment:
    def __init__(self, name, offset, length, start):
        self.name, self.offset, self.length, self.start = name, offset, length, start


class _Store:
    """Two parameters; the shard holds a part of each, with padding between and behind."""

    pinned, dtype = False, torch.bfloat16
    tensors = {
        name: torch.randn(n, generator=torch.Generator().manual_seed(n)).to(torch.bfloat16)
        for name, n in (("a", 300), ("b", 70))
    }

    def tensor(self, name):
        return self.tensors[name]


FRAGMENTS = [_Fragment("a", 120, 180, 0), _Fragment("b", 0, 40, 210)]


def scattered_anchor() -> torch.Tensor:
    anchor = torch.zeros(257, dtype=torch.bfloat16)
    anchor[:180], anchor[210:250] = _Store.tensors["a"][120:300], _Store.tensors["b"][:40]
    return anchor


@pytest.mark.parametrize("chunk", [7, 100, 256, 257, 1000])
def test_a_pass_in_chunks_sees_every_element_once_and_carries_back_what_it_writes(chunk):
    stream = Stream(torch.device("cpu"), 257, chunk)
    shard = Shard(torch.arange(257.0), {"exp_avg": torch.arange(257.0) * 2}, stream)
    fisher, ema = torch.rand(257).to(torch.bfloat16), torch.rand(257)
    away = {"anchor": Served(_Store(), FRAGMENTS), "fisher": Hosted(fisher.clone()), "ema": Hosted(ema.clone())}
    seen = {kind: torch.full((257,), float("nan")) for kind in ("anchor", "fisher", "ema", "exp_avg")}
    for _ in range(2):  # buffers are used again
        for piece in stream.pieces(shard, ["anchor", "fisher", "ema", "exp_avg"], away, written=["ema"]):
            for kind, values in piece.state.items():
                seen[kind][piece.where] = values.float()
            piece.state["ema"].mul_(3.0)
            piece.state["fisher"].zero_()  # not among what is written
    assert torch.equal(seen["anchor"], scattered_anchor().float())
    assert torch.equal(seen["fisher"], fisher.float()) and torch.equal(away["fisher"].tensor, fisher)
    assert torch.equal(seen["exp_avg"], torch.arange(257.0) * 2)
    assert torch.equal(away["ema"].tensor, ema * 3.0 * 3.0)


@pytest.mark.parametrize(("chunk", "length"), [(100, 100), (1000, 257)])
def test_all_shards_of_a_rank_pass_through_the_same_two_buffers(chunk, length):
    """The memory plan counts two of them for each kind; stage 0 has a shard for each parameter."""
    stream, seen = Stream(torch.device("cpu"), 257, chunk), []
    for size in (30, 257, 120):
        shard, values = Shard(torch.zeros(size), {}, stream), torch.rand(size)
        pieces = list(stream.pieces(shard, ["ema"], {"ema": Hosted(values)}, written=[]))
        seen += [piece.state["ema"].data_ptr() for piece in pieces]
        assert torch.equal(pieces[-1].state["ema"], values[pieces[-1].where])
    ((kind, dtype), pair), *others = stream._buffers.items()
    assert (kind, dtype, others) == ("ema", torch.float32, []) and [buffer.numel() for buffer in pair] == [length] * 2
    assert set(seen) == {buffer.data_ptr() for buffer in pair}
    assert all(one != other for one, other in itertools.pairwise(seen)), "one is filled while the other is used"


def test_kinds_of_state_have_roles_by_their_names():
    roles = {
        kind: role_of(kind)
        for kind in ("anchor", "online_anchor", "fisher", "online_fisher", "ema", "exp_avg", "_new_fisher", "slow")
    }
    assert roles == {
        "anchor": "reference",
        "online_anchor": "reference",
        "fisher": "fisher",
        "online_fisher": "fisher",
        "ema": "ema",
        "exp_avg": None,
        "_new_fisher": None,
        "slow": None,
    }


@pytest.mark.parametrize(("place", "gpu"), [("none", True), ("cpu", True), ("none", False)])
def test_state_in_host_memory_is_page_locked_where_there_is_a_gpu(monkeypatch, place, gpu):
    locked = []
    monkeypatch.setattr(devices, "on_gpu", lambda: gpu)
    monkeypatch.setattr(page_locked._Mapping, "lock", lambda memory, address: locked.append(len(memory)))
    state = allocate(torch.zeros(5), torch.bfloat16, place)
    assert state.dtype == torch.bfloat16 and not state.any()
    assert locked == [10] * gpu


def test_deepspeed_locks_memory_of_exactly_the_size_that_it_needs(monkeypatch):
    from deepspeed.accelerator import get_accelerator

    from safecl.engine.zero import shards

    locked, accelerator = [], get_accelerator()
    for name in ("_torch_pin_memory", "_torch_empty_pinned"):
        monkeypatch.setattr(accelerator, name, getattr(accelerator, name), raising=False)
    monkeypatch.setattr(devices, "on_gpu", lambda: True)
    monkeypatch.setattr(page_locked._Mapping, "lock", lambda memory, address: locked.append(len(memory)))
    shards._lock_memory_exactly()
    values = torch.arange(1000)
    assert torch.equal(type(accelerator).__mro__[1].pin_memory(accelerator, values), values) and locked == [8000]
    assert accelerator._torch_empty_pinned(values, (3,)).shape == (3,) and locked == [8000, 24]


def locks_of_a_start() -> list[str]:
    """Whether DeepSpeed's locking is replaced, and whether DeepSpeed has begun, in order."""
    from unittest import mock

    import deepspeed

    from safecl.engine.zero import shards

    seen: list[str] = []
    begin = deepspeed.initialize

    def initialize(**options):
        seen.append("deepspeed")
        return begin(**options)

    with (
        mock.patch.object(shards, "_lock_memory_exactly", lambda: seen.append("exactly")),
        mock.patch.object(deepspeed, "initialize", initialize),
    ):
        scenes.make_run(scenes.run_config(memory=None, methods={}))
    return seen


def test_deepspeed_starts_when_its_locking_is_replaced(rank_pool):
    assert rank_pool(1).run(locks_of_a_start) == [["exactly", "deepspeed"]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("shard", "place"), [("cpu", "none"), ("cpu", "cpu"), ("cuda", "cpu")])
def test_offloaded_state_is_page_locked_host_memory(shard, place):
    state = allocate(torch.zeros(1000, device=shard), torch.float32, place)
    assert state.device.type == "cpu" and state.is_pinned() and not state.any()
