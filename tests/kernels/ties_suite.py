"""The checks that every back end of the ties family must pass, as plain functions, and their oracle in numpy's fp64.

Tests run them, and each break on the mutation list must make one of them fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from safecl.kernels import Trim, count_bracket, elected_sum_
from tests.kernels.flat_oracle import relative_error
from tests.kernels.flat_suite import Guarded

SIZES = (1, 3, 15, 16, 17, 63, 64, 65, 129, 1000, 20_001)
ALL = Trim(0.0, 0)


@dataclass(frozen=True)
class Case:
    """An election. kept: the share of each vector's entries that its trim keeps, 1 for all."""

    weights: tuple[float, ...] = (1.0, 1.0)
    kept: tuple[float, ...] = (0.2, 0.2)
    scale: float = 1.0
    normalize: bool = True
    subtract: bool = True
    bf16: bool = False


CASES = {
    "ties": Case(),
    "ties of bf16 models": Case(bf16=True, kept=(0.2, 0.5)),
    "scaled": Case(scale=0.7),
    "a sum": Case(normalize=False, scale=-0.3),
    "weights": Case(weights=(2.0, -0.3), kept=(0.5, 0.9)),
    "one vector": Case(weights=(0.5,), kept=(0.1,)),
    "three vectors": Case(weights=(1.0, 0.5, 0.25), kept=(0.3, 1.0, 0.01), bf16=True),
    "task vectors": Case(subtract=False, kept=(1.0, 1.0)),
    "trimmed task vectors": Case(subtract=False, bf16=True),
    "nothing trimmed": Case(kept=(1.0, 1.0)),
}


def inputs(case: Case, numel: int) -> tuple[Tensor, list[Tensor], list[Trim]]:
    generator = torch.Generator().manual_seed(numel)

    def randn(size: float) -> Tensor:
        return size * torch.randn(numel, generator=generator)

    target = randn(0.02)
    vectors = [(target if case.subtract else 0) + randn(0.005) for _ in case.weights]
    if case.bf16:
        target, *vectors = (each.bfloat16().float() for each in (target, *vectors))
    taus = [vector - target if case.subtract else vector for vector in vectors]
    return target, vectors, [trim_of(tau, share) for tau, share in zip(taus, case.kept, strict=True)]


def trim_of(tau: Tensor, share: float) -> Trim:
    """By sorting; about half of the entries equal to the threshold stay."""
    if share == 1:
        return ALL
    threshold = float(tau.abs().sort(descending=True).values[int(share * (tau.numel() - 1))])
    return Trim(threshold, int((tau.abs() == threshold).sum() + 1) // 2)


# --------------------------------------------------------------------------------------------------------------- oracle


def election(case: Case, target: Tensor, vectors: list[Tensor], trims: list[Trim]) -> tuple[np.ndarray, list[int]]:
    """Return the new target in fp64, and how many entries equal to its threshold each vector keeps."""
    kept, numbers = [], []
    for vector, (threshold, num_equal) in zip(vectors, trims, strict=True):
        tau = (vector - target).numpy() if case.subtract else vector.numpy()  # the difference is that of fp32 numbers
        equal = np.abs(tau) == np.float32(threshold)
        first = equal & (np.cumsum(equal) <= num_equal)
        numbers.append(int(first.sum()) if threshold else 0)
        kept.append(np.where((np.abs(tau) > np.float32(threshold)) | first, tau, 0).astype(np.float64))
    weighted = [np.float64(np.float32(w)) * tau for w, tau in zip(case.weights, kept, strict=True)]
    sign = np.where(sum(weighted) >= 0, 1.0, -1.0)
    total, divisor = np.zeros(len(sign)), np.zeros(len(sign))
    for weight, value in zip(case.weights, weighted, strict=True):
        agrees = value * sign > 0
        total[agrees] += value[agrees]
        divisor[agrees] += weight
    divisor[divisor == 0] = 1
    return target.numpy() + case.scale * total / (divisor if case.normalize else 1), numbers


# --------------------------------------------------------------------------------------------------------------- checks


def elect(case: Case, target: Tensor, vectors: list[Tensor], trims: list[Trim]) -> list[int]:
    settings = {"scale": case.scale, "normalize": case.normalize, "subtract": case.subtract}
    return elected_sum_(target, vectors, case.weights, trims=trims, **settings)


def check_election(case: Case, numel: int) -> None:
    target, vectors, trims = inputs(case, numel)
    buffers = [Guarded(each, lead, "cpu") for lead, each in enumerate((target, *vectors), start=3)]
    kept = elect(case, buffers[0].inner, [buffer.inner for buffer in buffers[1:]], trims)
    wanted, numbers = election(case, target, vectors, trims)
    assert kept == numbers
    assert relative_error(buffers[0].inner, torch.from_numpy(wanted), target) < 1e-6
    buffers[0].assert_surroundings_untouched()
    for buffer in buffers[1:]:
        buffer.assert_untouched()


def check_first_of_equals(num_equal: int, numel: int = 200) -> None:
    """All entries have one magnitude, so that a trim ends within a group, at its end, or nowhere."""
    signs = torch.where(torch.arange(numel) % 3 == 0, -1.0, 1.0)
    target = torch.zeros(numel)
    kept = elected_sum_(target, [0.5 * signs], [1.0], trims=[Trim(0.5, num_equal)])
    assert kept == [min(num_equal, numel)]
    assert torch.equal(target, torch.where(torch.arange(numel) < num_equal, 0.5 * signs, torch.zeros(numel)))


def check_convention() -> None:
    """A sum of 0 counts as plus, a threshold of 0 keeps all, and weights whose sum is 0 divide nothing."""
    target = torch.zeros(4)
    up, down = torch.tensor([1.0, -2.0, 0.0, -0.0]), torch.tensor([-1.0, 2.0, -0.0, 0.0])
    assert elected_sum_(target, [up, down], [1.0, 1.0], trims=[ALL, Trim(0.0, 3)], normalize=True) == [0, 0]
    assert target.tolist() == [1.0, 2.0, 0.0, 0.0]
    target = torch.zeros(2)
    elected_sum_(target, [torch.ones(2), -torch.ones(2)], [1.0, -1.0], normalize=True)
    assert target.tolist() == [2.0, 2.0]


def check_no_change(numel: int = 100) -> None:
    """Models that are the base leave it bitwise as it is, whatever is trimmed."""
    target = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    before = target.clone()
    elected_sum_(target, [before.clone(), before.clone()], [1.0, 1.0], trims=[Trim(0.1, 2), ALL], subtract=True)
    assert torch.equal(target, before)


def check_infinite() -> None:
    """Differences beyond fp32 are the largest magnitudes, and show in the result."""
    largest = torch.finfo(torch.float32).max
    target, vector = torch.tensor([-largest, 0.0, 0.0]), torch.tensor([largest, 1.0, 2.0])
    assert count_bracket(vector, 2.0, math.inf, torch.empty(0), minus=target) == (0, 1, 0, 1)
    assert elected_sum_(target, [vector], [1.0], trims=[Trim(math.inf, 1)], subtract=True) == [1]
    assert target.tolist() == [math.inf, 0.0, 0.0]


def brackets(sizes: np.ndarray) -> list[tuple[float, float]]:
    some = float(sizes[len(sizes) // 3])
    middle = [float(value) for value in np.sort(sizes)[[len(sizes) // 3, 2 * len(sizes) // 3]]]
    return [(middle[0], middle[1]), (some, some), (0.0, some), (some, math.inf), (0.0, math.inf), (0.0, 0.0)]


def check_bracket(numel: int, bf16: bool, subtract: bool) -> None:
    target, (vector, *_), _ = inputs(Case(bf16=bf16), numel)
    buffers = [Guarded(each, lead, "cpu") for lead, each in enumerate((vector, target), start=3)]
    sizes = np.abs((vector - target if subtract else vector).numpy())
    for low, high in brackets(sizes):
        wanted = sizes[(sizes > low) & (sizes < high)]
        for capacity in (numel, max(1, len(wanted) // 2)):
            room = Guarded(torch.full((capacity,), -1.0), 5, "cpu")
            given = {"minus": buffers[1].inner} if subtract else {}
            counts = count_bracket(buffers[0].inner, low, high, room.inner, **given)
            assert counts.num_above == int((sizes > high).sum())
            assert counts.num_high == int((sizes == high).sum())
            assert counts.num_low == (int((sizes == low).sum()) if low < high else 0)
            assert counts.num_between == len(wanted)
            filled = min(len(wanted), capacity)
            assert np.array_equal(room.inner[:filled].numpy(), wanted[:filled])
            assert bool((room.inner[filled:] == -1).all())
            room.assert_surroundings_untouched()
    for buffer in buffers:
        buffer.assert_untouched()


def check_no_room(numel: int = 100) -> None:
    values = torch.arange(float(numel))
    assert count_bracket(values, 10.0, 20.0, torch.empty(0)) == (79, 1, 9, 1)


def all_checks(sizes: tuple[int, ...] = SIZES) -> list[tuple[str, Callable[[], None]]]:
    checks = [
        (f"{name}, {n} elements", lambda c=case, n=n: check_election(c, n))
        for name, case in CASES.items()
        for n in sizes
    ]
    checks += [
        (f"bracket, bf16 {b}, minus {m}, {n}", lambda n=n, b=b, m=m: check_bracket(n, b, m))
        for n in sizes
        for b in (False, True)
        for m in (False, True)
    ]
    checks += [
        (f"the first {n} of equals", lambda n=n: check_first_of_equals(n))
        for n in (0, 1, 63, 64, 70, 128, 199, 200, 500)
    ]
    return [
        *checks,
        ("convention", check_convention),
        ("no change", check_no_change),
        ("infinite", check_infinite),
        ("no room", check_no_room),
    ]


def mutation_checks(backend: str) -> list[tuple[str, Callable[[], None]]]:
    """The checks that must notice a break; the twin works in chunks of few elements."""
    from safecl.kernels.ties import torch_twin

    torch_twin.CHUNK = 100
    return all_checks((7, 1000))


def all_results(numel: int) -> dict[str, Tensor]:
    """One call of everything, by name; bitwise comparable."""
    found = {}
    for name, case in CASES.items():
        target, vectors, trims = inputs(case, numel)
        kept = elect(case, target, vectors, trims)
        found |= {name: target, f"{name} kept": torch.tensor(kept)}
        low, high = sorted((0.9 * trims[0].threshold, trims[0].threshold))
        between = torch.zeros(numel // 2)
        counts = count_bracket(vectors[0], low, high, between, minus=target if case.subtract else None)
        found |= {f"{name} counts": torch.tensor(counts), f"{name} between": between}
    return found
