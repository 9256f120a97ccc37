"""Top-k teachers straight from hidden states: exact top-k log-probabilities, their indices and the log-mass of the rest.

    log p_v = z_v - lse(z),   log tail = lse(z without its k largest) - lse(z),   z = logits / temperature

The k largest are taken out before the rest is summed, so the tail is right to fp32 even at a mass of 1e-14, where 1 - sum would be noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import head_checks as checks
from .divergences import shape_logits_
from .matmul import logits_dtype, operand, project
from .spans import spans
from .teachers import TopKTeacher

_ROWS_CPU, _ROWS_GPU, _TILE_BYTES = 256, 2048, 2**29


@torch.no_grad()
def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
) -> TopKTeacher:
    """The k most probable tokens of each row as a ``TopKTeacher``; [tokens, vocab] is never materialised.

    hidden: [rows, H], weight: [V, H], bias: [V], one floating dtype and device. k: 1..V. temperature: that of the training to come.
    Returns log_probs [rows, k] descending, indices [rows, k] int64, log_tail [rows]; fp32 (for what fp16 costs see ``TopKTeacher``).
    Raises ValueError for shapes, dtypes or devices that do not fit and for k outside 1..V.
    """
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be [rows, hidden], got shape {tuple(hidden.shape)}")
    checks.check_head(hidden, weight, bias, softcap, logit_scale)
    checks.check_options("forward_kl", 0.5, temperature, "none")
    vocab = weight.shape[0]
    if not 1 <= k <= vocab:
        raise ValueError(f"k must lie in 1..{vocab} (the vocabulary), got {k}")
    compute, device = checks.compute_dtype(hidden, weight), hidden.device
    dtype = logits_dtype(compute)
    log_probs = hidden.new_empty(hidden.shape[0], k, dtype=dtype)
    log_tail = hidden.new_empty(hidden.shape[0], dtype=dtype)
    indices = torch.empty(hidden.shape[0], k, dtype=torch.int64, device=device)
    with torch.autocast(device.type, enabled=False):
        head = operand(weight, compute)
        step = max(1, min(_TILE_BYTES // (dtype.itemsize * vocab), _ROWS_CPU if device.type == "cpu" else _ROWS_GPU))
        tile = hidden.new_empty(min(step, hidden.shape[0]), vocab, dtype=dtype)
        for start, end in spans(hidden.shape[0], step):
            raw = project(operand(hidden[start:end], compute), head, bias, tile[: end - start])
            logits = shape_logits_(raw, logit_scale, softcap).div_(temperature)
            log_probs[start:end], indices[start:end], log_tail[start:end] = topk_with_tail_(logits, k)
    return TopKTeacher(log_probs, indices, log_tail, float(temperature), vocab)


def topk_with_tail_(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(log_probs [rows, k], indices [rows, k], log_tail [rows]); overwrites the top k of ``logits`` [rows, vocab] with -inf."""
    top, indices = logits.topk(k, dim=-1)
    log_rest = torch.logsumexp(logits.scatter_(-1, indices, -math.inf), -1)
    log_total = torch.logaddexp(torch.logsumexp(top, -1), log_rest)
    return top - log_total[:, None], indices, log_rest - log_total
