"""Run the flat checks and a bitwise comparison with C++ in Triton's interpreter.

    TRITON_INTERPRET=1 python -m tests.kernels.flat_interpreted

A separate process, because the variable is read when the kernels are imported.
"""

from __future__ import annotations

import sys
import warnings

import torch

from safecl.kernels import backends, native
from tests.kernels import flat_suite as suite
from tests.kernels.flat_mutations import run_checks

SIZES = (0, 1, 2047, 2048, 2049, 5000)  # around one block


def same_bits_as_cpp() -> None:
    from tests.kernels.test_flat_cpp import all_results

    with backends.using("triton"):
        ours = all_results(5000)
    with backends.using("cpp"):
        cpp = all_results(5000)
    for name, want in cpp.items():
        if any(word in name for word in ("loss", "penalty", "norm")) and want.dim() == 0:
            assert abs(float(ours[name]) - float(want)) <= 1e-6 * abs(float(want)), name
        else:
            assert torch.equal(suite._bits(ours[name].reshape(-1)), suite._bits(want.reshape(-1))), name


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)  # NaN in, NaN out, says numpy
    with backends.using("triton"):
        checks = [*suite.quick_checks(SIZES, triton=True), ("device scalars", suite.check_device_scalars)]
        failed = [name for check in checks if (name := run_checks([check]))]
    if not native.missing():
        failed += [name for check in [("same bits as C++", same_bits_as_cpp)] if (name := run_checks([check]))]
    print(f"{len(checks)} checks, failed: {failed}")
    sys.exit(1 if failed else 0)
