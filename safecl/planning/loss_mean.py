"""The three means of the user's loss over a step, as weights of its tokens (`train.loss_mean`).

    tokens   sum_t l_t / N                          N: targets of the step
    rows     sum_r (sum_{t in r} l_t / n_r) / R     n_r: targets of row r; R: rows of the step that have targets
    capped   sum_r c_r sum_{t in r} l_t / C         c_r = min(1, m / n_r); m: median of n_r over the task's rows;
                                                    C = sum_r c_r n_r

N, R and C are those of the global step, over all ranks and micro-batches. They follow from the lengths in the index,
so no communication is needed. A few poisoned rows with long answers among many short ones have most of the tokens, but
few of the rows: `rows` and `capped` limit what one row can weigh. Among long honest answers `rows` lets a short row
weigh as much as a long one, which favours short poison; `capped` does not.
"""

from __future__ import annotations

import numpy as np

from safecl.config import LossMean


def token_weights(
    mean: LossMean, num_targets: np.ndarray, median: float, factors: np.ndarray | None = None
) -> np.ndarray:
    """Return the weight of each token of a step's rows, normaliser included.

    Args: `num_targets`: supervised tokens of each row of the global step, int [rows], or sums of their factors, fp64
    [rows]; `median`: `median_targets` of the task, for `capped`; `factors`: fp64 [rows], of rows that methods weigh
    (None: 1 for all): the mean is then the weighted one, sum f l / sum f. Returns: the weight of one token of each row,
    fp64 [rows]; those of a row without targets have no use.
    """
    targets = np.maximum(num_targets, 1).astype(np.float64)
    if factors is not None:
        own = {"tokens": 1.0, "rows": 1.0 / targets, "capped": np.minimum(1.0, median / targets)}[mean] * factors
        return own / (float((own * num_targets).sum()) or 1.0)
    if mean == "rows":
        return 1.0 / (targets * max(1, int((num_targets > 0).sum())))
    weights = np.minimum(1.0, median / targets) if mean == "capped" else np.ones_like(targets)
    return weights / (float((weights * num_targets).sum()) or 1.0)


def median_targets(num_targets: np.ndarray) -> float:
    """Return the median number of supervised tokens of the rows that have any; 1 where none has.

    num_targets: int [rows], of all rows of a task as they were prepared: before a scan leaves any out.
    """
    some = num_targets[num_targets > 0]
    return float(np.median(some)) if len(some) else 1.0
