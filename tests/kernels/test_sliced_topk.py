"""A head that comes in slices gives the top-k teacher of the whole head."""

from __future__ import annotations

import pytest
import torch

from safecl.kernels import SlicedTopK, linear_topk

VOCAB, HIDDEN, ROWS = 211, 24, 300


def head(dtype=torch.float32, spread: float = 1.0):
    generator = torch.Generator().manual_seed(11)
    weight = spread * torch.randn(VOCAB, HIDDEN, generator=generator)
    return (
        torch.randn(ROWS, HIDDEN, generator=generator).to(dtype),
        weight.to(dtype),
        torch.randn(VOCAB, generator=generator).to(dtype),
    )


def sliced(hidden, weight, bias, k, bounds, **options):
    found = SlicedTopK(hidden, k, **options)
    for start, end in bounds:
        found.add(start, weight[start:end], None if bias is None else bias[start:end])
    return found.result()


@pytest.mark.parametrize("bounds", [[(0, 211)], [(0, 50), (50, 100), (100, 211)], [(100, 211), (0, 3), (3, 100)]])
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "softcap": 30.0}, {"logit_scale": 0.25}])
def test_slices_of_any_width_and_order_give_the_whole_heads_teacher(bounds, options):
    hidden, weight, bias = head()
    found, expected = (
        sliced(hidden, weight, bias, 8, bounds, **options),
        linear_topk(hidden, weight, 8, bias=bias, **options),
    )
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.log_tail, expected.log_tail, rtol=1e-5, atol=1e-6)
    assert (found.vocab_size, found.temperature) == (VOCAB, options.get("temperature", 1.0))


def test_the_tail_of_a_peaky_distribution_keeps_its_digits():
    hidden, weight, _ = head(spread=12.0)
    found = sliced(hidden, weight, None, 8, [(0, 70), (70, 140), (140, 211)])
    log_probs = (hidden.double() @ weight.double().T).log_softmax(-1)
    expected = log_probs.scatter(-1, log_probs.topk(8).indices, float("-inf")).logsumexp(-1)
    assert expected.min() < -30.0
    assert float((found.log_tail - expected).abs().max()) < 1e-3


def test_bf16_operands_give_what_the_whole_head_gives():
    hidden, weight, _ = head(torch.bfloat16)
    found, expected = sliced(hidden, weight, None, 8, [(0, 100), (100, 211)]), linear_topk(hidden, weight, 8)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)


def test_all_tokens_of_the_vocabulary_may_be_asked_for():
    hidden, weight, _ = head()
    found = sliced(hidden, weight, None, 1000, [(0, 100), (100, 211)])
    assert found.indices.shape == (ROWS, VOCAB) and bool((found.log_tail == float("-inf")).all())
    torch.testing.assert_close(found.log_probs.exp().sum(-1), torch.ones(ROWS))
    assert bool((found.indices.sort(-1).values == torch.arange(VOCAB)).all())
