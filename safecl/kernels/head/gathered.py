"""Losses that need the k stored tokens only, without the full-vocabulary product: DER's MSE, renormalised top-k.

    z_ij = x_i · w_{index_ij},   dX_i = sum_j g_ij w_{index_ij},   dW_v += sum_{ij: index_ij = v} g_ij x_i

6 M k H FLOP instead of 6 M V H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safecl.kernels.head.divergences import shape_backward_, shape_logits_, topk_event_gradients
from safecl.kernels.head.segments import HeadCall, HeadResult, Segment
from safecl.kernels.head.teacher_tiles import take, topk_tiles
from safecl.kernels.repeatable import add_at_
from safecl.kernels.spans import spans

_GATHER_RATIO = 200  # up to k = V / 200, gathering k rows of W per token is faster than the full product
_COPIES = 3  # gathered rows, their gradient, and one temporary


def can_gather(call: HeadCall, segment: Segment) -> bool:
    """Return whether neither a label nor a tail needs the other tokens, and k is small."""
    if call.teacher_kind != "topk" or segment.has_label or not segment.has_teacher:
        return False
    stored_only = call.options.divergence == "mse" or call.options.topk_mode == "renormalised"
    return stored_only and call.teacher[1].shape[1] * _GATHER_RATIO <= call.vocab


def run_gathered(call: HeadCall, segment: Segment, result: HeadResult) -> None:
    """Process all rows of a segment with gathered rows of the head."""
    bytes_per_row = _COPIES * call.logits_dtype.itemsize * call.teacher[1].shape[1] * call.hidden.shape[1]
    tiles = list(spans(segment.count, max(1, call.tile_bytes // bytes_per_row)))
    teachers = topk_tiles(call.teacher, segment.teacher_rows, tiles, call.hidden.device)
    for (start, end), (log_q, indices, log_tail) in zip(tiles, teachers, strict=True):
        x = take(call.hidden, segment.rows, start, end).to(call.compute_dtype).to(call.logits_dtype)
        weights = call.kd_weights[segment.batch(start, end)]
        loss, grad, rows = gathered_losses(call, x, log_q, indices, log_tail, weights)
        result.store_losses(segment, start, end, kd=loss)
        if call.needs_grad:
            _store_gradients(call, segment, result, start, end, grad, indices, x, rows)


def gathered_losses(
    call: HeadCall, x: Tensor, log_q: Tensor, indices: Tensor, log_tail: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss [rows], weighted gradient of the raw logits [rows, k], rows of the head [rows, k, H]).

    x: [rows, H] fp32.
    """
    options = call.options
    rows = call.weight.index_select(0, indices.flatten()).to(call.compute_dtype).to(x.dtype).view(*indices.shape, -1)
    raw = torch.bmm(rows, x[:, :, None])[:, :, 0]  # [rows, k]
    if call.bias is not None:
        raw += call.bias[indices]
    logits = shape_logits_(raw, options.logit_scale, options.softcap)
    loss, grad, _ = topk_event_gradients(
        logits / options.temperature, None, log_q.to(x.dtype), log_tail.to(x.dtype), options
    )
    return loss, shape_backward_(grad * weights[:, None], logits, options.logit_scale, options.softcap), rows


def _store_gradients(
    call: HeadCall,
    segment: Segment,
    result: HeadResult,
    start: int,
    end: int,
    grad: Tensor,
    indices: Tensor,
    x: Tensor,
    rows: Tensor,
) -> None:
    if call.need_hidden:
        result.store_hidden(segment, start, end, torch.bmm(grad[:, None, :], rows)[:, 0])
    if call.need_weight:
        outer = torch.mul(grad[:, :, None], x[:, None, :], out=rows)
        add_at_(result.weight_to_add_to(), indices.flatten(), outer.view(-1, x.shape[1]))
    if result.bias is not None:
        add_at_(result.bias, indices.flatten(), grad.flatten())
