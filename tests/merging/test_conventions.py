"""The formulas and conventions of each merge, on numbers that are worked out by hand.

mergekit's conventions, as its documentation and code describe them, are told from ours where they differ.
"""

from __future__ import annotations

import math

import pytest
import torch

from safecl.config import ConfigError
from safecl.merging import arithmetic
from safecl.merging.arithmetic import PIECE, Magnitudes, kth_largest, num_kept
from safecl.merging.places import places_of, value_at
from tests.merging.memory import merged


def test_linear_divides_by_the_sum_of_the_weights_unless_told_not_to():
    assert merged("linear", [1.0, 2.0], [3.0, 6.0])["x"] == [2.0, 4.0]
    assert merged("linear", [1.0, 2.0], [3.0, 6.0], weights=[3, 1])["x"] == [1.5, 3.0]
    assert merged("linear", [1.0, 2.0], [3.0, 6.0], weights=[3, 1], normalize=False)["x"] == [6.0, 12.0]
    assert merged("linear", [3.0, 6.0], base=[1.0, 2.0], weights=[3, 1])["x"] == [1.5, 3.0]  # the base comes first
    with pytest.raises(ConfigError, match=r"linear.weights: their sum is 0 for x; use normalize=false"):
        merged("linear", [1.0], [3.0], weights=[1, -1])


def test_task_arithmetic_adds_task_vectors_and_takes_them_away():
    base = [1.0, 1.0]
    assert merged("task_arithmetic", [2.0, 1.0], [1.0, 3.0], base=base)["x"] == [2.0, 3.0]
    assert merged("task_arithmetic", [2.0, 1.0], base=base, weights=[-1])["x"] == [0.0, 1.0]
    assert merged("task_arithmetic", [2.0, 1.0], [1.0, 3.0], base=base, weights=[1, -1], scale=0.5)["x"] == [1.5, 0.0]
    assert merged("task_arithmetic", [2.0, 1.0], [1.0, 3.0], base=base, weights=[3, 1], normalize=True)["x"] == [
        1.75,
        1.5,
    ]


def test_slerp_takes_the_arc_with_unnormalised_vectors_and_the_line_where_they_are_nearly_parallel():
    third = math.sin(math.pi / 6) / 1.0  # angle 90 degrees, t = 1/3: sin(60) and sin(30)
    assert merged("slerp", [0.0, 4.0], base=[2.0, 0.0], t=1 / 3)["x"] == [
        round(2 * math.sin(math.pi / 3), 6),
        round(4 * third, 6),
    ]
    assert merged("slerp", [0.0, 4.0], [2.0, 0.0], t=0)["x"] == [0.0, 4.0]  # without a base the first tuned is first
    near = [1.0, math.tan(math.acos(0.9996))]
    assert merged("slerp", near, base=[1.0, 0.0], t=0.25)["x"] == [1.0, round(0.25 * near[1], 6)]
    assert merged("slerp", [2.0, 2.0], base=[0.0, 0.0], t=0.5)["x"] == [1.0, 1.0]  # ours: no direction, so the line
    opposite = merged("slerp", [-1.0, 0.0], base=[1.0, 0.0], t=0.5)["x"]
    assert opposite == [0.0, 0.0]  # |cosine| above the threshold as well, as in mergekit


def test_ties_trims_elects_and_averages_what_agrees():
    base = [0.0, 0.0, 0.0, 0.0]
    a, b = [4.0, -3.0, 1.0, 2.0], [2.0, 5.0, 0.5, -2.0]
    # density 0.5 keeps 4, -3 of a and 2, 5 of b (2 and -2 are equal: the first stays)
    assert merged("ties", a, b, base=base, density=0.5)["x"] == [3.0, 5.0, 0.0, 0.0]
    assert merged("ties", a, b, base=base, density=0.5, normalize=False)["x"] == [6.0, 5.0, 0.0, 0.0]
    # weighted: -3 * 2 against 5 * 1, so minus is elected, and divided by its weight 2
    assert merged("ties", a, b, base=base, density=0.5, weights=[2, 1])["x"] == [round(10 / 3, 6), -3.0, 0.0, 0.0]
    assert merged("ties", a, b, base=base, density=0.5, scale=0.1)["x"] == [0.3, 0.5, 0.0, 0.0]


def test_ties_counts_a_sum_of_zero_as_plus():
    assert merged("ties", [1.0], [-1.0], base=[0.0], density=1)["x"] == [1.0]


def test_ties_trims_over_the_whole_model_where_asked_to():
    base = {"a": [0.0, 0.0], "b": [0.0, 0.0]}
    tuned = {"a": [4.0, 3.0], "b": [2.0, 1.0]}
    assert merged("ties", tuned, base=base, density=0.5) == {"a": [4.0, 0.0], "b": [2.0, 0.0]}
    assert merged("ties", tuned, base=base, density=0.5, scope="model") == {"a": [4.0, 3.0], "b": [0.0, 0.0]}
    equal = {"a": [1.0, 1.0], "b": [1.0, -1.0]}
    assert merged("ties", equal, base=base, density=0.75, scope="model") == {"a": [1.0, 1.0], "b": [1.0, 0.0]}


@pytest.mark.parametrize(("density", "numel", "kept"), [(0.2, 10, 2), (0.25, 10, 2), (0.01, 10, 1), (1, 10, 10)])
def test_a_density_keeps_the_integer_part_and_at_least_one(density, numel, kept):
    assert num_kept(density, numel) == kept


@pytest.mark.parametrize("k", [1, 2, 500, 999, 1000])
def test_the_kth_largest_magnitude_is_exact_with_many_equal_values(k):
    generator = torch.Generator().manual_seed(k)
    values = torch.randn(1000, generator=generator).to(torch.bfloat16).float()
    values[:300] = values[0]
    magnitudes = Magnitudes()
    for number in range(2):
        for part in values.split(170):
            magnitudes.count(part, number)
        if number == 0:
            magnitudes.choose(k)
    threshold, num_equal = magnitudes.threshold()
    expected = values.abs().sort(descending=True).values
    assert threshold == float(expected[k - 1])
    assert num_equal == int((expected[:k] == expected[k - 1]).sum())


def random_magnitudes(numel: int) -> torch.Tensor:
    return 0.001 * torch.randn(numel, generator=torch.Generator().manual_seed(0))


NUMEL = PIECE + 7
MAGNITUDES = {
    "all different": random_magnitudes(NUMEL),
    "many equal": random_magnitudes(NUMEL).bfloat16().float(),
    "all equal": torch.full((NUMEL,), -0.5),
    "all zeros": torch.zeros(NUMEL),
    "mostly zeros": random_magnitudes(NUMEL) * (torch.arange(NUMEL) % 1000 == 0),
    "larger where no sample is taken": 1.0 + (torch.arange(NUMEL) % 17 != 0),  # so the bracket is wrong
    "different where no sample is taken": 1.0 + random_magnitudes(NUMEL) * (torch.arange(NUMEL) % 17 != 0),
    "few": random_magnitudes(3),
    "one": random_magnitudes(1),
}


@pytest.mark.parametrize("name", MAGNITUDES)
@pytest.mark.parametrize("share", [0, 0.001, 0.2, 0.9, 1])
def test_the_kth_largest_magnitude_of_a_tensor_is_exact(name, share):
    values = MAGNITUDES[name]
    k = max(1, int(share * values.numel()))
    expected = values.abs().sort(descending=True).values[:k]
    wanted = (float(expected[-1]), int((expected == expected[-1]).sum()))
    assert kth_largest(values, k) == wanted
    assert kth_largest(values + 1, k, minus=torch.ones_like(values)) == kth_largest((values + 1) - 1, k)
    assert kth_largest(torch.zeros_like(values), k, minus=values) == wanted


@pytest.mark.parametrize("name", ["all different", "larger where no sample is taken"])
def test_a_bracket_holds_the_kth_largest_of_a_random_tensor_and_all_are_counted_where_it_does_not(name, monkeypatch):
    counted, count = [], arithmetic._kth_largest_by_counts
    monkeypatch.setattr(arithmetic, "_kth_largest_by_counts", lambda *given: counted.append(given) or count(*given))
    kth_largest(MAGNITUDES[name], NUMEL // 5)
    assert bool(counted) == (name != "all different")


def test_all_magnitudes_are_counted_where_too_many_lie_between(monkeypatch):
    values = random_magnitudes(NUMEL)
    wanted = kth_largest(values, 1000)
    monkeypatch.setattr(arithmetic, "_MOST_BETWEEN", 5)
    assert kth_largest(values, 1000) == wanted


def test_dare_divides_by_the_density_or_restores_the_measured_norm():
    base, tuned = [0.0] * 64, [1.0, -2.0] * 32
    draws = merged("dare", tuned, base=base, density=0.25, seed=1)["x"]
    assert {abs(value) for value in draws} == {0.0, 4.0, 8.0}
    kept = [value != 0 for value in draws]
    assert 6 <= sum(kept) <= 28
    measured = merged("dare", tuned, base=base, density=0.25, seed=1, rescale="measured")["x"]
    assert [value != 0 for value in measured] == kept  # the draws are the same
    assert sum(map(abs, measured)) == pytest.approx(sum(map(abs, tuned)), rel=1e-6)
    plain = merged("dare", tuned, base=base, density=0.25, seed=1, rescale="none")["x"]
    assert {abs(value) for value in plain} == {0.0, 1.0, 2.0}
    assert merged("dare", tuned, base=base, density=0.25, seed=2)["x"] != draws
    assert merged("dare", tuned, base=base, density=1)["x"] == tuned


def test_dare_draws_apart_for_each_model_and_each_tensor_and_keeps_the_expectation():
    base = {"a": [0.0] * 4096, "b": [0.0] * 4096}
    ones = {"a": [1.0] * 4096, "b": [1.0] * 4096}
    found = merged("dare", ones, ones, base=base, density=0.5, weights=[1, 1000])
    patterns = [[value % 1000 != 0 for value in found["a"]], [value >= 2000 for value in found["a"]]]
    patterns.append([value % 1000 != 0 for value in found["b"]])
    assert all(0.45 < sum(p) / 4096 < 0.55 for p in patterns)
    agreeing = [sum(x == y for x, y in zip(patterns[0], other, strict=True)) / 4096 for other in patterns[1:]]
    assert all(0.45 < share < 0.55 for share in agreeing)


def test_dare_ties_sums_what_agrees_and_divides_where_asked_to():
    base = [0.0, 0.0]
    assert merged("dare_ties", [1.0, -2.0], [3.0, 1.0], base=base, density=1)["x"] == [4.0, -2.0]
    assert merged("dare_ties", [1.0, -2.0], [3.0, 1.0], base=base, density=1, normalize=True)["x"] == [2.0, -2.0]


def test_magmax_keeps_the_largest_entry_and_of_equal_ones_the_first():
    assert merged("magmax", [1.0, -5.0, 2.0], [-3.0, 4.0, -2.0], base=[0.0, 0.0, 0.0])["x"] == [-3.0, -5.0, 2.0]
    assert merged("magmax", [2.0], [-2.0], base=[1.0], scale=0.5)["x"] == [-0.5]


def test_lines_scales_the_first_block_least_and_what_is_outside_of_the_blocks_like_it():
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.w" for i in range(3)), "model.norm.weight"]
    base, tuned = {name: [0.0] for name in names}, {name: [1.0] for name in names}
    assert list(merged("lines", tuned, base=base, alpha=0.2).values()) == [[0.2], [0.2], [0.6], [1.0], [0.2]]
    assert list(merged("lines", tuned, tuned, base=base).values()) == [[1.0], [1.0], [1.5], [2.0], [1.0]]
    assert merged("lines", tuned, base=base, alpha=0.2, beta=0)[names[3]] == [0.2]


def test_bang_gives_all_task_vectors_the_mean_length():
    base = {"a": [0.0, 0.0], "b": [0.0]}
    short, long = {"a": [3.0, 0.0], "b": [4.0]}, {"a": [0.0, 0.0], "b": [15.0]}
    # lengths 5 and 15, mean 10: factors 2 and 2/3
    assert merged("bang", short, long, base=base) == {"a": [3.0, 0.0], "b": [9.0]}
    # by tensor: lengths 3 and 0 in a (mean 1.5), 4 and 15 in b (mean 9.5)
    assert merged("bang", short, long, base=base, scope="tensor") == {"a": [0.75, 0.0], "b": [9.5]}
    with pytest.raises(ConfigError, match="tuned 2: is the base itself"):
        merged("bang", short, base, base=base)


# ------------------------------------------------------------------------------------------------------- coefficients


def test_a_coefficient_is_a_number_a_list_over_the_blocks_or_either_by_pattern():
    names = [
        "model.embed_tokens.weight",
        *(f"model.layers.{i}.{part}.weight" for i in range(11) for part in ("mlp.up", "attn.q")),
        "model.norm.weight",
        "lm_head.weight",
    ]
    places = places_of(names)

    def values(coefficient, *wanted):
        return [round(value_at(coefficient, places[name]), 6) for name in wanted]

    ends = (
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up.weight",
        "model.layers.10.attn.q.weight",
        "lm_head.weight",
    )
    assert values(0.5, *ends) == [0.5] * 4
    assert values([0.0, 1.0], *ends) == [0.0, 0.0, 1.0, 1.0]
    middle = ("model.layers.5.mlp.up.weight", "model.layers.2.mlp.up.weight", "model.layers.8.attn.q.weight")
    assert values([0.0, 1.0, 0.0], *middle) == [1.0, 0.4, 0.4]
    patterns = {"*.mlp.*": 0.3, "2-8": [0.0, 1.0], "*": 7.0}
    assert values(patterns, *ends, *middle) == [7.0, 0.3, 7.0, 7.0, 0.3, 0.3, 0.8]
    with pytest.raises(ConfigError, match=r'no pattern of 0-3 matches lm_head.weight; end with "\*"'):
        value_at({"0-3": 1.0}, places["lm_head.weight"])


def test_names_of_blocks_in_other_families_are_understood():
    places = places_of(["gpt_neox.layers.4.attention.dense.bias", "transformer.h.2.ln_1.weight", "model.norm.weight"])
    assert [place.block for place in places.values()] == [4, 2, None]


# ---------------------------------------------------------------------------------------------------------- snapshots


def test_snapshots_of_single_steps_stand_for_the_steps_since_the_one_before():
    from safecl.merging.averages._profiles import gamma_of

    gamma = gamma_of(0.2)
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(0.04)
    first = 0.5 ** (gamma + 1)
    found = merged("post_hoc_ema", [0.0], [1.0], sigma_rel=0.2)["x"]  # steps 100 and 200
    assert found == [pytest.approx(1 - first, abs=1e-6)]
    assert merged("post_hoc_ema", [1.0], [0.0], sigma_rel=0.2, steps=[200, 100])["x"] == found
    assert merged("post_hoc_ema", [3.0], [3.0], [3.0])["x"] == [3.0]


@pytest.mark.parametrize("profile", ["ema", "power"])
def test_the_average_of_another_width_is_made_from_stored_averages(profile):
    """Against averages that are kept while the weights move; the snapshots are taken at every eighth of the run."""
    from safecl.merging.averages._profiles import gamma_of

    num_steps, wanted, sigmas, eta = 800, 0.15, (0.05, 0.1), 0.995
    steps = torch.arange(1, num_steps + 1, dtype=torch.float64)
    path = torch.stack([torch.sin(steps / 90), (steps / num_steps) ** 2, torch.exp(-steps / 200)], 1)

    def power_average(sigma: float, end: int) -> torch.Tensor:
        weights = steps[:end] ** gamma_of(sigma)
        return (weights[:, None] * path[:end]).sum(0) / weights.sum()

    snapshots, settings = [], {"steps": []}
    for end in range(num_steps // 8, num_steps + 1, num_steps // 8):
        if profile == "power":
            snapshots += [power_average(sigma, end).tolist() for sigma in sigmas]
            settings["steps"] += [end, end]
            settings["sigma_rels"] = [*settings.get("sigma_rels", []), *sigmas]
        else:
            average = path[0].clone()
            for step in range(1, end):
                average = eta * average + (1 - eta) * path[step]
            snapshots.append(average.tolist())
            settings |= {"steps": [*settings["steps"], end], "decay": eta}
    found = torch.tensor(merged("post_hoc_ema", *snapshots, profile=profile, sigma_rel=wanted, **settings)["x"])
    expected = power_average(wanted, num_steps)
    last = torch.tensor(snapshots[-1], dtype=torch.float64)
    error = float((found - expected).norm() / (last - expected).norm())
    assert error < (0.01 if profile == "power" else 0.1)
