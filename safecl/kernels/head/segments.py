"""One call of the fused head: its tensors, its rows sorted by the work that they need, and the result they fill.

Every row of the batch belongs to one segment: label only, teacher only, or both. Rows without a label and without a
teacher, or with weight 0, belong to none and are never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from safecl.kernels.head.backend import RowOptions
from safecl.kernels.head.checks import raise_first, value_questions
from safecl.kernels.head.matmul import accumulate_, logits_dtype, operand_dtype


@dataclass
class HeadCall:
    """The validated tensors and options of one call.

    hidden: [M, H], weight: [V, H], bias: [V], labels: [M], ce_weights and kd_weights: [M] fp32, teacher_rows: [R].
    teacher: for the kind "dense" hidden, weight and perhaps bias; for "logits" the logits; for "topk" log_probs,
    indices and log_tail; for "none" nothing.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor | None
    ce_weights: Tensor
    kd_weights: Tensor
    teacher_rows: Tensor | None
    teacher: list[Tensor]
    teacher_kind: str
    options: RowOptions
    ignore_index: int
    compute_dtype: torch.dtype
    teacher_dtype: torch.dtype
    tile_bytes: int
    need_hidden: bool
    need_weight: bool
    need_bias: bool
    known: tuple[Tensor, list[int]] | None = None
    """Order and counts of `SortedRows`; None: the device finds them out."""

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
        """True where dL needs its own buffer, because it is narrower than the logits; otherwise it overwrites them."""
        return self.needs_grad and operand_dtype(self.compute_dtype, self.hidden.device) != self.logits_dtype


@dataclass
class Segment:
    """Rows that need the same work.

    rows: their positions in the batch; teacher_rows: their positions in the teacher; None means all, in order.
    """

    rows: Tensor | None
    teacher_rows: Tensor | None
    count: int
    has_label: bool
    has_teacher: bool

    def batch(self, start: int, end: int) -> Tensor | slice:
        """Return the index of the segment's rows start..end in tensors of the batch."""
        return slice(start, end) if self.rows is None else self.rows[start:end]


class HeadResult:
    """Losses per token [M], and the gradients of hidden [M, H], weight [V, H] and bias [V], the last two in fp32."""

    def __init__(self, call: HeadCall):
        self.call = call
        self.ce, self.kd, self.logsumexp = (
            call.hidden.new_zeros(call.hidden.shape[0], dtype=call.logits_dtype) for _ in range(3)
        )
        self.hidden = torch.zeros_like(call.hidden, memory_format=torch.contiguous_format) if call.need_hidden else None
        self.bias: Tensor | None = None
        if call.bias is not None and call.need_bias:
            self.bias = torch.zeros_like(call.bias, dtype=call.logits_dtype)
        self.weight: Tensor | None = None

    def store_losses(
        self,
        segment: Segment,
        start: int,
        end: int,
        ce: Tensor | None = None,
        kd: Tensor | None = None,
        logsumexp: Tensor | None = None,
    ) -> None:
        index = segment.batch(start, end)
        for total, part in ((self.ce, ce), (self.kd, kd), (self.logsumexp, logsumexp)):
            if part is not None:
                total[index] = part

    def add_product(self, segment: Segment, start: int, end: int, dlogits: Tensor, x: Tensor, weight: Tensor) -> None:
        """Add the gradients of rows start..end, given dlogits [rows, V]."""
        if self.hidden is not None:
            self.store_hidden(segment, start, end, torch.mm(dlogits, weight))
        if self.call.need_weight:
            first = self.weight is None
            if self.weight is None:
                self.weight = torch.empty(self.call.weight.shape, dtype=self.call.logits_dtype, device=x.device)
            accumulate_(self.weight, dlogits, x, first)
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=self.bias.dtype)

    def store_hidden(self, segment: Segment, start: int, end: int, grad: Tensor) -> None:
        assert self.hidden is not None
        if segment.rows is None:
            self.hidden[start:end] = grad
        else:
            self.hidden.index_copy_(0, segment.rows[start:end], grad.to(self.hidden.dtype))

    def weight_to_add_to(self) -> Tensor:
        """Return the weight's gradient, zeros before the first addition."""
        if self.weight is None:
            self.weight = torch.zeros(
                self.call.weight.shape, dtype=self.call.logits_dtype, device=self.call.hidden.device
            )
        return self.weight

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of hidden, weight and bias: exact zeros where no row took part, empty where not needed.

        Those of weight and bias are fp32, because the backward rounds them once.
        """
        none = self.call.hidden.new_empty(0)
        return (
            none if self.hidden is None else self.hidden,
            self.weight_to_add_to() if self.call.need_weight else none.clone(),
            none.clone() if self.bias is None else self.bias,
        )


class SortedRows(TypedDict):
    """The rows of a call, sorted by the work that they need: none, label only, teacher only, both."""

    order: Tensor
    """int64 [tokens]: the tokens that need the first kind of work, then those of the second, and so on."""
    counts: list[int]
    """The tokens of each of the four kinds."""


def sort_rows(
    tokens: int,
    *,
    vocab: int,
    labels: Tensor | None = None,
    ce_weights: Tensor | None = None,
    teacher_rows: Tensor | None = None,
    kd_weights: Tensor | None = None,
    indices: Tensor | None = None,
    ignore_index: int = -100,
) -> SortedRows:
    """Return the `sorted_rows` of a call of linear_distill_loss with these arguments, from tensors in host memory.

    labels, ce_weights: None: no cross-entropy. teacher_rows, kd_weights: None: no teacher. indices: those of a
    TopKTeacher, which are checked. Raises ValueError for values out of range.
    """
    teacher = [torch.empty(0)] * 3 if indices is None else [indices] * 3
    kind = "none" if indices is None else "topk"
    questions = value_questions(labels, ignore_index, vocab, teacher_rows, tokens, teacher, kind)
    raise_first(questions, [bool(answer) for answer in questions.values()])
    position = None if teacher_rows is None else _places_of(teacher_rows, tokens)
    work = _work_of(tokens, torch.device("cpu"), labels, ignore_index, ce_weights, position, kd_weights)
    return SortedRows(order=torch.argsort(work, stable=True), counts=torch.bincount(work, minlength=4).tolist())


def _work_of(
    tokens: int,
    device: torch.device,
    labels: Tensor | None,
    ignore_index: int,
    ce_weights: Tensor | None,
    teacher_position: Tensor | None,
    kd_weights: Tensor | None,
) -> Tensor:
    """Return the kind of work of each token, int64 [tokens]: 1 for a label, plus 2 for a teacher."""
    work = torch.zeros(tokens, dtype=torch.int64, device=device)
    if labels is not None:
        work += (labels != ignore_index) & (ce_weights != 0)
    if teacher_position is not None:
        work += 2 * ((teacher_position >= 0) & (kd_weights != 0))
    return work


def split_rows(call: HeadCall) -> list[Segment]:
    """Sort the rows into segments, and raise ValueError for values out of range.

    The sizes of the segments and the checks of the values cost a GPU one synchronisation, unless the caller knows them.
    """
    tokens, device = call.hidden.shape[0], call.hidden.device
    teacher_position = _teacher_positions(call, tokens, device)
    if call.known is not None:
        order, counts = call.known
    else:
        order, counts = _sort_on_device(call, tokens, teacher_position)
    segments, start = [], counts[0]
    for kind in (1, 2, 3):
        if counts[kind]:
            rows = None if counts[kind] == tokens else order[start : start + counts[kind]]
            segments.append(_segment(rows, teacher_position, call.teacher_rows, kind, counts[kind]))
        start += counts[kind]
    return segments


def _sort_on_device(call: HeadCall, tokens: int, teacher_position: Tensor | None) -> tuple[Tensor, list[int]]:
    device = call.hidden.device
    work = _work_of(tokens, device, call.labels, call.ignore_index, call.ce_weights, teacher_position, call.kd_weights)
    questions = value_questions(
        call.labels, call.ignore_index, call.vocab, call.teacher_rows, tokens, call.teacher, call.teacher_kind
    )
    sizes = (work == torch.arange(4, device=device)[:, None]).sum(1)
    answers = torch.cat([*(answer.to(sizes)[None] for answer in questions.values()), sizes]).tolist()
    raise_first(questions, answers[:-4])
    return torch.argsort(work, stable=True), answers[-4:]


def _segment(
    rows: Tensor | None, teacher_position: Tensor | None, teacher_rows: Tensor | None, kind: int, count: int
) -> Segment:
    """Make a segment of `kind`: 1 has labels, 2 has a teacher, 3 has both."""
    has_teacher = kind >= 2
    positions = None
    if has_teacher and not (rows is None and teacher_rows is None):
        assert teacher_position is not None
        positions = teacher_position if rows is None else teacher_position[rows]
    return Segment(rows, positions, count, has_label=kind % 2 == 1, has_teacher=has_teacher)


def _teacher_positions(call: HeadCall, tokens: int, device: torch.device) -> Tensor | None:
    """Return the teacher's row for each row of the batch [M], -1 for none; None without a teacher."""
    if call.teacher_kind == "none":
        return None
    return torch.arange(tokens, device=device) if call.teacher_rows is None else _places_of(call.teacher_rows, tokens)


def _places_of(teacher_rows: Tensor, tokens: int) -> Tensor:
    positions = torch.full((tokens,), -1, dtype=torch.int64, device=teacher_rows.device)
    if tokens:  # clamped, because a GPU cannot report an index out of range; `split_rows` refuses it later
        positions[teacher_rows.clamp(0, tokens - 1)] = torch.arange(teacher_rows.shape[0], device=teacher_rows.device)
    return positions
