"""The Fisher-weighted penalty of a low-rank update equals its formula in fp64, values and gradients, whatever the
blocks."""

from __future__ import annotations

import pytest
import torch

from safecl.kernels import lowrank_fisher_penalty


def inputs(out: int = 37, width: int = 29, rank: int = 5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((rank, width), (out, rank)))
    fisher = torch.rand(out, width, generator=generator) ** 4
    return a.requires_grad_(), b.requires_grad_(), fisher


def oracle(a, b, fisher, scale: float):
    """(loss, dA, dB) from the whole product in fp64."""
    a, b, fisher = (tensor.detach().double() for tensor in (a, b, fisher))
    product = scale * b @ a
    return 0.5 * (fisher * product**2).sum(), scale * b.T @ (fisher * product), scale * (fisher * product) @ a.T


def distance(found, expected) -> float:
    return float((found.detach().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("block_bytes", [1, 4 * 29 * 10, 2**26])
def test_value_and_gradients_equal_the_formula_in_fp64(block_bytes):
    a, b, fisher = inputs()
    loss = lowrank_fisher_penalty(a, b, fisher, 1.7, block_bytes=block_bytes)
    (3.0 * loss).backward()
    expected, da, db = oracle(a, b, fisher, 1.7)
    assert distance(loss, expected) <= 1e-6
    assert distance(a.grad, 3.0 * da) <= 1e-6 and distance(b.grad, 3.0 * db) <= 1e-6


def test_16_bit_factors_and_fisher_are_widened_before_anything_is_multiplied():
    a, b, fisher = inputs(dtype=torch.bfloat16)
    fisher = fisher.bfloat16()
    loss = lowrank_fisher_penalty(a, b, fisher, 0.5)
    loss.backward()
    expected, da, db = oracle(a, b, fisher, 0.5)
    assert distance(loss, expected) <= 1e-6
    assert (
        distance(a.grad, da) <= 4e-3 and distance(b.grad, db) <= 4e-3
    )  # the gradient is rounded once, to the factor's dtype


def test_a_fresh_adapter_has_no_penalty_and_no_gradient():
    a, b, fisher = inputs()
    b.data.zero_()
    loss = lowrank_fisher_penalty(a, b, fisher)
    loss.backward()
    assert float(loss.detach()) == 0.0 and not a.grad.any() and not b.grad.any()


def test_no_more_than_a_few_blocks_are_held():
    out, width, rank, rows = 512, 512, 2, 8
    a, b, fisher = inputs(out, width, rank)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.data_ptr() != fisher.data_ptr():
                sizes.append(result.numel())
            return result

    with Watch():
        lowrank_fisher_penalty(a, b, fisher, block_bytes=4 * width * rows).backward()
    assert max(sizes) <= rows * width


@pytest.mark.parametrize(("shape", "message"), [((37, 28), r"\[out, in\]"), ((36, 29), r"\[out, in\]")])
def test_shapes_that_do_not_fit_are_named(shape, message):
    a, b, _ = inputs()
    with pytest.raises(ValueError, match=message):
        lowrank_fisher_penalty(a, b, torch.zeros(shape))
