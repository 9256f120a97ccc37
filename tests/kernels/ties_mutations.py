"""Break the ties kernels deliberately, one line at a time, and report which breaks `ties_suite` does not notice.

python -m tests.kernels.ties_mutations torch | cpp
"""

from __future__ import annotations

import sys

from tests.kernels.flat_mutations import Lists, main

TORCH = {
    "sign of the elected": ("plus.mul_(2).sub_(1)", "plus.mul_(2)"),
    "zero counts as minus": ("torch.ge(sums, 0, out=sums)", "torch.gt(sums, 0, out=sums)"),
    "the other sign's weights": ("negative.lerp_(positive, plus)", "positive.lerp_(negative, plus)"),
    "divided by 0": ("divisor.add_(torch.eq(divisor, 0, out=work))", "divisor"),
    "scale not halved": ("call.scale / 2", "call.scale"),
    "task vectors less the target": ("target if call.subtract else None", "target"),
    "equals of each chunk": ("num_equal=trim.num_equal - kept[index]", "num_equal=trim.num_equal"),
    "threshold trimmed": ("np.nextafter(np.float32(trim.threshold), np.float32(0))", "trim.threshold"),
    "last equals kept": ("equal[trim.num_equal :]", "equal[: len(equal) - trim.num_equal]"),
    "high inside": ("torch.lt(sizes, high, out=work)", "torch.le(sizes, high, out=work)"),
    "room from the start": ("between[num_between : num_between + len(inside)]", "between[: len(inside)]"),
    "signed values": ("else None, sizes).abs_()", "else None, sizes)"),
}
CPP = {
    "last partial group skipped": ("if (at < c.numel) election_group<false>", "if (false) election_group<false>"),
    "last partial group not counted": ("if (at < c.numel) bracket_group<false>", "if (false) bracket_group<false>"),
    "sign of the elected": ("plus ? elected : -elected", "elected"),
    "zero counts as minus": ("sums[j] >= 0", "sums[j] > 0"),
    "the other sign's weights": ("plus ? positive[j] : negative[j]", "plus ? negative[j] : positive[j]"),
    "divided by 0": ("divisor == 0 ? 1.0f : divisor", "divisor"),
    "weight ignored": ("weight * tau[j]", "tau[j]"),
    "equals of each group": ("vector.num_equal -= equal;", ""),
    "all equals kept": ("equal <= vector.num_equal", "true"),
    "equals below 0": ("    vector.num_equal = 0;\n", ""),
    "threshold trimmed": ("magnitude(tau[j]) >= smallest", "magnitude(tau[j]) > smallest"),
    "zeros counted as kept": ("if (vector.threshold) trim_group", "if (true) trim_group"),
    "low inside": ("sizes[j] > low && sizes[j] < high", "sizes[j] >= low && sizes[j] < high"),
    "room overrun": ("c.num_between < c.capacity", "c.num_between <= c.capacity"),
    "high counted as above": ("from_high - above", "from_high"),
    "half of the marks": ("first < kGroup; first += 8", "first < kGroup / 2; first += 8"),
}
LISTS: Lists = {
    "torch": [("safecl/kernels/ties/torch_twin.py", TORCH)],
    "cpp": [("csrc/ties_kernels.inc", CPP)],
}

if __name__ == "__main__":
    main("ties", sys.argv[1], LISTS)
