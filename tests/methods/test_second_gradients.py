"""Methods with gradients of their own, against an independent loop in fp64."""

from __future__ import annotations

import pytest
import torch

from tests.engine.passes import oracle
from tests.methods import every_method, reference
from tests.methods.fp64_scene import Scene, Weights, dot

# --------------------------------------------------------------------------------------------------------- projections


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.long), 2])
def test_agem_on_the_step_leaves_no_step_against_the_memory_and_an_average_follows_it(compare, stage):
    scene, seen, cosines = Scene(), {}, []
    rows, average = scene.draws("agem"), dict(scene.start)

    def project(step: int, old: Weights) -> None:
        r, now = seen["r"], {name: p.detach().clone() for name, p in scene.model.named_parameters()}
        moved = {name: now[name] - old[name] for name in now}
        against = dot(moved, r)
        cosines.append(against)
        if against > 0:
            scene.move(lambda name, p: p - against / dot(r, r) * r[name])
        for name, p in scene.model.named_parameters():
            average[name] = 0.8 * average[name] + 0.2 * p.detach()

    end = scene.train(before=lambda step: seen.update(r=scene.gradient(rows[step])), after=project)
    assert sum(cosine > 0 for cosine in cosines) >= 2
    compare(end, scene.start, stage, {"ema": average}, agem={"project": "step"}, ema={"decay": 0.8})


@pytest.mark.long
def test_an_average_that_waits_for_the_step_is_that_of_the_pass(rank_pool, tmp_path):
    """Nothing is projected at a margin of -1, so both forms train the same weights and averages, masked or not."""
    for average in ({"ema": {"decay": 0.8}}, {"psmt": {"protected": 0.3, "decay": 0.8, **every_method.FISHER}}):
        waits, in_pass = (
            rank_pool(2).run(
                every_method.train,
                method=None,
                folder=str(tmp_path / f"{next(iter(average))}-{project}"),
                methods={"agem": {"project": project, "margin": -1.0}, **average},
                deepspeed={"stage": 2},
            )[0]
            for project in ("step", "gradient")
        )
        assert oracle.relative_distance(waits["state"]["ema"], in_pass["state"]["ema"], in_pass["start"]) <= 1e-5
        assert oracle.relative_distance(in_pass["state"]["ema"], in_pass["state"]["weights"], in_pass["start"]) > 0.1


def test_safe_grad_removes_the_conflict_and_adds_the_gradient_of_alignment(compare):
    scene, conflicts = Scene(), []
    rows = scene.draws("safe_grad")

    def surgery(step: int, user: Weights) -> Weights:
        aligned = oracle.gradients(scene.model, scene.distance(rows[step]))
        ua, aa = dot(user, aligned), dot(aligned, aligned)
        conflicts.append(ua < 0)
        return {n: g - min(0.0, ua / aa if aa else 0.0) * aligned[n] + 2.0 * aligned[n] for n, g in user.items()}

    end = scene.train(transform=surgery)
    assert sum(conflicts) >= 2
    compare(end, scene.start, safe_grad={"rho": 2.0})


@pytest.mark.parametrize("when", ["always", pytest.param("conflict", marks=pytest.mark.long)])
def test_ogpsa_projects_every_tensor_on_a_reference_that_is_renewed(compare, when):
    scene, seen, signs = Scene(), {}, set()

    def renew(step: int) -> None:
        if step % 2 == 0:
            seen["r"] = scene.gradient(scene.draw(step, "ogpsa"))

    def project(step: int, grads: Weights) -> Weights:
        r = seen["r"]
        factors = {n: float((g * r[n]).sum()) / (float((r[n] ** 2).sum()) + 1e-8) for n, g in grads.items()}
        signs.update(factor > 0 for factor in factors.values())
        return {n: g - (min(factors[n], 0.0) if when == "conflict" else factors[n]) * r[n] for n, g in grads.items()}

    end = scene.train(before=renew, transform=project)
    assert signs == {True, False}
    compare(end, scene.start, ogpsa={"every": 2, "when": when})


def test_spag_steps_back_by_the_capped_projection_where_the_memorys_loss_is_too_high(compare):
    scene, factors = Scene(), []
    rows = scene.draws("spag")
    tau, cap = scene.nll(rows[0]), 0.025

    def step_back(step: int, old: Weights) -> None:
        excess = scene.nll(rows[step]) - tau
        factors.append(0.0)
        if excess > 0:
            g = scene.gradient(rows[step])
            factors[-1] = min(excess / dot(g, g), cap)
            scene.move(lambda name, p: p - factors[-1] * g[name])

    end = scene.train(after=step_back)
    assert cap in factors and any(0 < factor < cap for factor in factors), factors
    compare(end, scene.start, spag={"tau": None, "eta": cap})


@pytest.mark.parametrize("mask", [pytest.param("gradient", marks=pytest.mark.long), "step"])
def test_mudman_moves_weights_only_where_the_signs_agree(compare, mask):
    scene, mean = Scene(), {}
    rows = scene.draws("mudman")

    def remember(step: int) -> None:
        for name, r in scene.gradient(rows[step]).items():
            mean[name] = 0.5 * mean.get(name, torch.zeros_like(r)) + 0.5 * r

    def masked(step: int, grads: Weights) -> Weights:
        return {n: g * (g.sign() == mean[n].sign()) for n, g in grads.items()}

    def undone(step: int, old: Weights) -> None:
        scene.move(lambda name, p: torch.where((old[name] - p).sign() == mean[name].sign(), p, old[name]))

    hooks = {"transform": masked} if mask == "gradient" else {"after": undone}
    compare(scene.train(before=remember, **hooks), scene.start, mudman={"momentum": 0.5, "mask": mask})


def test_osft_keeps_every_step_outside_of_the_largest_singular_values(compare):
    scene, low, high = Scene(), 0.2, 0.6
    layers = scene.model.model.layers
    cosines: list[list[torch.Tensor]] = [[] for _ in layers]
    for row in scene.draw(0, "osft"):
        states = scene.model(input_ids=reference.ids_of(row), use_cache=False, output_hidden_states=True).hidden_states
        chosen = torch.from_numpy(row.loss_mask[1:].copy())
        last = []
        hook = layers[-1].register_forward_hook(lambda m, i, out, last=last: last.append(out))
        scene.model(input_ids=reference.ids_of(row), use_cache=False)
        hook.remove()
        outputs = [*states[1:-1], last[0]]  # the last of the states is behind the final norm
        for number, (before, after) in enumerate(zip(states[:-1], outputs, strict=True)):
            cosine = torch.cosine_similarity(before[0, :-1][chosen], after.view_as(before)[0, :-1][chosen], dim=-1)
            cosines[number].append(cosine.detach())
    means = torch.stack([torch.cat(values).mean() for values in cosines])
    shares = (low + means / means.mean() * (high - low)).tolist()
    projections = {}
    for name, weight in scene.start.items():
        if ".layers." in name and weight.dim() == 2:
            rank = round(shares[int(name.split(".layers.")[1][0])] * min(weight.shape))
            u, _, vh = torch.linalg.svd(weight)
            projections[name] = (u[:, :rank] @ u[:, :rank].T, vh[:rank].T @ vh[:rank])

    def outside(step: int, old: Weights) -> None:
        def take(name: str, p: torch.Tensor) -> torch.Tensor:
            if name not in projections:
                return p
            left, right = projections[name]
            d = p - old[name]
            d = d - left @ d
            return old[name] + d - d @ right

        scene.move(take)

    end = scene.train(after=outside)
    found = compare(end, scene.start, osft={"low": low, "high": high})["state"]["weights"]
    name = "model.layers.1.mlp.up_proj.weight"
    moved = (found[name] - scene.start[name]).double()
    assert float((projections[name][0] @ moved).norm()) <= 1e-5 * float(moved.norm())


@pytest.mark.parametrize("project", ["gradient", pytest.param("step", marks=pytest.mark.long)])
def test_safe_anchor_leaves_out_the_largest_eigenvectors_of_the_memorys_fisher(compare, project):
    scene = Scene()
    samples = [scene.gradient(scene.draw(0, f"safe_anchor_{number}", 0.25)) for number in range(4)]
    bases = {}
    for name in scene.start:
        rows = torch.stack([sample[name].flatten() for sample in samples])
        bases[name] = torch.linalg.svd(rows, full_matrices=False).Vh[:2]

    def left(name: str, value: torch.Tensor) -> torch.Tensor:
        flat = value.flatten()
        return (flat - bases[name].T @ (bases[name] @ flat)).view_as(value)

    def outside(step: int, grads: Weights) -> Weights:
        return {name: left(name, g) for name, g in grads.items()}

    def taken_back(step: int, old: Weights) -> None:
        scene.move(lambda name, p: old[name] + left(name, p - old[name]))

    end = scene.train(**({"transform": outside} if project == "gradient" else {"after": taken_back}))
    found = compare(end, scene.start, safe_anchor={"rank": 2, "samples": 4, "project": project})
    assert {"safe_anchor_0", "safe_anchor_1"} <= found["state"].keys()


def test_safe_anchor_says_that_samples_span_the_subspace():
    from safecl.methods.projections.safe_anchor import Config

    with pytest.raises(ValueError, match=r"samples \(4\) span at most as many dimensions; rank is 8"):
        Config(samples=4)
