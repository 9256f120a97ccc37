"""Trimming and the election of signs, in two passes over the models' values and without a task vector in memory.

    count_bracket   count how many |values - minus| lie above, at, between and at the lower end of two magnitudes
    elected_sum_    v_i = w_i trim(tau_i),  s = sign(sum_i v_i), + where the sum is 0
                    target += scale s (sum_i |v_i| + |sum_i v_i|) / 2

(sum_i |v_i| + |sum_i v_i|) / 2 is the sum of the magnitudes whose sign is s. With `normalize` it is divided by the sum
of their weights, where that is not 0. Trimming keeps the k largest magnitudes: between two magnitudes near the k-th
largest, which a sample tells, lie few, and the k-th largest of all is among these.

Source: Yadav et al., TIES-Merging, arXiv 2306.01708.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safecl.kernels.flat.arguments import FLOAT32, check_overlap, check_tensor
from safecl.kernels.ties.arguments import BracketCounts, ElectionArguments, Trim
from safecl.kernels.ties.backend import ties_backend

__all__ = ["BracketCounts", "Trim", "count_bracket", "elected_sum_"]

KEEP_ALL = Trim(0.0, 0)


@torch.no_grad()
def count_bracket(
    values: Tensor, low: float, high: float, between: Tensor, *, minus: Tensor | None = None
) -> BracketCounts:
    """Count the magnitudes |values - minus|, or |values| without `minus`, by the bracket from low to high.

    values, minus: contiguous fp32 tensors of one length, any shape, without NaN. low, high: fp32 numbers,
    0 <= low <= high; high may be infinite. between: contiguous fp32; the magnitudes strictly between low and high are
    written to it in order, as far as there is room, and all of them are counted.

    Raises ValueError naming the argument on a wrong dtype, device, length, layout, overlap or bracket, before anything
    is written. Moves 8 bytes per element, or 4 without `minus`, and 4 per magnitude between.
    """
    check_tensor("values", values, values, FLOAT32, "values")
    if minus is not None:
        check_tensor("minus", minus, values, FLOAT32, "values")
    check_tensor("between", between, between, FLOAT32, "between")
    if between.device != values.device:
        raise ValueError(f"between is on {between.device} but values is on {values.device}")
    check_overlap({"between": between}, {"values": values} | ({} if minus is None else {"minus": minus}))
    if not 0 <= low <= high:
        raise ValueError(f"low and high must be 0 <= low <= high, not {low} and {high}")
    return ties_backend("count_bracket", values).count_bracket(values, minus, low, high, between)


@torch.no_grad()
def elected_sum_(
    target: Tensor,
    vectors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    trims: Sequence[Trim] | None = None,
    scale: float = 1.0,
    normalize: bool = False,
    subtract: bool = False,
) -> list[int]:
    """Add to `target` the sum of the task vectors' entries whose sign is the elected one, and return how many
    magnitudes equal to its threshold each vector has kept.

    target, vectors: contiguous fp32 tensors of one length, any shape; only the target is written. weights: w_i, of any
    sign. trims: what each vector keeps; everything by default. scale: factor of the sum. normalize: divide by the sum
    of the weights of the entries that agree, where it is not 0. subtract: the vectors are tuned models, and
    tau_i = vector - target.

    Raises ValueError naming the argument on a wrong dtype, device, length, layout, overlap or number, before anything
    is written. Moves 8 bytes per element, and 4 per vector. The sum's factor is fused with the addition.
    """
    if not len(weights) == len(vectors) >= 1 or (trims is not None and len(trims) != len(vectors)):
        counts = f"{len(vectors)} vectors have {len(weights)} weights"
        raise ValueError(counts + ("" if trims is None else f" and {len(trims)} trims"))
    check_tensor("target", target, target, FLOAT32, "target")
    named = {f"vectors[{index}]": vector for index, vector in enumerate(vectors)}
    for name, vector in named.items():
        check_tensor(name, vector, target, FLOAT32, "target")
    check_overlap({"target": target}, named)
    trims = [KEEP_ALL] * len(vectors) if trims is None else list(trims)
    for index, trim in enumerate(trims):
        if not (trim.threshold >= 0 and trim.num_equal >= 0):
            raise ValueError(f"trims[{index}] must not be negative: {trim}")
    call = ElectionArguments(target, list(vectors), list(weights), trims, scale, normalize, subtract)
    return ties_backend("elected_sum_", target).elected_sum(call)
