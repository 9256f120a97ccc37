"""The head's peak memory on a CPU, from every allocation and release in torch's profiler."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from safecl.kernels import DenseTeacher, linear_distill_loss, linear_topk

WIDTH, VOCAB, TILE_BYTES = 32, 4000, 2**23
ROW_WORK = 10 * 2**20  # its buffers of a few rows, 1 MiB each whatever the shape; losses and indices


def peak_of(run) -> int:
    """Largest number of bytes alive at once beside what was alive before; what ``run`` returns counts."""
    run()  # what is allocated once
    gc.collect()
    gc.disable()  # what earlier tests have left must not be released in between
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            kept = run()
    finally:
        gc.enable()
    changes = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert changes, "the profiler saw no allocation"
    del kept
    alive = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def transient(tokens: int, trainable: bool = True, teacher: str = "dense", width: int = WIDTH, **options) -> int:
    """Peak bytes of one forward and backward beside inputs and returned gradients."""
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(VOCAB, width, requires_grad=trainable)
    labels = torch.randint(0, VOCAB, (tokens,))
    made = DenseTeacher(hidden.detach() + 0.1, weight.detach())
    if teacher == "topk":
        made = linear_topk(made.hidden, made.weight, 8)

    def run():
        """Hands the gradients over. Were they released by the next call, that would count now and then, and the peak be
        lower by all of dW: the profiler knows the size of a block from before its start only where an earlier profile
        has seen one at its address."""
        linear_distill_loss(
            hidden, weight, labels=labels, teacher=made, tile_bytes=TILE_BYTES, **options
        ).loss.backward()
        grads, hidden.grad, weight.grad = (hidden.grad, weight.grad), None, None
        return grads

    returned = hidden.numel() * 4 + (weight.numel() * 4 if trainable else 0)
    return peak_of(run) - returned


@pytest.mark.parametrize("divergence, trainable", [("forward_kl", True), ("jsd", False)])
def test_the_peak_is_the_budget_and_dw_and_the_hidden_gradient(divergence, trainable):
    tokens = 6000  # one [tokens, vocab] of fp32 is 96 MB, a naive loss holds six, the bound is 21 MB
    bound = TILE_BYTES + (4 * VOCAB * WIDTH if trainable else 0) + 4 * tokens * WIDTH + ROW_WORK
    assert transient(tokens, trainable, divergence=divergence) <= bound < 4 * tokens * VOCAB / 4


def test_the_backward_holds_the_gradient_of_the_head_once():
    width = 1024  # dW is twice the tiles
    assert transient(64, width=width) <= 4 * VOCAB * width + 4 * 64 * width + ROW_WORK


def test_four_times_the_tokens_cost_no_more_logits():
    few, many = transient(1000), transient(4000)
    more = 3000 * (4 * WIDTH + 64)  # the hidden states' gradient, and losses, weights and labels per token
    assert many - few <= more < 3000 * 4 * VOCAB / 10


def test_a_top_k_teacher_needs_no_second_tile():
    assert transient(2000, trainable=False, teacher="topk") <= TILE_BYTES + 4 * 2000 * WIDTH + ROW_WORK


def test_the_measure_sees_logits_that_are_held_whole():
    hidden, weight = torch.randn(500, WIDTH), torch.randn(VOCAB, WIDTH)
    assert peak_of(lambda: (hidden @ weight.T).logsumexp(-1)) >= 4 * 500 * VOCAB
