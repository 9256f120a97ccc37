"""Comparing tensors by relative norm, with bounds that can fail."""

from __future__ import annotations

import torch
from torch import Tensor

LOOSEST = 0.1


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in fp64."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return float((actual - expected).norm() / expected.norm())


def assert_close(actual: Tensor, expected: Tensor, bound: float, what: str = "tensor") -> None:
    """||actual - expected|| <= bound·||expected||.

    A zero tensor has error 1 whatever the scale of the expected one, so a bound near 1 proves nothing and is refused,
    and so is an expected tensor of zeros (use assert_zero) or one that is not finite.
    """
    assert 0 < bound <= LOOSEST, f"a bound of {bound} is no test: zeros have an error of 1"
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(expected).all(), f"{what}: the expected values are not finite"
    assert expected.detach().double().norm() > 0, f"{what}: nothing to compare with, every expected value is 0"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    error = relative_error(actual, expected)
    assert error <= bound, f"{what}: relative error {error:.2e}, allowed {bound:.0e}"


def assert_zero(actual: Tensor, what: str = "tensor") -> None:
    """Exactly zero everywhere."""
    assert torch.equal(actual, torch.zeros_like(actual)), f"{what}: not exactly 0 (largest {actual.abs().max():.2e})"
