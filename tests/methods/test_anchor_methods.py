"""L2-SP and online EWC, and what a sequence of tasks carries along, against plain PyTorch on two ranks."""

from __future__ import annotations

import functools
from fnmatch import fnmatchcase

import pytest
import torch

from tests.engine.passes import oracle
from tests.engine.passes.test_equality import memory_of
from tests.engine.scenes import random_dataset, run_config, tiny_model
from tests.methods import reference, scenes
from tests.methods.test_lwf import CHECKPOINTED, LORA
from tests.methods.test_replay_methods import task_rows

STEPS = 6
PATTERNS = ["*.self_attn.v_proj.*", "*.layers.1.mlp.*"]


def chosen(name: str, patterns) -> bool:
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


@functools.cache
def expected_l2_sp(strength: float, patterns: tuple = (), more: float = 0.0, clip_all: bool = False):
    """(start, end): a pull of `strength` of the chosen weights and of `more` of all, behind clipping or within it."""
    model = tiny_model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = task_rows(random_dataset(60, seed=1), STEPS)

    def pull(params):
        return {n: (strength * chosen(n, patterns) + more) * (p - start[n]) for n, p in params.items()}

    def join(step, grads):
        pulls = pull({n: p.detach() for n, p in model.named_parameters()})
        return {n: g + pulls[n] for n, g in grads.items()}

    losses = [lambda rows=rows: reference.mean_nll(model, rows) for rows in rows]
    return start, reference.train(model, losses, **({"transform": join} if clip_all else {"pull": pull}))


@pytest.mark.parametrize(
    ("stage", "methods", "train", "expected"),
    [
        (0, {"l2_sp": {"strength": 3.0}}, {}, dict(strength=3.0)),
        (2, {"l2_sp": {"strength": 3.0, "modules": PATTERNS}}, {}, dict(strength=3.0, patterns=tuple(PATTERNS))),
        (3, {"l2_sp": {"strength": 3.0, "modules": PATTERNS}}, {}, dict(strength=3.0, patterns=tuple(PATTERNS))),
        (1, {"l2_sp": {"strength": 3.0, "modules": "attention"}}, {}, dict(strength=3.0, patterns=("*.self_attn.*",))),
        (2, {"l2_sp": {"strength": 3.0, "modules": PATTERNS}}, {"clip_scope": "total"},
         dict(strength=3.0, patterns=tuple(PATTERNS), clip_all=True)),
    ],
)  # fmt: skip
def test_l2_sp_equals_plain_pytorch(rank_pool, stage, methods, train, expected):
    start, end = expected_l2_sp(**expected)
    found = rank_pool(2).run(
        scenes.train, steps=STEPS, memory=None, methods=methods, deepspeed={"stage": stage}, train=train
    )[0]
    assert oracle.relative_distance(found["weights"], end, start) <= 1e-3
    assert oracle.relative_distance(found["weights"], expected_l2_sp(0.0)[1], start) > 1e-2
    assert found["losses"][0]["penalty"] == 0.0 < found["losses"][1]["penalty"]


def train_two_pulls(stage: int, first_restricted: bool):
    """A restricted and an unrestricted pull in one step, either first."""
    from safecl.methods.terms import Penalty

    run, (task,) = scenes.make_run(
        run_config(memory=None, deepspeed={"stage": stage}), tiny_model(), [random_dataset(60, seed=1)]
    )
    run.begin_task(task, active=True)
    run.view.set_anchor()
    pulls = [Penalty(3.0, modules=tuple(PATTERNS)), Penalty(1.0)]
    run.penalties.of = lambda methods: pulls if first_restricted else pulls[::-1]
    for _ in range(STEPS):
        run.train_step(task)
    return {name: run.engine.shards.read(name) for name in run.engine.shards.shapes}


@pytest.mark.parametrize(("stage", "first_restricted"), [(2, True), (2, False), (0, False)])
def test_a_restricted_pull_adds_up_with_another_one(rank_pool, stage, first_restricted):
    start, end = expected_l2_sp(3.0, tuple(PATTERNS), more=1.0)
    found = rank_pool(2).run(train_two_pulls, stage=stage, first_restricted=first_restricted)[0]
    assert oracle.relative_distance(found, end, start) <= 1e-3


@functools.cache
def expected_l2_sp_of_adapters(strength: float, patterns: tuple = ()):
    """(start, end): the pull of the merged weights, from dense products."""
    model = scenes.with_adapters(tiny_model(), run_config(model=LORA))
    inner, scale = model.get_base_model(), LORA["lora"]["alpha"] / LORA["lora"]["r"]
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    layers = [m for n, m in inner.named_modules() if hasattr(m, "lora_A") and chosen(f"{n}.weight", patterns)]

    def loss(rows):
        products = [scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight for layer in layers]
        return reference.mean_nll(inner, rows) + 0.5 * strength * sum((product**2).sum() for product in products)

    rows = task_rows(random_dataset(60, seed=1), STEPS)
    return start, reference.train(model, [lambda rows=rows: loss(rows) for rows in rows])


@pytest.mark.parametrize(("stage", "modules", "model"), [(3, "all", CHECKPOINTED), (2, ["*.self_attn.*"], LORA)])
def test_l2_sp_with_lora_pulls_the_merged_weights(rank_pool, stage, modules, model):
    start, end = expected_l2_sp_of_adapters(20.0, () if modules == "all" else tuple(modules))
    methods = {"l2_sp": {"strength": 20.0, "modules": modules}}
    found = rank_pool(2).run(
        scenes.train, steps=STEPS, memory=None, methods=methods, deepspeed={"stage": stage}, model=model
    )[0]
    trained = {name: found["weights"][name] for name in end}
    assert oracle.relative_distance(trained, end, start) <= 1e-3
    assert oracle.relative_distance(trained, expected_l2_sp_of_adapters(0.0)[1], start) > 1e-2
    assert found["losses"][0]["adapter_penalty"] == 0.0 < found["losses"][2]["adapter_penalty"]


def test_l2_sp_names_a_selector_that_means_no_weight():
    from safecl.config import ConfigError
    from safecl.methods.penalties.l2_sp import Config

    with pytest.raises(ConfigError, match=r"no trained weight is named like \*\.attnetion\.\*; there are"):
        Config(modules=["*.attnetion.*"]).check_weight_names(
            "l2_sp", [name for name, _ in tiny_model().named_parameters()]
        )


# ------------------------------------------------------------------------------------------------------------ sequences


def normalised(fisher: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    mean = sum(f.double().sum() for f in fisher.values()) / sum(f.numel() for f in fisher.values())
    return {name: f / float(mean) for name, f in fisher.items()}


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train_task(model, data, replayed, replay_weight: float, strength: float, fisher, anchor):
    losses = [
        lambda rows=rows, more=more: (
            reference.mean_nll(model, rows) + (replay_weight * reference.mean_nll(model, more) if more else 0)
        )
        for rows, more in zip(task_rows(data, STEPS), replayed, strict=True)
    ]
    return reference.train(
        model, losses, pull=lambda params: {n: strength * fisher[n] * (p - anchor[n]) for n, p in params.items()}
    )


@pytest.mark.parametrize(("stage", "rows"), [(2, "task"), (3, "memory")])
def test_online_ewc_consolidates_each_task_into_one_fisher_and_anchor(rank_pool, stage, rows):
    model, memory, first, second = (
        tiny_model(),
        memory_of(random_dataset(20, seed=2)),
        random_dataset(60, seed=1),
        random_dataset(60, seed=4),
    )
    batches = dict(seed=reference.SEED, sign_batches=8, rows_per_batch=4)
    start, nothing = weights_of(model), [[]] * STEPS
    keys = memory.keys()
    known = [memory.get(key).row for key in keys]
    fisher = normalised(oracle.fisher(model, known, keys, **batches))
    end_of_first = train_task(model, first, nothing, 0.0, 0.5, fisher, start)
    new = (first.rows(range(len(first))), first.row_ids.tolist()) if rows == "task" else (known, keys)
    more = normalised(oracle.fisher(model, *new, **batches))
    fisher = {name: 0.7 * f + more[name] for name, f in fisher.items()}
    end = train_task(model, second, nothing, 0.0, 0.5, fisher, end_of_first)

    settings = {"strength": 0.5, "gamma": 0.7, "rows": rows, "sign_batches": 8, "rows_per_batch": 4}
    history, _ = rank_pool(2).run(
        scenes.train_sequence, steps=STEPS, methods={"online_ewc": settings}, deepspeed={"stage": stage}
    )[0]
    assert oracle.relative_distance(history[0]["weights"], end_of_first, start) <= 1e-3
    assert oracle.relative_distance(history[1]["weights"], end, end_of_first) <= 1e-3
    assert "_new_fisher" not in history[1]["kinds"]


def test_a_sequence_carries_memory_fisher_and_anchor_and_remembers_finished_tasks(rank_pool):
    """EWC stays at the first model; rows of the first task are replayed in the second, drawn by the run's own step
    counter."""
    model, first, second = tiny_model(), random_dataset(60, seed=1), random_dataset(60, seed=4)
    memory, start = memory_of(random_dataset(20, seed=2)), weights_of(model)
    keys = memory.keys()
    fisher = normalised(
        oracle.fisher(
            model, [memory.get(key).row for key in keys], keys, reference.SEED, sign_batches=8, rows_per_batch=4
        )
    )
    draw = lambda step: [memory.get(key).row for key in memory.draw(step, 40, "replay")]  # noqa: E731
    end_of_first = train_task(model, first, [draw(step) for step in range(STEPS)], 0.5, 0.5, fisher, start)
    _remember(memory, first, 15)
    replayed = [draw(step) for step in range(STEPS, 2 * STEPS)]
    assert any(row.row_id in set(first.row_ids.tolist()) for rows in replayed for row in rows)
    end = train_task(model, second, replayed, 0.5, 0.5, fisher, start)

    methods = {"ewc": {"strength": 0.5, "sign_batches": 8, "rows_per_batch": 4}, "er": {"weight": 0.5}}
    memory_config = {"source": "unused", "replay_ratio": 0.25, "keep_task_rows": 15}
    history, said = rank_pool(2).run(scenes.train_sequence, steps=STEPS, methods=methods, memory=memory_config)[0]
    assert [entry["memory"] for entry in history] == [20, 35]
    assert oracle.relative_distance(history[0]["weights"], end_of_first, start) <= 1e-3
    assert oracle.relative_distance(history[1]["weights"], end, end_of_first) <= 1e-3
    assert "memory: 15 rows of first entered" in said
    assert sum("Fisher" in line for line in said) == 1


def test_a_run_that_is_resumed_between_two_tasks_knows_the_one_before(rank_pool):
    """Its rows give the Fisher of online EWC, and some of them enter the memory."""
    methods = {
        "online_ewc": {"strength": 0.5, "rows": "task", "sign_batches": 8, "rows_per_batch": 4},
        "er": {"weight": 0.5},
    }
    memory = {"source": "unused", "replay_ratio": 0.25, "keep_task_rows": 15}
    (whole, _), (resumed, said) = (
        rank_pool(2).run(scenes.train_sequence, steps=STEPS, resumed=each, methods=methods, memory=memory)[0]
        for each in (False, True)
    )
    assert [entry["memory"] for entry in resumed] == [20, 35] and "memory: 15 rows of first entered" in said
    for name, value in whole[1]["weights"].items():
        assert torch.equal(resumed[1]["weights"][name], value), name


def test_l2_sp_pulls_to_the_first_model_in_every_task(rank_pool):
    model, start, nothing = tiny_model(), weights_of(tiny_model()), [[]] * STEPS
    evenly = {name: torch.ones_like(value) for name, value in start.items()}
    first, second = (
        train_task(model, random_dataset(60, seed=seed), nothing, 0.0, 3.0, evenly, start) for seed in (1, 4)
    )
    history, _ = rank_pool(2).run(scenes.train_sequence, steps=STEPS, methods={"l2_sp": {"strength": 3.0}})[0]
    assert oracle.relative_distance(history[0]["weights"], first, start) <= 1e-3
    assert oracle.relative_distance(history[1]["weights"], second, first) <= 1e-3


def _remember(memory, data, count: int) -> None:
    from safecl.replay import MemoryRow
    from safecl.training.replay_memory import sample_rows

    kept = sample_rows(data, count, reference.SEED)
    assert len(kept) == count and set(kept.row_ids.tolist()) < set(data.row_ids.tolist())
    memory.insert(MemoryRow(kept.row(i)) for i in range(len(kept)))


def test_der_stores_the_outputs_of_the_model_that_a_task_has_handed_over(rank_pool):
    """A remembered row whose outputs were just stored is at distance 0, wherever the model is by then."""
    memory = {"source": "unused", "replay_ratio": 0.25, "keep_task_rows": 15, "teacher": {"k": 8}}
    distances = rank_pool(2).run(distances_to_stored_outputs, memory=memory, methods={"der": {"alpha": 1.0}})[0]
    assert distances["kept"] < 1e-3 < distances["first"], distances


def distances_to_stored_outputs(**changes) -> dict[str, float]:
    from safecl.engine.passes.step_rows import Distillation

    config = run_config(tasks=scenes.SEQUENCE, **changes)
    run, tasks = scenes.make_run(
        config, tiny_model(), [random_dataset(60, seed=1), random_dataset(60, seed=4)], random_dataset(20, seed=2)
    )
    run.begin_task(tasks[0], active=True)
    for _ in range(STEPS):
        run.train_step(tasks[0])
    run.end_task()
    run.begin_task(tasks[1], active=True)
    found = {}
    for name, rows in {"first": run.memory.all_rows()[:20], "kept": run.memory.all_rows()[20:]}.items():
        total = sum(row.num_targets for row in rows)
        batch = [row.weighted(name, 0.0, (Distillation("forward_kl", 1.0 / total),)) for row in rows]
        found[name] = run.engine.gradient_pass(batch, run.engine.stash("unused")).totals()[name]
    return found


def lwf_teachers_of_a_sequence(output: str, teacher: str) -> list[float]:
    """The LwF term at the first step of each of two tasks."""
    config = run_config(
        tasks=scenes.SEQUENCE, memory=None, methods={"lwf": {"weight": 1.0, "teacher": teacher}}, output=output
    )
    run, tasks = scenes.make_run(config, tiny_model(), [random_dataset(60, seed=1), random_dataset(60, seed=4)])
    terms = []
    for task in tasks:
        run.begin_task(task, active=True)
        terms.append(run.train_step(task).totals()["lwf"])
        run.train_step(task)
        run.end_task()
    return terms


def test_lwf_keeps_to_the_aligned_model_or_to_the_task_before(rank_pool, tmp_path):
    aligned = rank_pool(2).run(lwf_teachers_of_a_sequence, output=str(tmp_path), teacher="aligned")[0]
    previous = rank_pool(2).run(lwf_teachers_of_a_sequence, output=str(tmp_path), teacher="previous")[0]
    assert aligned[0] < 1e-10 and previous[0] < 1e-10
    assert aligned[1] > 1e-4 and previous[1] < 1e-10
