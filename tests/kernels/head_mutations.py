"""Break the head deliberately, one line at a time, and report which breaks the checks do not notice.

    python -m tests.kernels.head_mutations torch | triton

Each mutant is a copy of the package with one line changed, imported instead of the original. Torch mutants must fail
``quick_checks``, Triton mutants the checks of ``head_interpreted``.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]

# name -> (place, old, new): the first ``old`` after the first ``place`` becomes ``new``
SEGMENTS = {
    "dX zeroed": ("def store_hidden", "[start:end] = grad", "[start:end] = 0"),
    "dX of selected rows zeroed": ("def store_hidden", "grad.to(", "0 * grad.to("),
    "dW of the last chunk only": ("def add_product", "x, first)", "x, True)"),
    "db forgotten": ("def add_product", "self.bias += dlogits", "self.bias += 0 * dlogits"),
    "ignored rows not masked": ("def split_rows", "(call.labels != call.ignore_index) & ", ""),
    "teacher rows in order of the batch": (
        "def _segment",
        "positions = teacher_position if",
        "positions = None if True else teacher_position if",
    ),
}
CHUNKS = {"ce weights for kd": ("def row_losses", "call.kd_weights[index]", "call.ce_weights[index]")}
SPANS = {
    "last partial chunk skipped": (
        "def spans",
        "range(0, total, step)",
        "range(0, total - total % step if total > step else total, step)",
    )
}
MATMUL = {
    "logits rounded to bf16": (
        "def project",
        "torch.mm(x, weight.t(), out=out, **options)",
        "out.copy_(torch.mm(x, weight.t()).bfloat16())",
    ),
    "dW zeroed": ("def accumulate_", "torch.mm(dlogits.t(), x, out=total, **options)", "total.zero_()"),
}
CALLS = {
    "z-loss not in the value": ("def _linear_distill", "result.ce + z_loss * result.logsumexp.square()", "result.ce"),
    "upstream gradient ignored": ("def _backward", "grad_loss * scale", "scale"),
    "teacher softcap dropped": ("def _flat_teacher", "teacher.softcap", "None"),
}
DIVERGENCES = {
    "KL swapped, near form": ("def _near_terms", '== "forward_kl"', '== "reverse_kl"'),
    "KL swapped, far form": ("def _far_terms", '== "forward_kl"', '== "reverse_kl"'),
    "1/T missing": ("def dense_divergence", "options.kd_scale / options.temperature", "options.kd_scale"),
    "1/T missing against a top-k teacher": (
        "def topk_event_gradients",
        "options.kd_scale / options.temperature",
        "options.kd_scale",
    ),
    "T^2 missing": ("def dense_divergence", "return loss * options.kd_scale", "return loss"),
    "tail term missing": ("def topk_event_gradients", "log_tail[:, None]", "log_tail[:, None] - 50"),
    "tail formed as 1 - sum": (
        "def topk_divergence",
        "log_rest = torch.logsumexp(rest, -1, keepdim=True)",
        "log_rest = torch.log((torch.logsumexp(z, -1).exp() - top.exp().sum(-1)).clamp(min=1e-8))[:, None]",
    ),
    "tail spread over V": ("def spread_tail", "max(vocab - indices.shape[-1], 1)", "vocab"),
    "truncated gradient without Q": ("def truncated_terms", "-q.sum(-1, keepdim=True)", "-torch.ones_like(p[:, :1])"),
    "mse not centred": ("def mse_terms", "difference - difference.sum(-1, keepdim=True) / count", "difference"),
    "softcap slope dropped": ("def shape_backward_", "1 - (logits", "1 - 0 * (logits"),
    "logit scale dropped in the gradient": ("def shape_backward_", "grad.mul_(logit_scale)", "grad"),
    "z-loss not in the gradient": ("def cross_entropy_terms", "2 * z_loss", "0"),
    "label's -1 missing": ("def cross_entropy_terms", "-torch.where(has_label", "0 * torch.where(has_label"),
    "beta swapped": ("def _near_terms", "torch.mul(e, beta, out=terms)", "torch.mul(e, 1 - beta, out=terms)"),
    "JSD without E": ("def _near_terms", "p_grad, p_grad.sum(-1, keepdim=True)", "p_grad, None"),
    "plain sum for the loss": (
        "def _near_terms",
        "torch.sub(r, e, out=terms).addcmul_(e, r)",
        "torch.addcmul(r, e, r, out=terms)",
    ),
}
TORCH_TWIN = {"kd weights ignored": ("def _weighted_gradient", "addcmul_(kd_grad, weights)", "add_(kd_grad)")}
GATHERED = {
    "gathered dW dropped": ("def _store_gradients", "index_add_", "index_add"),
    "gathered dX dropped": ("def _store_gradients", "torch.bmm(grad[:, None, :], rows)[:, 0]", "0 * x"),
}
TRITON_MATH = {
    "KL swapped": (
        "def dense_terms",
        "log_p * LN_2, log_q * LN_2, p, q, r, beta",
        "log_q * LN_2, log_p * LN_2, q, p, -r, beta",
    ),
    "lanes joined without rescaling": ("def finish_sum", "total * tl.exp2(peak - top)", "total"),
    "series cut off": ("def exp_excess", "r * (1 / 6", "0 * (1 / 6"),
    "mixture weights swapped, near form": ("def event_terms", "log1p_series(beta * e)", "log1p_series((1 - beta) * e)"),
    "mixture weights swapped, far form": ("def event_terms", "beta * q + (1 - beta) * p", "(1 - beta) * q + beta * p"),
    "softcap slope dropped": ("def shape_backward", "grad * (1 - (z / cap) * (z / cap))", "grad"),
    "logit scale dropped in the gradient": ("def shape_backward", "grad * scale", "grad"),
}
TRITON_KERNELS = {
    "1/T missing": ("def dense_rows_kernel", "kd_scale * inverse_t", "kd_scale"),
    "1/T missing against a top-k teacher": ("def topk_rows_kernel", "kd_scale * inverse_t", "kd_scale"),
    "last partial block skipped": (
        "def _gradient_pass",
        "range(0, vocab, BLOCK)",
        "range(0, vocab // BLOCK * BLOCK, BLOCK)",
    ),
    "statistics of the first block only": ("def _statistics", "range(0, vocab, BLOCK)", "range(0, BLOCK, BLOCK)"),
    "E forgotten": ("def _gradient_pass", "kd_grad -= p * expected", "kd_grad -= 0"),
    "tail term missing": ("def _topk_events", " + tail_term", ""),
    "tail gradient missing": ("def _topk_events", "rest_grad = tail_grad - p_tail * expected", "rest_grad = 0.0"),
    "rest of a truncated teacher unmoved": ("def _topk_events", "-tl.exp(rest - lse) * expected", "0.0"),
    "label's -1 missing": ("def _gradient_pass", "tl.where(cols == label, ce_weight, 0.0)", "0.0"),
    "z-loss not in the gradient": ("def _store_cross_entropy", "2 * z_loss", "0"),
}
TRITON_ROWS = {
    "scattered gradients forgotten": (
        "def topk_rows(",
        "dlogits.scatter_(1, indices, top_grad.to(dlogits.dtype))",
        "pass",
    ),
    "shared vocabulary ignored": ("def dense_rows(", "min(vocab, teacher.shape[1])", "vocab"),
}
LISTS = {
    "torch": {
        "spans.py": SPANS,
        "head/segments.py": SEGMENTS,
        "head/chunks.py": CHUNKS,
        "head/matmul.py": MATMUL,
        "head/calls.py": CALLS,
        "head/divergences.py": DIVERGENCES,
        "head/torch_twin.py": TORCH_TWIN,
        "head/gathered.py": GATHERED,
    },
    "triton": {
        "head/triton_math.py": TRITON_MATH,
        "head/triton_kernels.py": TRITON_KERNELS,
        "head/triton_rows.py": TRITON_ROWS,
    },
}


def quick_checks() -> dict[str, Callable[[], None]]:
    """Return checks of the suite that take a few seconds and together reach every line."""
    from tests.kernels import head_suite, test_head, test_head_topk

    found = {name: lambda case=case: head_suite.check(case) for name, case in head_suite.CASES.items()}
    found["chunks"] = lambda: head_suite.check(
        head_suite.Case(tokens=21, tile_rows=8, labels="all", teacher_rows="all")
    )
    found["far form"] = lambda: head_suite.check(head_suite.Case(std=40.0, drift=1.0))
    found["scaled"] = head_suite.check_scaled
    found["not negative"] = head_suite.check_not_negative
    found["one-hot"] = test_head.test_a_one_hot_teacher_is_cross_entropy
    found["ignored token"] = test_head.test_any_token_can_be_the_ignored_one
    found["tail"] = test_head_topk.test_the_students_tail_is_right_where_one_minus_the_sum_is_noise
    found["near"] = head_suite.check_near
    return found


def first_failure(backend: str, tree: Path) -> str:
    """Return the first check that the kernels of ``tree`` fail, or "" if they pass all.

    The checks run in a forked child, which imports safecl anew.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.chdir(tree)
            sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", str(ROOT)))]
            for name in [name for name in sys.modules if name.split(".")[0] in ("safecl", "tests")]:
                del sys.modules[name]
            answer = _first_of(backend, tree)
        except BaseException as error:
            answer = f"import: {error}"
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the checks crashed"
    return answer


def _first_of(backend: str, tree: Path) -> str:
    backends = importlib.import_module("safecl.kernels.backends")
    assert Path(backends.__file__).is_relative_to(tree), backends.__file__
    if backend == "triton":
        runner = importlib.import_module("tests.kernels.head_interpreted")
        importlib.import_module("safecl.kernels.head.triton_rows").BLOCK = runner.BLOCK
        checks = runner.checks()
    else:
        checks = importlib.import_module("tests.kernels.head_mutations").quick_checks()
    with backends.using(backend):
        for name, check in checks.items():
            try:
                check()
            except AssertionError:
                return name
    return ""


def survivors(backend: str) -> list[str]:
    """Return the names of the mutants that pass every check."""
    failure = first_failure(backend, ROOT)
    if failure:
        raise SystemExit(f"the unbroken {backend} kernels fail {failure}")
    found = []
    for path, mutations in LISTS[backend].items():
        for name, (place, old, new) in mutations.items():
            with tempfile.TemporaryDirectory() as folder:
                tree = _copy_tree(Path(folder))
                file = tree / "safecl/kernels" / path
                source = file.read_text()
                before, here, after = source.partition(place)
                assert here and old in after, f"{name}: no {old!r} after {place!r} in {path}"
                file.write_text(before + here + after.replace(old, new, 1))
                failure = first_failure(backend, tree)
            print(f"{backend}: {name}: {failure or 'NOT NOTICED'}", flush=True)
            found += [] if failure else [name]
    return found


def warm_up() -> None:
    """Load what the first custom operator needs, so that the forked children need not do it again."""

    @torch.library.custom_op("safecl_warm_up::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    double.register_fake(torch.empty_like)
    double.register_autograd(lambda ctx, grad: grad, setup_context=lambda ctx, inputs, output: None)
    double(torch.ones(2, requires_grad=True)).sum().backward()


def _copy_tree(target: Path) -> Path:
    for part in ("safecl/kernels", "tests/kernels"):
        shutil.copytree(ROOT / part, target / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("safecl/__init__.py", "tests/__init__.py"):
        shutil.copy(ROOT / name, target / name)
    return target


if __name__ == "__main__":
    if sys.argv[1] == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
        import triton  # noqa: F401
    warnings.simplefilter("ignore")
    warm_up()
    unnoticed = survivors(sys.argv[1])
    print(f"{sys.argv[1]}: {len(unnoticed)} not noticed")
    sys.exit(1 if unnoticed else 0)
