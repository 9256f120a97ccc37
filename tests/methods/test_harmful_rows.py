"""Alignment stages that learn from harmful rows, against an independent loop in fp64, and the rows that they need."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from safecl.config import ConfigError, validate_tree
from safecl.data import TaskOrder
from tests.engine.passes import oracle
from tests.methods import every_method, reference, scenes
from tests.methods.fp64_scene import TOKENS, Scene, Weights, dot


def harmful(step: int) -> list:
    data = scenes.harmful_dataset()
    order = TaskOrder(data, seed=reference.SEED, tokens_per_batch=TOKENS, max_steps=1)
    return list(data.rows(order.rows_of_step(step)))


def found_by(rank_pool, folder, method: str, stage: int) -> Weights:
    run = rank_pool(2).run(every_method.train, method=method, folder=str(folder), deepspeed={"stage": stage})[0]
    return run["state"]["weights"]


def test_booster_adds_the_change_of_the_harmful_gradient_over_a_harmful_step(rank_pool, tmp_path):
    scene = Scene()

    def weakened(step: int, grads: Weights) -> Weights:
        before = {name: p.detach().clone() for name, p in scene.model.named_parameters()}
        here = scene.gradient(harmful(step))
        scene.move(lambda name, p: p - 0.3 * here[name] / dot(here, here) ** 0.5)
        there = scene.gradient(harmful(step))
        scene.move(lambda name, p: before[name])
        return {name: grads[name] + 5.0 * (here[name] - there[name]) for name in grads}

    end = scene.train(transform=weakened)
    assert oracle.relative_distance(end, Scene().train(), scene.start) > 0.05
    assert oracle.relative_distance(found_by(rank_pool, tmp_path, "booster", 3), end, scene.start) <= 1e-3


def discrepancy(z: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """MMD^2 of two sets of vectors [n, H], pair by pair."""
    both = [*z, *e]
    squares = [[(a - b).square().sum() for b in both] for a in both]
    pairs = len(both) * (len(both) - 1)
    width = sum(float(s.detach()) for row in squares for s in row) / pairs
    kernel = [[sum(torch.exp(-s / (width * 2.0**i)) for i in (-2, -1, 0, 1, 2)) for s in row] for row in squares]
    n = len(z)
    inside = sum(kernel[s][t] + kernel[n + s][n + t] for s in range(n) for t in range(n))
    across = sum(kernel[s][n + t] + kernel[n + s][t] for s in range(n) for t in range(n))
    return (inside - across) / n**2


def test_rep_noise_pulls_harmful_states_to_noise_and_raises_the_loss_behind_every_layer(rank_pool, tmp_path):
    scene, seen = Scene(), []
    factors = {"noise": 2.0, "ascent": 2.0}

    def both_terms(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        nlls, distances = [], []
        for row in harmful(step):
            chosen = torch.from_numpy(row.loss_mask[1:].copy())
            targets = reference.ids_of(row)[0, 1:][chosen]
            states = scene.model(
                input_ids=reference.ids_of(row), use_cache=False, output_hidden_states=True
            ).hidden_states
            *between, last = [state[0, :-1][chosen] for state in states]
            outputs = [*map(scene.model.model.norm, between), last]
            nlls.append(
                torch.stack(
                    [
                        torch.nn.functional.cross_entropy(scene.model.lm_head(x), targets, reduction="none")
                        for x in outputs
                    ]
                )
            )
            seed = random.Random(f"{reference.SEED} noise {step} {row.row_id}").getrandbits(62)
            layers = torch.stack([*between[1:], last])
            draws = torch.randn(layers.shape, generator=torch.Generator().manual_seed(seed)).double()
            distances.append(torch.stack([discrepancy(z, e) for z, e in zip(layers, draws, strict=True)]).mean())
        return torch.cat(nlls, -1).mean(), torch.stack(distances).mean()

    def noised(step: int, grads: Weights) -> Weights:
        nll, distance = both_terms(step)
        seen.append((float(nll.detach()), float(distance.detach())))
        added = oracle.gradients(scene.model, factors["noise"] * distance - factors["ascent"] * torch.log(1.0 + nll))
        return {name: g + added[name] for name, g in grads.items()}

    end = scene.train(transform=noised)
    assert seen[-1][0] > seen[0][0] and seen[-1][1] < seen[0][1]
    for term in factors:
        scene.move(lambda name, p: scene.start[name])
        factors |= {"noise": 2.0, "ascent": 2.0, term: 0.0}
        assert oracle.relative_distance(end, scene.train(transform=noised), scene.start) > 0.02, term
    assert oracle.relative_distance(found_by(rank_pool, tmp_path, "rep_noise", 3), end, scene.start) <= 1e-3


def gradients_of_outputs(scene: Scene, rows, chosen) -> tuple[list[int], list[torch.Tensor]]:
    """(layer, gradient of the mean loss) of the attention outputs of these layers, in the order of rows and layers."""
    numbers: list[int] = []
    outputs: list[torch.Tensor] = []

    def note(number: int, output: torch.Tensor) -> None:
        numbers.append(number)
        outputs.append(output)

    hooks = [
        scene.model.model.layers[i].self_attn.register_forward_hook(lambda m, x, out, i=i: note(i, out[0]))
        for i in chosen
    ]
    found = torch.autograd.grad(reference.mean_nll(scene.model, rows), outputs)
    for hook in hooks:
        hook.remove()
    return numbers, list(found)


def test_t_vaccine_moves_and_trains_the_layers_that_it_has_drawn(rank_pool, tmp_path):
    scene, drawn, all_drawn = Scene(), [], []
    layers = range(len(scene.model.model.layers))

    def draw(step: int) -> None:
        if step % 2 == 0:
            numbers, found = gradients_of_outputs(scene, harmful(step), layers)
            squares = [sum(float((g**2).sum()) for n, g in zip(numbers, found, strict=True) if n == i) for i in layers]
            norms = np.sqrt(squares)
            generator = np.random.default_rng([reference.SEED, step])
            drawn[:] = generator.choice(len(norms), 1, replace=False, p=norms / norms.sum()).tolist()
            all_drawn.extend(drawn)

    def at_the_worst_point(step: int, grads: Weights) -> Weights:
        _, found = gradients_of_outputs(scene, scene.task[step], drawn)
        norm = torch.stack([(g**2).sum() for g in found]).sum().sqrt()
        moves = iter([20.0 * g / norm for g in found])
        hooks = [
            scene.model.model.layers[i].self_attn.register_forward_hook(
                lambda m, x, out: (out[0] + next(moves), *out[1:])
            )
            for i in drawn
        ]
        moved = scene.gradient(scene.task[step])
        for hook in hooks:
            hook.remove()
        return moved

    def keep_others(step: int, old: Weights) -> None:
        kept = [f".layers.{i}." for i in layers if i not in drawn]
        scene.move(lambda name, p: old[name] if any(part in name for part in kept) else p)

    end = scene.train(before=draw, transform=at_the_worst_point, after=keep_others)
    assert len(all_drawn) == 2
    assert oracle.relative_distance(found_by(rank_pool, tmp_path, "t_vaccine", 2), end, scene.start) <= 1e-3


def test_vaa_weighs_vulnerable_rows_by_their_loss_and_steps_from_moved_weights(rank_pool, tmp_path):
    scene, data = Scene(), scenes.conflicting_datasets()[0]
    rows = list(data.rows(range(len(data))))

    def losses() -> list[float]:
        return [scene.nll([row]) for row in rows]

    before, here = losses(), scene.gradient(harmful(0))
    scene.move(lambda name, p: p - 0.5 * here[name] / dot(here, here) ** 0.5)
    rises = {row.row_id: b - a for row, a, b in zip(rows, before, losses(), strict=True)}
    scene.move(lambda name, p: scene.start[name])
    chosen = set(sorted(rises, key=lambda row: -rises[row])[: round(0.25 * len(rows))])
    p, waiting, moved = 0.5, [], []

    def weighted(step: int) -> torch.Tensor:
        groups = [[row for row in scene.task[step] if (row.row_id in chosen) == wanted] for wanted in (True, False)]
        assert all(groups)
        means = [torch.stack([oracle.row_nll(scene.model, row).mean() for row in own]).mean() for own in groups]
        return p * means[0] + (1 - p) * means[1]

    def step_of(step: int) -> torch.Tensor:
        nonlocal p
        if step >= 2:
            odds = p / (1 - p) * math.exp(2.0 * (waiting[step - 2][0] - waiting[step - 2][1]))
            p = min(0.9, max(0.1, odds / (1 + odds)))
        if random.Random(f"{reference.SEED} vaa {step}").random() < step / every_method.STEPS:
            moved.append(step)
            g = oracle.gradients(scene.model, weighted(step))
            old = {name: q.detach().clone() for name, q in scene.model.named_parameters()}
            scene.move(lambda name, q: q + 0.3 * g[name] / dot(g, g) ** 0.5)
            note(step)
            there = oracle.gradients(scene.model, weighted(step))
            scene.move(lambda name, q: old[name])
            return sum((there[name].detach() * q).sum() for name, q in scene.model.named_parameters())
        note(step)
        return weighted(step)

    def note(step: int) -> None:
        waiting.append(
            [
                sum(own) / len(own)
                for wanted in (True, False)
                if (own := [scene.nll([row]) for row in scene.task[step] if (row.row_id in chosen) == wanted])
            ]
        )

    end = reference.train(scene.model, [lambda step=step: step_of(step) for step in range(every_method.STEPS)])
    assert moved and p != 0.5
    assert oracle.relative_distance(end, Scene().train(), scene.start) > 0.02
    assert oracle.relative_distance(found_by(rank_pool, tmp_path, "vaa", 1), end, scene.start) <= 1e-3


TREE = {
    "model": {"path": "m"},
    "tasks": [{"name": "a", "train": "a.jsonl", "role": "align"}, {"name": "b", "train": "b.jsonl"}],
    "output": "runs/a",
}


@pytest.mark.parametrize("method", ["booster", "rep_noise", "t_vaccine", "vaa"])
def test_a_run_without_the_harmful_rows_is_refused_by_name(method):
    with pytest.raises(ConfigError, match=rf"{method} needs `{method}: {{harmful: FILE}}`, disallowed prompts with"):
        validate_tree(TREE | {"methods": {method: {}}}, "run.yaml")
    assert validate_tree(TREE | {"methods": {method: {"harmful": "h.jsonl"}}}, "run.yaml").methods[method].needs_harmful


def test_a_resumed_run_has_the_same_harmful_rows(tmp_path):
    from safecl.planning.plans import RunPlan
    from safecl.training.identity import identity_of, refuse_other_run

    config = every_method.config_of("booster", str(tmp_path))
    rows, others = scenes.harmful_dataset(), scenes.conflicting_datasets()[0]
    saved, now = (
        identity_of(RunPlan(config, None, [], [], None, {"harmful.jsonl": found})) for found in (rows, others)
    )
    refuse_other_run(saved, saved, "runs/a")
    with pytest.raises(ConfigError, match=r"the rows of methods\.booster\.harmful have changed since this run began"):
        refuse_other_run(saved, now, "runs/a")
