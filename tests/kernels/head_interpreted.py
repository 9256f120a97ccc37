"""The head's Triton kernels on a CPU, through Triton's interpreter:  python -m tests.kernels.head_interpreted

Prints one JSON object, check -> what went wrong ("" for nothing). A process of its own, because TRITON_INTERPRET counts
when triton is imported.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"

BLOCK = 512  # two blocks per row of 700, the second one partial


def checks() -> dict[str, Callable[[], None]]:
    """Every case of the suite on four tokens, and the edges that live in the row work."""
    from tests.kernels import head_suite, test_distill_loss, test_head

    found = {}
    for name, case in head_suite.CASES.items():
        small = case.but(
            tokens=4, vocab=700, teacher_vocab=case.teacher_vocab and case.teacher_vocab - 300, k=min(case.k, 3)
        )
        found[name] = lambda small=small: head_suite.check(small, head_suite.BOUNDS[small.dtype] * 2)
    for divergence in ("forward_kl", "reverse_kl", "jsd", "mse"):
        found[f"{divergence}: a masked token is not there"] = lambda d=divergence: head_suite.check_masked(d, tokens=3)
        found[f"{divergence}: p equal to q is exactly zero"] = lambda d=divergence: head_suite.check_equal(d, tokens=3)
    found["k = V equals dense"] = lambda: head_suite.check_whole_vocabulary("jsd", "tail", tokens=3)
    found["a loss below resolution is not negative"] = head_suite.check_not_negative
    found["given logits"] = head_suite.check_given_logits
    found["rows of weight 0"] = test_distill_loss.test_rows_of_weight_zero_are_never_read
    found["a teacher that excludes a token"] = test_head.test_a_teacher_that_excludes_a_token_pushes_it_down
    found["an infinite loss"] = (
        test_head.test_a_student_without_mass_where_the_teacher_has_it_is_infinitely_far_with_a_finite_gradient
    )
    found["padded rows"] = check_padded
    found["a masked label"] = test_head.test_a_masked_label_is_infinitely_unlikely_with_a_finite_gradient
    return found


def check_padded() -> None:
    """An odd vocabulary in a padded tile gives bitwise what it gives without padding, and nothing beyond it."""
    import torch

    from safecl.kernels.head import triton_rows
    from safecl.kernels.head.backend import RowOptions
    from safecl.kernels.head.matmul import padded_width

    vocab, generator = 699, torch.Generator().manual_seed(0)

    def padded(values: torch.Tensor) -> torch.Tensor:
        tile = torch.full((len(values), padded_width(vocab)), float("-inf"))
        tile[:, :vocab] = values
        return tile[:, :vocab]

    student, teacher = (torch.randn(3, vocab, generator=generator) for _ in range(2))
    labels, weights = torch.tensor([5, 698, -100]), torch.ones(3)
    log_q = torch.full((3, 4), -2.0)
    stored = log_q, torch.tensor([[0, 5, 9, 698]] * 3), torch.full((3,), -0.8)
    for divergence in ("none", "forward_kl", "reverse_kl", "jsd", "mse", "topk"):
        results = []
        for make, is_padded in ((torch.clone, False), (padded, True)):
            options = RowOptions("forward_kl" if divergence in ("none", "topk") else divergence, padded=is_padded)
            gradient = make(torch.zeros(3, vocab))
            if divergence == "topk":
                found = triton_rows.topk_rows(make(student), *stored, labels, weights, weights, options, gradient)
            else:
                dense = None if divergence == "none" else make(teacher)
                found = triton_rows.dense_rows(make(student), dense, labels, weights, weights, options, gradient)
            results.append((*found, gradient))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), divergence
        beyond = torch.as_strided(results[1][-1], (3, padded_width(vocab)), (padded_width(vocab), 1))[:, vocab:]
        assert not beyond.any(), f"{divergence}: a gradient of tokens that are not there"


def outcome(check: Callable[[], None]) -> str:
    try:
        check()
    except Exception:
        return traceback.format_exc(limit=-2)
    return ""


def run_all() -> dict[str, str]:
    from safecl.kernels import backends
    from safecl.kernels.head import triton_rows

    triton_rows.BLOCK = BLOCK
    with backends.using("triton"):
        return {name: outcome(check) for name, check in checks().items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy on infinities
    json.dump(run_all(), sys.stdout)
