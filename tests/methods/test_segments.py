"""Learning rates, freezing, bursts and pulls by segment of the weights, against an independent loop in fp64."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch

from safecl.config import ConfigError
from safecl.methods.freezing.segment_rates import Config as Segments
from safecl.methods.rehearsal.k_fpf import Config as KFpf
from safecl.methods.scope import Segment
from tests.engine.passes import oracle
from tests.engine.scenes import run_config, tiny_model
from tests.methods import every_method, reference, scenes
from tests.methods.fp64_scene import STEPS, Scene, Weights, dot


def scaled_steps(scene: Scene, factor_of) -> Weights:
    """Train with each tensor's step times factor_of(step, name)."""

    def shorten(step: int, old: Weights) -> None:
        scene.move(lambda name, p: old[name] + factor_of(step, name) * (p - old[name]))

    return scene.train(after=shorten)


def test_a_segments_factor_is_one_of_its_learning_rate(compare):
    def factor(step: int, name: str) -> float:
        return (0.1 if ".self_attn." in name else 1.0) * (0.5 if ".layers.1." in name else 1.0)

    scene = Scene()
    end = scaled_steps(scene, factor)
    rules = [{"modules": "attention", "factor": 0.1}, {"layers": [1, 1], "factor": 0.5}]
    compare(end, scene.start, segment_rates={"rules": rules})


def test_importance_is_the_mean_squared_gradient_on_the_memory(compare):
    scene = Scene()
    gradient = scene.gradient(scene.draw(0, "segment_rates"))
    inside = sorted((n for n in gradient if ".layers." in n), key=lambda n: -float((gradient[n] ** 2).mean()))
    chosen = inside[: round(0.4 * len(inside))]
    end = scaled_steps(scene, lambda step, name: 0.0 if name in chosen else 1.0)
    rule = {"layers": [0, 1], "importance": "highest", "share": 0.4, "factor": 0.0}
    found = compare(end, scene.start, 2, segment_rates={"rules": [rule]})["state"]["weights"]
    # fp32 weights of the undecided model, which the steps leave bit for bit
    assert all(torch.equal(found[name], scene.start[name].to(found[name].dtype)) for name in chosen)


@pytest.mark.parametrize("place", ["in the pass", pytest.param("before the pass", marks=pytest.mark.long)])
def test_rules_scale_the_strength_of_a_pull(compare, place):
    scene = Scene()
    gradient = scene.gradient(scene.draw(0, "l2_sp"))
    important = sorted(gradient, key=lambda n: -float((gradient[n] ** 2).mean()))[: round(0.3 * len(gradient))]
    half = Segment(half=7).chosen(list(gradient), reference.SEED)

    def factor(name: str) -> float:
        return (6.0 if name in important else 1.0) * (0.5 if ".layers.0." in name else 1.0) * (name not in half)

    def pull(params: Weights) -> Weights:
        return {name: 2.0 * factor(name) * (p - scene.start[name]) for name, p in params.items()}

    end = scene.train(pull=pull)
    even = Scene().train(pull=lambda params: {name: 2.0 * (p - scene.start[name]) for name, p in params.items()})
    assert oracle.relative_distance(end, even, scene.start) > 0.05
    rules = [
        {"importance": "highest", "share": 0.3, "factor": 6.0},
        {"layers": "safety", "factor": 0.5},
        {"half": 7, "factor": 0.0},
    ]
    others = {} if place == "in the pass" else {"ewc": {"strength": 1e-12, **every_method.FISHER}}
    compare(end, scene.start, 3, **others, l2_sp={"strength": 2.0, "rules": rules})


def test_rules_scale_the_pull_of_an_adapters_product():
    from safecl.engine.model.adapter_penalty import EvenAdapterPenalty
    from safecl.engine.model.adapters import adapters
    from safecl.methods.scope import importance_of

    model = scenes.with_adapters(tiny_model(), run_config(model={"lora": {"r": 2, "alpha": 4}}))
    names = [name for name, *_ in adapters(model)]
    expected = 0.0
    for number, (_, a, b, scaling) in enumerate(adapters(model)):
        torch.nn.init.normal_(b.weight, generator=torch.Generator().manual_seed(number))
        square = (scaling * b.weight.double() @ a.weight.double()).square().sum()
        expected += float((3.0 if number == 1 else 1.0) * square.detach())
    found = EvenAdapterPenalty(0.5, (), ((names[1], 3.0),))(model)
    assert float(found.detach()) == pytest.approx(0.25 * expected, rel=1e-5)
    squares = {name: float("lora_B" in name and "q_proj" in name) for name, p in model.named_parameters()}
    assert {name: importance_of(squares, name) for name in names} == {name: float("q_proj" in name) for name in names}


def test_swat_trains_the_robust_modules_alone_in_the_warm_up(compare):
    scene = Scene()
    end = scaled_steps(scene, lambda step, name: float(step >= STEPS / 2 or "q_proj" in name))
    compare(end, scene.start, swat={"modules": ["*.q_proj.*"], "warmup": 0.5})


def test_a_burst_of_k_fpf_moves_the_chosen_modules_alone(compare):
    scene = Scene()
    modules = ["*norm*", "lm_head.*"]

    def burst(at: int, name: str) -> None:
        draws = [scene.draw(at, f"k_fpf {name} {number}") for number in range(2)]

        def keep_others(step: int, old: Weights) -> None:
            scene.move(lambda n, p: p if any(fnmatchcase(n, pattern) for pattern in modules) else old[n])

        scene.train(draws, after=keep_others)

    half = STEPS // 2
    scene.train(scene.task[:half])
    burst(half - 1, str(half))
    scene.train(scene.task[half:])
    burst(STEPS, "end")
    end = {name: p.detach() for name, p in scene.model.named_parameters()}
    compare(end, scene.start, k_fpf={"k": 2, "steps": 2, "modules": modules})


def test_bursts_are_evenly_spaced_and_the_last_is_at_the_end():
    assert KFpf(k=3).bursts_at(300) == [100, 200]
    assert KFpf(k=1).bursts_at(300) == [] and KFpf(k=5).bursts_at(2) == [1]


def test_hierarchical_importance_is_that_of_the_path_by_element_and_layer(compare):
    scene = Scene()
    work = {name: torch.zeros_like(p) for name, p in scene.start.items()}
    for number in range(3):
        gradient = scene.gradient(scene.draw(0, f"hierarchical {number}", 0.25))
        rate = 0.2 / dot(gradient, gradient) ** 0.5
        for name, g in gradient.items():
            work[name] += -g * (-rate * g)
        scene.move(lambda name, p, rate=rate, gradient=gradient: p - rate * gradient[name])
    moves = {name: p.detach() - scene.start[name] for name, p in scene.model.named_parameters()}
    xi = 0.5 * dot(moves, moves) / sum(p.numel() for p in moves.values())
    importance = {name: work[name] / (moves[name] ** 2 + xi) for name in work}
    scene.move(lambda name, p: scene.start[name])
    groups: dict[str, list[str]] = {}
    for name in work:
        groups.setdefault(name.split(".")[2] if ".layers." in name else "others", []).append(name)
    norms = {group: sum(float((importance[n] ** 2).sum()) for n in names) ** 0.5 for group, names in groups.items()}
    mean = sum(norms.values()) / len(norms)
    for group, names in groups.items():
        for name in names:
            importance[name] *= norms[group] / mean
    total = sum(float(w.sum()) for w in importance.values()) / sum(w.numel() for w in importance.values())
    importance = {name: w / total for name, w in importance.items()}

    def pull(params: Weights) -> Weights:
        return {name: 2.0 * importance[name] * (p - scene.start[name]) for name, p in params.items()}

    end = scene.train(pull=pull)
    assert oracle.relative_distance(end, Scene().train(), scene.start) > 0.02
    settings = {"strength": 2.0, "steps": 3, "length": 0.2, "damping": 0.5}
    found = compare(end, scene.start, hierarchical=settings)
    assert oracle.relative_distance(found["state"]["hierarchical_fisher"], importance) <= 1e-3


def test_dema_has_a_decay_for_each_tensor_and_step(compare):
    scene, average, last = Scene(), {}, {}
    seen: list[float] = []
    gradients: dict[int, Weights] = {}

    def note(step: int, grads: Weights) -> Weights:
        gradients[step] = grads
        return grads

    def follow(step: int, old: Weights) -> None:
        for name, p in scene.model.named_parameters():
            g, theta = gradients[step][name], p.detach().clone()
            if step > 0:
                moved, change = ((a - b).abs().sum() for a, b in ((theta, average[name]), (g, last[name])))
                share = float(2 * (1 + g.abs().sum()) / (moved * change))
                seen.append(share)
                theta = average[name] + (share if 0 < share < 1 else 0.2) * (theta - average[name])
            average[name], last[name] = theta, g

    end = scene.train(transform=note, after=follow)
    assert any(0 < share < 1 for share in seen) and any(share > 1 for share in seen)
    compare(end, scene.start, others={"ema": average}, dema={"otherwise": 0.2})


# ---------------------------------------------------------------------------------------------------------- selections

NAMES = [f"model.layers.{i}.{part}" for i in range(4) for part in ("self_attn.q_proj.weight", "mlp.up_proj.weight")]
NAMES += ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias"]


def test_a_segment_holds_what_fits_all_its_conditions():
    assert Segment().chosen(NAMES, 0) == set(NAMES)
    assert Segment(modules="attention", layers=(1, 2)).chosen(NAMES, 0) == {NAMES[2], NAMES[4]}
    half = Segment(layers=(0, 3), half=1).chosen(NAMES, 5)
    assert (
        half == Segment(layers=(0, 3), half=1).chosen(NAMES[::-1], 5) != Segment(layers=(0, 3), half=2).chosen(NAMES, 5)
    )
    assert len({name.rpartition(".")[0] for name in half}) == 4
    assert (NAMES[0] in half) == (NAMES[-1] in half), "a bias stays with its weight"


def test_a_segment_without_weights_is_told():
    with pytest.raises(
        ConfigError, match=r"methods.segment_rates.rules\[1\].layers: there is no layer 9; the layers are 0 to 3"
    ):
        Segments(rules=[{"layers": [0, 1]}, {"layers": [2, 9]}]).check_weight_names("segment_rates", NAMES)
    with pytest.raises(ConfigError, match=r"methods.segment_rates.rules\[0\]: no trained weight fits; there are model"):
        Segments(rules=[{"modules": ["*.w1.*"]}]).check_weight_names("segment_rates", NAMES)


def test_only_factors_of_zero_without_importance_freeze_from_the_start():
    rules = [{"layers": [0, 0]}, {"layers": [1, 1], "factor": 0.5}, {"importance": "lowest"}]
    config = Segments(rules=rules)
    assert config.frozen(NAMES, 0) == {NAMES[0], NAMES[1], NAMES[-1]} and config.freezes and config.needs_memory
    assert not Segments(rules=rules[1:]).freezes and not Segments(rules=rules[:1]).state_kinds
