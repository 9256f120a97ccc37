"""The chunk driver of the fused head: which rows, in tiles of which height, through which matrix products.

For each chunk of C rows, sized by ``tile_bytes`` and never by V / H:

    S   = X W^T           [C, V] fp32, one or several tiles          2 M H V FLOP
    T   = X_t W_t^T       [C, V_t] fp32, online teacher only         2 M H V
    row work              losses, and dL = dloss/dS in the GEMM dtype, rounded after the difference is formed
    dX  = dL W            skipped for a frozen trunk                 2 M H V
    dW += dL^T X          fp32, skipped for a frozen head            2 M H V

Peak memory beside inputs and returned gradients: tile_bytes + 4 V H (dW while it accumulates) + small change. On a GPU half of the budget
holds fp32 tiles and half holds dL for several of them, so that the read-modify-write of dW (8 V H bytes per chunk) hides behind its GEMM.
Rows without a label and without a teacher, or with weight 0, are never read.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import divergences
from .divergences import RowOptions
from .spans import spans

_MAX_ROWS_CPU = 512  # beyond it a CPU GEMM gains nothing and the tile only leaves the cache
_MAX_ROWS_GPU = 4096
_GATHER_RATIO = 200  # k <= V / 200: gathering k rows of W per token beats the full GEMM


@dataclass
class HeadCall:
    """The tensors of one call, validated: hidden [M, H], weight [V, H], bias [V], labels [M], weights [M] fp32, teacher_rows [R]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor | None
    ce_weights: Tensor
    kd_weights: Tensor
    teacher_rows: Tensor | None
    teacher: list[Tensor]  # dense: hidden, weight, [bias]; logits: logits; topk: log_probs, indices, log_tail; none: nothing
    teacher_kind: str
    options: RowOptions
    ignore_index: int
    compute_dtype: torch.dtype
    tile_bytes: int
    need_hidden: bool
    need_weight: bool
    need_bias: bool

    @property
    def needs_grad(self) -> bool:
        return self.need_hidden or self.need_weight or self.need_bias


@dataclass
class Segment:
    """Rows that share one kind of work. rows: positions in the batch, teacher_rows: positions in the teacher; None is "all, in order"."""

    rows: Tensor | None
    teacher_rows: Tensor | None
    count: int
    has_label: bool
    has_teacher: bool


@dataclass
class Gradients:
    """Accumulators, allocated on first use so that the first product needs no zero fill."""

    call: HeadCall
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    fresh: bool = field(default=True)


@dataclass
class HeadResult:
    ce: Tensor
    kd: Tensor
    logsumexp: Tensor
    hidden_grad: Tensor
    weight_grad: Tensor
    bias_grad: Tensor


def gemm_dtype(compute: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of GEMM operands. CPU products cannot return fp32 from bf16 operands, so there they are widened first."""
    return compute if device.type == "cuda" else torch.promote_types(compute, torch.float32)


def logits_dtype(compute: torch.dtype) -> torch.dtype:
    return torch.promote_types(compute, torch.float32)


def operand(tensor: Tensor, compute: torch.dtype, device: torch.device) -> Tensor:
    """A GEMM operand: rounded to the compute dtype (which autocast may have set), then in the dtype the product needs."""
    return tensor.to(device=device, dtype=compute).to(gemm_dtype(compute, device))


def project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """out = x @ weight.T + bias, in the dtype of ``out`` (fp32 for 16-bit operands: the logits are never rounded)."""
    if x.dtype == out.dtype:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
    return out if bias is None else out.add_(bias)


def accumulate_weight_(total: Tensor, dlogits: Tensor, x: Tensor, fresh: bool) -> None:
    """total += dlogits.T @ x in fp32; fresh: ``total`` holds nothing yet."""
    beta = 0 if fresh else 1
    if x.dtype == total.dtype:
        torch.addmm(total, dlogits.t(), x, beta=beta, out=total)
    else:
        torch.addmm(total, dlogits.t(), x, out_dtype=total.dtype, beta=beta, out=total)


def take(tensor: Tensor, rows: Tensor | None, start: int, end: int) -> Tensor:
    """Rows start..end of the segment ``rows``; a view where the segment is everything."""
    if rows is None:
        return tensor[start:end]
    return tensor.index_select(0, rows[start:end].to(tensor.device))


def run_head(call: HeadCall) -> HeadResult:
    """Losses per token and the gradients of their weighted sum."""
    tokens = call.hidden.shape[0]
    losses = [call.hidden.new_zeros(tokens, dtype=logits_dtype(call.compute_dtype)) for _ in range(3)]  # ce, kd, logsumexp
    gradients = Gradients(call)
    for segment in split_rows(call):
        run = _run_gathered if _can_gather(call, segment) else _run_tiles
        run(call, segment, losses, gradients)
    return HeadResult(*losses, *_finished(gradients))


def split_rows(call: HeadCall) -> list[Segment]:
    """Segments by work: teacher and label, teacher only, label only. One host synchronisation on a GPU."""
    tokens, device = call.hidden.shape[0], call.hidden.device
    teacher_position = _teacher_positions(call, tokens, device)
    work = torch.zeros(tokens, dtype=torch.int64, device=device)
    if call.labels is not None:
        work += (call.labels != call.ignore_index) & (call.ce_weights != 0)
    if teacher_position is not None:
        work += 2 * ((teacher_position >= 0) & (call.kd_weights != 0))
    order = torch.argsort(work, stable=True)
    counts = torch.bincount(work, minlength=4).tolist()
    segments, start = [], counts[0]
    for kind in (1, 2, 3):
        if counts[kind]:
            rows = None if counts[kind] == tokens else order[start : start + counts[kind]]
            segments.append(_segment(rows, teacher_position, call.teacher_rows, kind, counts[kind]))
        start += counts[kind]
    return segments


def _segment(rows, teacher_position, teacher_rows, kind: int, count: int) -> Segment:
    has_teacher = kind >= 2
    positions = None
    if has_teacher and not (rows is None and teacher_rows is None):
        positions = teacher_position if rows is None else teacher_position[rows]
    return Segment(rows, positions, count, has_label=kind % 2 == 1, has_teacher=has_teacher)


def _teacher_positions(call: HeadCall, tokens: int, device) -> Tensor | None:
    """[M]: the teacher's row for each row of the batch, -1 for none; None without a teacher."""
    if call.teacher_kind == "none":
        return None
    if call.teacher_rows is None:
        return torch.arange(tokens, device=device)
    positions = torch.full((tokens,), -1, dtype=torch.int64, device=device)
    positions[call.teacher_rows] = torch.arange(call.teacher_rows.shape[0], device=device)
    return positions


def plan_rows(call: HeadCall, segment: Segment) -> tuple[int, int]:
    """(rows of an fp32 tile, rows whose dlogits are collected for one dX and dW product) within tile_bytes."""
    logit_bytes = logits_dtype(call.compute_dtype).itemsize
    tile = logit_bytes * call.weight.shape[0] + _teacher_bytes(call, segment, logit_bytes)
    if _separate_dlogits(call):
        kept = call.compute_dtype.itemsize * call.weight.shape[0]
        tile_rows = _round_rows(call.tile_bytes // 2 // tile, _MAX_ROWS_GPU)
        return tile_rows, max(tile_rows, _round_rows(call.tile_bytes // 2 // kept, _MAX_ROWS_GPU))
    limit = _MAX_ROWS_CPU if call.hidden.device.type == "cpu" else _MAX_ROWS_GPU
    rows = _round_rows(call.tile_bytes // tile, limit)
    return rows, rows


def _separate_dlogits(call: HeadCall) -> bool:
    return call.needs_grad and gemm_dtype(call.compute_dtype, call.hidden.device) != logits_dtype(call.compute_dtype)


def _teacher_bytes(call: HeadCall, segment: Segment, logit_bytes: int) -> int:
    if not segment.has_teacher:
        return 0
    if call.teacher_kind == "dense":
        return logit_bytes * call.teacher[1].shape[0]
    if call.teacher_kind == "logits":
        return 2 * call.teacher[0].element_size() * call.teacher[0].shape[1]
    return logit_bytes * call.weight.shape[0] if call.options.topk_mode == "uniform_tail" else 0


def _round_rows(rows: int, limit: int) -> int:
    rows = max(1, min(rows, limit))
    return rows if rows < 128 else rows // 128 * 128


def _run_tiles(call: HeadCall, segment: Segment, losses: list[Tensor], gradients: Gradients) -> None:
    tile_rows, chunk_rows = plan_rows(call, segment)
    vocab, dtype = call.weight.shape[0], logits_dtype(call.compute_dtype)
    compute, device = call.compute_dtype, call.hidden.device
    weight = operand(call.weight, compute, device)
    tile = call.hidden.new_empty(min(tile_rows, segment.count), vocab, dtype=dtype)
    separate = call.hidden.new_empty(min(chunk_rows, segment.count), vocab, dtype=compute) if _separate_dlogits(call) else None
    teacher = teacher_source(call, segment, tile.shape[0])
    for start, end in spans(segment.count, chunk_rows):
        x = operand(take(call.hidden, segment.rows, start, end), compute, device)
        for a, b in spans(end - start, tile_rows):
            student = project(x[a:b], weight, call.bias, tile[: b - a])
            dlogits = None
            if call.needs_grad:
                dlogits = student if separate is None else separate[a:b]
            _row_work(call, segment, student, teacher, start + a, start + b, dlogits, losses)
        if call.needs_grad:
            dlogits = tile[: end - start] if separate is None else separate[: end - start]
            _accumulate(gradients, segment, start, end, dlogits, x, weight)


def _row_work(call, segment, student, teacher, start, end, dlogits, losses) -> None:
    """Losses and dlogits of rows start..end of a segment, into their places in the batch."""
    batch = slice(start, end) if segment.rows is None else segment.rows[start:end]
    labels = call.labels[batch] if segment.has_label else None
    ce_weights, kd_weights = call.ce_weights[batch], call.kd_weights[batch]
    if segment.has_teacher and call.teacher_kind == "topk":
        rows = divergences.topk_rows(student, *teacher(start, end), labels, ce_weights, kd_weights, call.options, dlogits)
    else:
        logits = teacher(start, end) if segment.has_teacher else None
        rows = divergences.dense_rows(student, logits, labels, ce_weights, kd_weights, call.options, dlogits)
    for total, part in zip(losses, rows, strict=True):
        total[batch] = part


def teacher_source(call: HeadCall, segment: Segment, tile_rows: int):
    """A function (start, end) -> the teacher of those rows of the segment: a tile of logits, or the three tensors of a top-k cache."""
    if not segment.has_teacher:
        return None
    rows, device = segment.teacher_rows, call.hidden.device
    if call.teacher_kind == "topk":
        log_q, indices, log_tail = call.teacher
        tensors = (log_q, indices.long(), log_tail)
        return lambda start, end: [take(tensor, rows, start, end).to(device) for tensor in tensors]
    if call.teacher_kind == "logits":
        return lambda start, end: take(call.teacher[0], rows, start, end).to(device)
    hidden, weight, *bias = call.teacher
    compute = weight.dtype
    weight = operand(weight, compute, device)
    tile = call.hidden.new_empty(tile_rows, weight.shape[0], dtype=logits_dtype(call.compute_dtype))

    def dense(start: int, end: int) -> Tensor:
        x = operand(take(hidden, rows, start, end), compute, device)
        return project(x, weight, bias[0] if bias else None, tile[: end - start])

    return dense


def _accumulate(gradients: Gradients, segment: Segment, start: int, end: int, dlogits: Tensor, x: Tensor, weight: Tensor) -> None:
    call = gradients.call
    _allocate(gradients, zero_weight=False)
    if call.need_hidden:
        _store_hidden(gradients, segment, start, end, torch.mm(dlogits, weight))
    if call.need_weight:
        accumulate_weight_(gradients.weight, dlogits, x, gradients.fresh)
    if call.need_bias:
        gradients.bias += dlogits.sum(0, dtype=gradients.bias.dtype)
    gradients.fresh = False


def _store_hidden(gradients: Gradients, segment: Segment, start: int, end: int, grad: Tensor) -> None:
    if segment.rows is None:
        gradients.hidden[start:end] = grad
    else:
        gradients.hidden.index_copy_(0, segment.rows[start:end], grad.to(gradients.hidden.dtype))


def _allocate(gradients: Gradients, zero_weight: bool) -> None:
    call = gradients.call
    dtype = logits_dtype(call.compute_dtype)
    if call.need_hidden and gradients.hidden is None:
        gradients.hidden = torch.zeros_like(call.hidden, memory_format=torch.contiguous_format)
    if call.need_bias and gradients.bias is None:
        gradients.bias = torch.zeros_like(call.bias, dtype=dtype)
    if call.need_weight and gradients.weight is None:
        gradients.weight = torch.empty_like(call.weight, dtype=dtype, memory_format=torch.contiguous_format)
    if zero_weight and gradients.fresh and call.need_weight:
        gradients.weight.zero_()
        gradients.fresh = False


def _finished(gradients: Gradients) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in the dtypes of their tensors; exact zeros where no row took part, empty where none is needed."""
    call = gradients.call
    _allocate(gradients, zero_weight=True)
    none = call.hidden.new_empty(0)
    return (
        gradients.hidden if call.need_hidden else none,
        gradients.weight.to(call.weight.dtype) if call.need_weight else none.clone(),
        gradients.bias.to(call.bias.dtype) if call.need_bias else none.clone(),
    )


def _can_gather(call: HeadCall, segment: Segment) -> bool:
    """Only the k stored tokens matter (DER's MSE, renormalised top-k), no label asks for the others, and k is small."""
    if call.teacher_kind != "topk" or segment.has_label or not segment.has_teacher:
        return False
    sparse = call.options.divergence == "mse" or call.options.topk_mode == "renormalised"
    return sparse and call.teacher[1].shape[1] * _GATHER_RATIO <= call.weight.shape[0]


def _run_gathered(call: HeadCall, segment: Segment, losses: list[Tensor], gradients: Gradients) -> None:
    """k logits per row by gathered rows of W: 2 M k H FLOP instead of 2 M V H."""
    width, k = call.hidden.shape[1], call.teacher[1].shape[1]
    step = max(1, call.tile_bytes // (3 * 4 * k * width))
    _allocate(gradients, zero_weight=True)
    teacher = teacher_source(call, segment, 0)
    for start, end in spans(segment.count, step):
        batch = slice(start, end) if segment.rows is None else segment.rows[start:end]
        log_q, indices, log_tail = teacher(start, end)
        x = take(call.hidden, segment.rows, start, end)
        loss, grads = _gathered_chunk(call, x, log_q, indices, log_tail, call.kd_weights[batch])
        losses[1][batch] = loss
        if call.needs_grad:
            _store_gathered(gradients, segment, start, end, *grads)


def _gathered_chunk(call: HeadCall, x: Tensor, log_q: Tensor, indices: Tensor, log_tail: Tensor, weights: Tensor):
    options, dtype = call.options, logits_dtype(call.compute_dtype)
    rows = call.weight.index_select(0, indices.flatten()).to(dtype).view(*indices.shape, -1)  # [rows, k, hidden]
    x = x.to(dtype)
    raw = torch.bmm(rows, x[:, :, None])[:, :, 0]  # [rows, k]
    if call.bias is not None:
        raw += call.bias[indices]
    logits = divergences.shape_logits_(raw, options.logit_scale, options.softcap)
    loss, grad, _ = divergences.topk_event_gradients(logits / options.temperature, None, log_q.to(dtype), log_tail.to(dtype), options)
    grad = divergences.shape_backward_(grad * weights[:, None], logits, options.logit_scale, options.softcap)
    return loss, (grad, indices, x, rows)


def _store_gathered(gradients: Gradients, segment: Segment, start: int, end: int, grad, indices, x, rows) -> None:
    call = gradients.call
    if call.need_hidden:
        _store_hidden(gradients, segment, start, end, torch.bmm(grad[:, None, :], rows)[:, 0])
    if call.need_weight:
        outer = grad[:, :, None] * x[:, None, :]
        gradients.weight.index_add_(0, indices.flatten(), outer.view(-1, x.shape[1]))
    if call.need_bias:
        gradients.bias.index_add_(0, indices.flatten(), grad.flatten())
