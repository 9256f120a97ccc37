"""The loop of the fused head over chunks of rows: how many rows a chunk has, and the matrix products of each.

For each chunk of C rows, whose number follows from ``tile_bytes`` and never from V / H:

    S   = X W^T           [C, V] fp32, in one or several tiles       2 M H V FLOP
    T   = X_t W_t^T       [C, V_t] fp32, online teacher only         2 M H V
    row work              losses, and dL = dloss/dS in the GEMM dtype, rounded after the difference is formed
    dX  = dL W            skipped for a frozen trunk                 2 M H V
    dW += dL^T X          fp32, skipped for a frozen head            2 M H V

Peak memory on top of inputs and returned gradients: tile_bytes + 4 V H (dW while it accumulates) and a little more. On
a GPU half of the budget holds fp32 tiles and the rest holds dL of several tiles, because every product into dW reads
and writes 8 V H bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from safecl.kernels.head.backend import RowLosses, RowOptions, head_backend
from safecl.kernels.head.gathered import can_gather, run_gathered
from safecl.kernels.head.matmul import logits_dtype, new_tile, operand, operand_dtype, project, row_multiple
from safecl.kernels.head.segments import HeadCall, HeadResult, Segment, split_rows
from safecl.kernels.head.teacher_tiles import dense_tiles, row_tiles, take, topk_tiles
from safecl.kernels.spans import spans

# Rows of a tile. More rows make no GEMM faster, and on a CPU the tile would no longer fit the cache.
_MAX_ROWS = {"cpu": 512, "cuda": 4096}
_MAX_COLLECTED = 16384


def run_head(call: HeadCall) -> HeadResult:
    """Compute the losses per token and the gradients of their weighted sum."""
    result = HeadResult(call)
    for segment in split_rows(call):
        run = run_gathered if can_gather(call, segment) else run_tiles
        run(call, segment, result)
    return result


def plan_rows(call: HeadCall, segment: Segment) -> tuple[int, int]:
    """Return how many rows fit tile_bytes: (rows of an fp32 tile, rows whose dlogits go into one dX and dW product)."""
    tile = call.logits_dtype.itemsize * call.vocab + _teacher_bytes(call, segment)
    collected = call.compute_dtype.itemsize * call.vocab if call.separate_dlogits else 0
    return _rows_within(call.tile_bytes, tile, collected, call.hidden.device.type)


def _rows_within(tile_bytes: int, tile: int, collected: int, device_type: str) -> tuple[int, int]:
    """Return what `plan_rows` returns, from bytes per row; `collected` is 0 where dlogits overwrite the logits."""
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
    """Return the bytes that one call takes on top of its inputs, outputs and gradients: tiles and widened operands.

    teacher: whether there is an online teacher of the same head (DenseTeacher).
    """
    used = operand_dtype(dtype, device)
    widened = 0 if used == dtype else used.itemsize
    tile = logits_dtype(dtype).itemsize * vocab * (1 + teacher)
    collected = 0 if used == logits_dtype(dtype) else dtype.itemsize * vocab
    tile_rows, rows = (min(count, tokens) for count in _rows_within(tile_bytes, tile, collected, device.type))
    weights = (1 + teacher) * vocab * hidden * widened
    inputs = rows * hidden * (dtype.itemsize + max(widened, dtype.itemsize))
    return tile_rows * tile + rows * collected + weights + inputs


def _teacher_bytes(call: HeadCall, segment: Segment) -> int:
    """Return the bytes per row that the teacher takes in a tile."""
    if not segment.has_teacher:
        return 0
    if call.teacher_kind == "dense":
        return call.logits_dtype.itemsize * call.teacher[1].shape[0]
    if call.teacher_kind == "logits":
        return 2 * call.teacher[0].element_size() * call.teacher[0].shape[1]
    return call.logits_dtype.itemsize * call.vocab if call.options.topk_mode == "uniform_tail" else 0


def round_rows(rows: int, limit: int) -> int:
    """Clamp to 1..``limit``, and round down to a multiple of the GEMM's 128 from there on."""
    rows = max(1, min(rows, limit))
    return rows if rows < 128 else rows // 128 * 128


def run_tiles(call: HeadCall, segment: Segment, result: HeadResult) -> None:
    """Process all rows of a segment in tiles of the full vocabulary."""
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
    # dL in the place of the logits would overwrite their padding.
    own_dlogits = collected is not None or not call.needs_grad
    padded = row_multiple(device) > 1 and own_dlogits and _teacher_is_padded(call, segment)
    options = call.options._replace(padded=padded)
    for start, end in chunks:
        x = operand(take(call.hidden, segment.rows, start, end), call.compute_dtype)
        for a, b in spans(end - start, tile_rows):
            student = project(x[a:b], weight, call.bias, tile[: b - a])
            dlogits = (student if collected is None else collected[a:b]) if call.needs_grad else None
            rows = row_losses(call, segment, start + a, start + b, student, next(teacher, None), dlogits, options)
            result.store_losses(segment, start + a, start + b, *rows)
        if call.needs_grad:
            dlogits = (tile if collected is None else collected)[: end - start]
            result.add_product(segment, start, end, dlogits, x, weight)


def row_losses(
    call: HeadCall,
    segment: Segment,
    start: int,
    end: int,
    student: Tensor,
    teacher: Tensor | Sequence[Tensor] | None,
    dlogits: Tensor | None,
    options: RowOptions,
) -> RowLosses:
    """Run the row work of one tile on the back end of its device; teacher: what `teacher_tiles` yields."""
    index = segment.batch(start, end)
    labels = call.labels[index] if call.labels is not None and segment.has_label else None
    ce_weights, kd_weights = call.ce_weights[index], call.kd_weights[index]
    kernels = head_backend("linear_distill_loss", student)
    if isinstance(teacher, Sequence):
        log_q, indices, log_tail = teacher
        return kernels.topk_rows(student, log_q, indices, log_tail, labels, ce_weights, kd_weights, options, dlogits)
    return kernels.dense_rows(student, teacher, labels, ce_weights, kd_weights, options, dlogits)


def _teacher_is_padded(call: HeadCall, segment: Segment) -> bool:
    """True where the teacher's logits, if there are any, lie in a tile as wide as the student's."""
    if not segment.has_teacher or call.teacher_kind == "topk":
        return True
    return call.teacher_kind == "dense" and call.teacher[1].shape[0] == call.vocab


def teacher_tiles(
    call: HeadCall, segment: Segment, tiles: list[tuple[int, int]], tile_rows: int
) -> Iterator[Tensor | Sequence[Tensor]]:
    """Yield the teacher of each tile in turn: logits, or the three tensors of a top-k cache; nothing without one."""
    if not segment.has_teacher:
        return iter(())
    rows, device = segment.teacher_rows, call.hidden.device
    if call.teacher_kind == "topk":
        return topk_tiles(call.teacher, rows, tiles, device)
    if call.teacher_kind == "logits":
        return row_tiles(call.teacher[0], rows, tiles, device)
    buffer = new_tile(tile_rows, call.teacher[1].shape[0], logits_dtype(call.teacher_dtype), device)
    return dense_tiles(call.teacher, call.teacher_dtype, rows, tiles, buffer)
