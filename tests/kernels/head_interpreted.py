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
    found["a masked label"] = test_head.test_a_masked_label_is_infinitely_unlikely_with_a_finite_gradient
    return found


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
