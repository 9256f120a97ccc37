"""The chunk driver of the fused head: which rows, in tiles of which height, through which matrix products.

For each chunk of C rows, sized by ``tile_bytes`` and never by V / H:

    S   = X W^T           [C, V] fp32, in one or several tiles       2 M H V FLOP
    T   = X_t W_t^T       [C, V_t] fp32, online teacher only         2 M H V
    row work              losses, and dL = dloss/dS in the GEMM dtype, rounded after the difference is formed
    dX  = dL W            skipped for a frozen trunk                 2 M H V
    dW += dL^T X          fp32, skipped for a frozen head            2 M H V

Peak memory beside inputs and returned gradients: tile_bytes + 4 V H (dW while it accumulates) + small change. On a GPU
half of the budget holds fp32 tiles and the rest holds dL for several of them, because every product into dW reads and
writes 8 V H bytes. Rows without a label and without a teacher, or with weight 0, are never read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from safecl.kernels import backends
from safecl.kernels.head.checks import raise_first, value_questions
from safecl.kernels.head.divergences import RowOptions
from safecl.kernels.head.gathered import can_gather, run_gathered
from safecl.kernels.head.matmul import accumulate_, logits_dtype, new_tile, operand, operand_dtype, project
from safecl.kernels.head.teacher_tiles import dense_tiles, row_tiles, take, topk_tiles
from safecl.kernels.spans import spans

_MAX_ROWS = {
    "cpu": 512,
    "cuda": 4096,
}  # of a tile; beyond it a GEMM gains nothing, and on a CPU the tile would only leave the cache
_MAX_COLLECTED = 16384


@dataclass
class HeadCall:
    """The tensors of one call, validated: hidden [M, H], weight [V, H], bias [V], labels [M], weights [M] fp32,
    teacher_rows [R]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor | None
    ce_weights: Tensor
    kd_weights: Tensor
    teacher_rows: Tensor | None
    teacher: list[
        Tensor
    ]  # dense: hidden, weight, [bias]; logits: logits; topk: log_probs, indices, log_tail; none: nothing
    teacher_kind: str
    options: RowOptions
    ignore_index: int
    compute_dtype: torch.dtype
    teacher_dtype: torch.dtype
    tile_bytes: int
    need_hidden: bool
    need_weight: bool
    need_bias: bool

    @property
    def needs_grad(self) -> bool:
        return self.need_hidden or self.need_weight or self.need_bias

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    @property
    def logits_dtype(self) -> torch.dtype:
        return logits_dtype(self.compute_dtype)

    @property
    def separate_dlogits(self) -> bool:
        """dL is narrower than the logits, so it needs a buffer of its own; else it overwrites them."""
        return self.needs_grad and operand_dtype(self.compute_dtype, self.hidden.device) != self.logits_dtype


@dataclass
class Segment:
    """Rows that share one kind of work. rows: positions in the batch, teacher_rows: positions in the teacher; None is
    "all, in order"."""

    rows: Tensor | None
    teacher_rows: Tensor | None
    count: int
    has_label: bool
    has_teacher: bool

    def batch(self, start: int, end: int) -> Tensor | slice:
        """An index for rows start..end of the segment in tensors of the batch."""
        return slice(start, end) if self.rows is None else self.rows[start:end]


class HeadResult:
    """Losses per token [M] and gradients (hidden [M, H], weight [V, H] and bias [V] in fp32 while they accumulate)."""

    def __init__(self, call: HeadCall):
        self.call = call
        self.ce, self.kd, self.logsumexp = (
            call.hidden.new_zeros(call.hidden.shape[0], dtype=call.logits_dtype) for _ in range(3)
        )
        self.hidden = torch.zeros_like(call.hidden, memory_format=torch.contiguous_format) if call.need_hidden else None
        self.bias = torch.zeros_like(call.bias, dtype=call.logits_dtype) if call.need_bias else None
        self.weight: Tensor | None = None

    def store_losses(self, segment: Segment, start: int, end: int, ce=None, kd=None, logsumexp=None) -> None:
        index = segment.batch(start, end)
        for total, part in ((self.ce, ce), (self.kd, kd), (self.logsumexp, logsumexp)):
            if part is not None:
                total[index] = part

    def add_product(self, segment: Segment, start: int, end: int, dlogits: Tensor, x: Tensor, weight: Tensor) -> None:
        """The gradients of rows start..end from dlogits [rows, V]."""
        if self.hidden is not None:
            self.store_hidden(segment, start, end, torch.mm(dlogits, weight))
        if self.call.need_weight:
            first = self.weight is None
            if first:
                self.weight = torch.empty(self.call.weight.shape, dtype=self.call.logits_dtype, device=x.device)
            accumulate_(self.weight, dlogits, x, first)
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=self.bias.dtype)

    def store_hidden(self, segment: Segment, start: int, end: int, grad: Tensor) -> None:
        if segment.rows is None:
            self.hidden[start:end] = grad
        else:
            self.hidden.index_copy_(0, segment.rows[start:end], grad.to(self.hidden.dtype))

    def weight_to_add_to(self) -> Tensor:
        """The weight's gradient as a tensor that may be added to."""
        if self.weight is None:
            self.weight = torch.zeros(
                self.call.weight.shape, dtype=self.call.logits_dtype, device=self.call.hidden.device
            )
        return self.weight

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Exact zeros where no row took part, empty where none is needed. Those of the head are fp32: the backward
        rounds them once."""
        call = self.call
        none = call.hidden.new_empty(0)
        return (
            self.hidden if call.need_hidden else none,
            self.weight_to_add_to() if call.need_weight else none.clone(),
            self.bias if call.need_bias else none.clone(),
        )


def run_head(call: HeadCall) -> HeadResult:
    """Losses per token and the gradients of their weighted sum."""
    result = HeadResult(call)
    for segment in split_rows(call):
        run = run_gathered if can_gather(call, segment) else run_tiles
        run(call, segment, result)
    return result


def split_rows(call: HeadCall) -> list[Segment]:
    """Segments by work: label only, teacher only, both. Their sizes and what is wrong with the values cost a GPU one
    synchronisation."""
    tokens, device = call.hidden.shape[0], call.hidden.device
    teacher_position = _teacher_positions(call, tokens, device)
    work = torch.zeros(tokens, dtype=torch.int64, device=device)
    if call.labels is not None:
        work += (call.labels != call.ignore_index) & (call.ce_weights != 0)
    if teacher_position is not None:
        work += 2 * ((teacher_position >= 0) & (call.kd_weights != 0))
    order = torch.argsort(work, stable=True)
    questions = value_questions(
        call.labels, call.ignore_index, call.vocab, call.teacher_rows, tokens, call.teacher, call.teacher_kind
    )
    sizes = (work == torch.arange(4, device=device)[:, None]).sum(1)
    *answers, a, b, c, d = torch.cat([*(answer.to(sizes)[None] for answer in questions.values()), sizes]).tolist()
    raise_first(questions, answers)
    counts = (a, b, c, d)
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
    if tokens:  # clamped, for a GPU could not report an index outside; it is refused before the positions are used
        positions[call.teacher_rows.clamp(0, tokens - 1)] = torch.arange(call.teacher_rows.shape[0], device=device)
    return positions


def plan_rows(call: HeadCall, segment: Segment) -> tuple[int, int]:
    """(rows of an fp32 tile, rows whose dlogits are collected for one dX and dW product) within tile_bytes."""
    tile = call.logits_dtype.itemsize * call.vocab + _teacher_bytes(call, segment)
    collected = call.compute_dtype.itemsize * call.vocab if call.separate_dlogits else 0
    return _rows_within(call.tile_bytes, tile, collected, call.hidden.device.type)


def _rows_within(tile_bytes: int, tile: int, collected: int, device_type: str) -> tuple[int, int]:
    """As plan_rows; `tile` and `collected` are bytes per row, the latter 0 where dlogits overwrite the logits."""
    limit = _MAX_ROWS.get(device_type, 4096)
    if not collected:
        rows = round_rows(tile_bytes // tile, limit)
        return rows, rows
    tile_rows = round_rows(tile_bytes // 2 // tile, limit)
    rows = min((tile_bytes - tile_rows * tile) // collected, _MAX_COLLECTED)
    return tile_rows, max(1, rows // tile_rows) * tile_rows


def workspace_bytes(
    tokens: int,
    vocab: int,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    teacher: bool = False,
    tile_bytes: int = 2**30,
) -> int:
    """What one call takes beside its inputs, its outputs and the gradients that it returns: tiles, and operands that
    are widened.

    `teacher`: an online one of the same head (DenseTeacher).
    """
    widened = operand_dtype(dtype, device).itemsize if operand_dtype(dtype, device) != dtype else 0
    wide = logits_dtype(dtype).itemsize
    tile, collected = (
        wide * vocab * (1 + teacher),
        0 if operand_dtype(dtype, device) == logits_dtype(dtype) else dtype.itemsize * vocab,
    )
    tile_rows, rows = (min(count, tokens) for count in _rows_within(tile_bytes, tile, collected, device.type))
    operands = (1 + teacher) * vocab * hidden * widened + rows * hidden * (
        dtype.itemsize + max(widened, dtype.itemsize)
    )
    return tile_rows * tile + rows * collected + operands


def _teacher_bytes(call: HeadCall, segment: Segment) -> int:
    """Bytes per row that the teacher's side of a tile takes."""
    if not segment.has_teacher:
        return 0
    if call.teacher_kind == "dense":
        return call.logits_dtype.itemsize * call.teacher[1].shape[0]
    if call.teacher_kind == "logits":
        return 2 * call.teacher[0].element_size() * call.teacher[0].shape[1]
    return call.logits_dtype.itemsize * call.vocab if call.options.topk_mode == "uniform_tail" else 0


def round_rows(rows: int, limit: int) -> int:
    """At least one, at most ``limit``, and a multiple of the GEMM's 128 where it is that large."""
    rows = max(1, min(rows, limit))
    return rows if rows < 128 else rows // 128 * 128


def run_tiles(call: HeadCall, segment: Segment, result: HeadResult) -> None:
    """All rows of a segment through full-vocabulary tiles."""
    tile_rows, chunk_rows = plan_rows(call, segment)
    chunks = list(spans(segment.count, chunk_rows))
    tiles = [(start + a, start + b) for start, end in chunks for a, b in spans(end - start, tile_rows)]
    weight = operand(call.weight, call.compute_dtype)
    device = call.hidden.device
    tile = new_tile(min(tile_rows, segment.count), call.vocab, call.logits_dtype, device)
    collected = (
        new_tile(min(chunk_rows, segment.count), call.vocab, weight.dtype, device) if call.separate_dlogits else None
    )
    teacher = teacher_tiles(call, segment, tiles, tile.shape[0])
    for start, end in chunks:
        x = operand(take(call.hidden, segment.rows, start, end), call.compute_dtype)
        for a, b in spans(end - start, tile_rows):
            student = project(x[a:b], weight, call.bias, tile[: b - a])
            dlogits = (student if collected is None else collected[a:b]) if call.needs_grad else None
            rows = row_losses(call, segment, start + a, start + b, student, next(teacher, None), dlogits)
            result.store_losses(segment, start + a, start + b, *rows)
        if call.needs_grad:
            dlogits = (tile if collected is None else collected)[: end - start]
            result.add_product(segment, start, end, dlogits, x, weight)


def row_losses(
    call: HeadCall, segment: Segment, start: int, end: int, student: Tensor, teacher, dlogits: Tensor | None
):
    """The row work of one tile, on the back end of its device."""
    index = segment.batch(start, end)
    labels = call.labels[index] if segment.has_label else None
    common = (labels, call.ce_weights[index], call.kd_weights[index], call.options, dlogits)
    kernels = backends.implementation("head", "linear_distill_loss", student.device.type)
    if segment.has_teacher and call.teacher_kind == "topk":
        return kernels.topk_rows(student, *teacher, *common)
    return kernels.dense_rows(student, teacher, *common)


def teacher_tiles(call: HeadCall, segment: Segment, tiles: list[tuple[int, int]], tile_rows: int) -> Iterator:
    """The teacher of each tile in turn: logits, the three tensors of a top-k cache, or nothing."""
    if not segment.has_teacher:
        return iter(())
    rows, device = segment.teacher_rows, call.hidden.device
    if call.teacher_kind == "topk":
        return topk_tiles(call.teacher, rows, tiles, device)
    if call.teacher_kind == "logits":
        return row_tiles(call.teacher[0], rows, tiles, device)
    buffer = new_tile(tile_rows, call.teacher[1].shape[0], logits_dtype(call.teacher_dtype), device)
    return dense_tiles(call.teacher, call.teacher_dtype, rows, tiles, buffer)
