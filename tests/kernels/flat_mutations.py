"""Break the flat kernels deliberately, one line at a time, and report which breaks `flat_suite` does not notice.

    python -m tests.kernels.flat_mutations torch | cpp | triton

Each mutant is a copy of the package with one line changed, imported (and for C++ compiled) instead of the original.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

Lists = dict[str, list[tuple[str, dict[str, tuple[str, str]]]]]
"""back end -> files with their breaks: name -> (a place in the file, what stands there instead)"""

SHARED = {  # the scalars, checked through the torch twin
    "bias correction of m dropped": ("lr / (1.0 - beta1**step)", "lr"),
    "bias correction of v dropped": ("(1.0 - beta2**step) ** -0.5", "1.0"),
    "ema decay swapped": ("else 1.0 - check_scalar(name", "else check_scalar(name"),
    "grad_scale multiplied": ("clip / scale", "clip * scale"),
    "weight decay without lr": ('lr * check_scalar("weight_decay"', '1.0 * check_scalar("weight_decay"'),
    "found_inf on the host ignored": ("return float(found_inf) != 0.0", "return False"),
}
TORCH = {
    "last partial chunk skipped": ("range(0, first.numel(), size)", "range(0, first.numel() // size * size, size)"),
    "clip coefficient ignored": ("c.grad * grad.float()", "grad.float()"),
    "penalty sign": ("else g + pull", "else g - pull"),
    "penalty also in the moments when proximal": ("g if call.proximal else g + pull", "g + pull"),
    "second moment not squared": ("(1.0 - c.beta2) * g * g", "(1.0 - c.beta2) * g"),
    "weight decay dropped": ("p - (decay * p + update)", "p - update"),
    "ema of the old p": ("(call, fisher) * (new_p - ema)", "(call, fisher) * (p - ema)"),
    "copy of a moment": ("(out, new_p))", "(out, new_m))"),
    "penalty loss doubled": (
        "None if call.anchor is None else (0.5 * total)",
        "None if call.anchor is None else (1.0 * total)",
    ),
    "segments ignored": (
        "if segments is None or values is None:\n        return scalar",
        "if True:\n        return scalar",
    ),
    "found_inf on the device ignored": ("new if found_inf is None else", "new if True else"),
    "stochastic rounding to nearest": ("(bits + noise)", "(bits + 0x7FFF)"),
    "ema decay swapped": ("rate * (p.float() - e32)", "(1.0 - rate) * (p.float() - e32)"),
    "fisher not squared": ("weight * g32 * g32", "weight * g32"),
    "fisher weight ignored": ("weight * g32 * g32", "g32 * g32"),
    "anchor ignored in the penalty": ("p.float() - a.float()\n        pull", "p.float()\n        pull"),
    "norm without penalty": ("h = h + pull", "h = h"),
    "proximal cap gone": ("weight.clamp(max=1e37)", "weight"),
    "ema threshold ignored": ("fisher.float() > threshold", "fisher.float() > -1"),
    "second moments not counted": ("call.found_inf, new_p, new_v, new_ema)", "call.found_inf, new_p, new_ema)"),
}
CPP = {
    "last partial group skipped": ("if (at < (end)) group<false>", "if (false) group<false>"),
    "clip coefficient ignored": ("gradient = c.grad_mult * g[j]", "gradient = g[j]"),
    "penalty sign": ("gradient += pull", "gradient -= pull"),
    "second moment not squared": ("c.one_minus_beta2 * gradient * gradient", "c.one_minus_beta2 * gradient"),
    "weight decay dropped": ("(decay * p[j] + update)", "update"),
    "betas swapped": ("c.beta1 * m[j] + c.one_minus_beta1", "c.beta2 * m[j] + c.one_minus_beta2"),
    "ema stands still": ("rate * (fresh - ema[j])", "0"),
    "ema threshold the other way": ("fisher[j] > c.ema_threshold", "fisher[j] < c.ema_threshold"),
    "stochastic noise of the neighbour": ("random_word(at + j, c.seed)", "random_word(0, c.seed)"),
    "fisher not squared": ("c.weight * g[j] * g[j]", "c.weight * g[j]"),
    "segment decay ignored": (
        "s >= 0 && c.segments.weight_decay ? c.lr * c.segments.weight_decay[s] : c.weight_decay",
        "c.weight_decay",
    ),
    "norm without penalty": ("c.grad_mult * g[j] + pull[j]", "c.grad_mult * g[j]"),
    "averages not counted": ("sum += ema[j];", ""),
    "overflow of the probe counted": ("count += !(is_finite(c.param[i]) &&", "count += !(false &&"),
    "loss loses half its lanes": (
        "for (double lane : lanes) sum += lane;",
        "for (int j = 0; j < kLanes; j += 2) sum += lanes[j];",
    ),
}
TRITON = {
    "last partial block skipped": ("        if rest:\n", "        if False:\n"),
    "penalty sign": ("g = g + pull", "g = g - pull"),
    "second moment not squared": ("one_minus_beta2 * g * g", "one_minus_beta2 * g"),
    "weight decay dropped": ("(decays * p + update)", "update"),
    "ema of the old p": ("rate * (new_p - e)", "rate * (p - e)"),
    "ema threshold included": ("f > ema_threshold", "f >= ema_threshold"),
    "found_inf ignored": ("live = tl.load(found_inf) == 0", "live = tl.load(found_inf) >= 0"),
    "device scalars out of order": (
        "tl.load(scalars + 5), tl.load(scalars + 6)",
        "tl.load(scalars + 6), tl.load(scalars + 5)",
    ),
    "only the first segment of a block": (
        "for s in range(first + 1, last + 1)",
        "for s in range(first + 1, first + 1)",
    ),
    "padding counted": ("mask=mask, other=0.0", "mask=mask, other=1.0"),
    "copy truncated": ("(bits + 0x7FFF + ((bits >> 16) & 1))", "bits"),
    "only one round of partial sums": ("for start in range(0, count, LANES)", "for start in range(0, 1, LANES)"),
    "fisher not squared": ("weight * g * g", "weight * g"),
    "second moments not counted": ("_sum_of_block(new_p + v, mask, MASKED)", "_sum_of_block(new_p, mask, MASKED)"),
    "averages not counted": ("probe += _sum_of_block(new_e, mask, MASKED)", "probe += 0.0"),
}

LISTS: Lists = {
    "torch": [("safecl/kernels/flat/arguments.py", SHARED), ("safecl/kernels/flat/torch_twin.py", TORCH)],
    "cpp": [("csrc/flat_kernels.inc", CPP)],
    "triton": [("safecl/kernels/flat/triton_kernels.py", TRITON)],
}
SUITES = ("tests.kernels.flat", "tests.kernels.ties")


def survivors(family: str, backend: str, lists: Lists) -> list[str]:
    """Return the names of the mutants that pass every check of the family's suite."""
    failure = first_failure(family, backend, ROOT)
    if failure:
        raise SystemExit(f"the unbroken {family} kernels in {backend} fail {failure}")
    found = []
    for path, mutations in lists[backend]:
        for name, (old, new) in mutations.items():
            with tempfile.TemporaryDirectory() as folder:
                tree = copy_tree(Path(folder))
                source = (tree / path).read_text()
                assert source.count(old) == 1, f"{name}: {source.count(old)} places in {path} match {old!r}"
                (tree / path).write_text(source.replace(old, new))
                if backend == "cpp":
                    build(tree)
                failure = first_failure(family, backend, tree)
            print(f"{backend}: {name}: {failure or 'NOT NOTICED'}", flush=True)
            found += [] if failure else [name]
    return found


def copy_tree(target: Path) -> Path:
    for part in ("safecl/kernels", "tests/kernels", "csrc"):
        shutil.copytree(ROOT / part, target / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("safecl/__init__.py", "tests/__init__.py", "setup.py"):
        shutil.copy(ROOT / name, target / name)
    return target


def build(tree: Path) -> None:
    """Compile the mutated library for the baseline instruction set, not optimised: one second instead of four."""
    spec = importlib.util.spec_from_file_location("mutant_setup", tree / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    failure = setup.compile_library(
        tree / "safecl" / "kernels" / "libsafecl.so", (*setup.FLAGS, "-O0", "-DSAFECL_BASELINE_ONLY")
    )
    assert not failure, failure


def first_failure(family: str, backend: str, tree: Path) -> str:
    """Return the first check that the kernels of `tree` fail, or "" if they pass all."""
    for name in [n for n in sys.modules if n.split(".")[0] == "safecl" or n.startswith(SUITES)]:
        del sys.modules[name]
    sys.path.insert(0, str(tree))
    tests = sys.modules["tests"], sys.modules["tests.kernels"]
    try:
        for module, folder in zip(tests, ("tests", "tests/kernels"), strict=True):
            module.__path__ = [str(tree / folder)]
        suite = importlib.import_module(f"tests.kernels.{family}_suite")
        assert Path(suite.__file__).is_relative_to(tree), suite.__file__
        with importlib.import_module("safecl.kernels.backends").using(backend):
            return run_checks(suite.mutation_checks(backend))
    finally:
        sys.path.remove(str(tree))


def run_checks(checks: list) -> str:
    for name, check in checks:
        try:
            check()
        except Exception:
            return name
    return ""


def main(family: str, backend: str, lists: Lists) -> None:
    """Report the breaks that are not noticed, and exit with 1 where there is one."""
    import tests
    import tests.kernels  # noqa: F401

    if backend == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
    warnings.simplefilter("ignore", RuntimeWarning)
    unnoticed = survivors(family, backend, lists)
    print(f"{backend}: {len(unnoticed)} not noticed")
    sys.exit(1 if unnoticed else 0)


if __name__ == "__main__":
    main("flat", sys.argv[1], LISTS)
