"""The three sources of the teacher's distribution: hidden states and a head, a top-k cache, or stored logits.

A teacher covers some rows of the student's batch, one teacher row per student row in the same order, and never receives
a gradient. The top-k form has the k largest log-probabilities at the training temperature and the logarithm of the mass
of all the others. That log-tail is stored and never derived as 1 - sum: in fp32 the difference has no correct digit
when the k entries hold nearly all of the mass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

TOPK_MODES = ("tail", "truncated", "renormalised", "uniform_tail")


@dataclass(frozen=True)
class DenseTeacher:
    """The teacher's last hidden states and its output head: exact, for one more GEMM (2·rows·H·V FLOP).

    hidden: [rows, teacher_hidden], floating point, on the student's device or on the host (pinned memory is streamed
    tile by tile). weight: [teacher_vocab, teacher_hidden], the dtype of ``hidden``, on the student's device. bias:
    [teacher_vocab] or None. softcap, logit_scale: those of the teacher's model, logits = softcap(logit_scale · (hidden
    @ weight.T + bias)). The hidden width may differ from the student's. The vocabulary may be padded to another width;
    then only the shared tokens are compared.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float | None = None

    @property
    def num_rows(self) -> int:
        return self.hidden.shape[0]


@dataclass(frozen=True)
class LogitsTeacher:
    """Stored logits over the whole vocabulary, or log-probabilities: a constant per row does not matter.

    logits: [rows, teacher_vocab], floating point, on the student's device or on the host (pinned memory is streamed
    tile by tile). Store fp16 log-probabilities rather than bf16 logits: the rounding of bf16 is larger than the
    differences between a teacher and a student near it.
    """

    logits: Tensor

    @property
    def num_rows(self) -> int:
        return self.logits.shape[0]


@dataclass(frozen=True)
class TopKTeacher:
    """The k most probable tokens of each row and the mass of the rest, at one temperature; made by ``linear_topk``.

    log_probs: [rows, k], floating point, natural logarithms at ``temperature``; -inf is probability 0. Rounding them to
               fp16 changes the gradient by 0.6 % at a KL of 1e-3 and by 6 % at 1e-5
               (benchmarks/kernels/head_accuracy.py).
    indices:   [rows, k], integer, distinct within a row, below vocab_size.
    log_tail:  [rows], log of the probability of all other tokens at ``temperature``; -inf when there are none.
    temperature, vocab_size: those that the teacher was made with. The loss refuses others.
    mode: the treatment of the tail.
      "tail"          k + 1 events, the last one is "any other token" (the default)
      "truncated"     the sum over the k stored tokens only; biased towards sharper students and may be negative
      "renormalised"  student and teacher both renormalised over the k stored tokens; needs no full-vocabulary GEMM
      "uniform_tail"  the tail spread evenly over the other V - k tokens
    """

    log_probs: Tensor
    indices: Tensor
    log_tail: Tensor
    temperature: float
    vocab_size: int
    mode: str = "tail"

    @property
    def num_rows(self) -> int:
        return self.indices.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TopKTeacher:
        """Return the same teacher with its tensors on ``device``."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in ("log_probs", "indices", "log_tail")
        }
        return replace(self, **moved)

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> TopKTeacher:
        """Return the teacher of the rows that a slice, a mask or indices select."""
        return replace(self, log_probs=self.log_probs[rows], indices=self.indices[rows], log_tail=self.log_tail[rows])


Teacher = DenseTeacher | LogitsTeacher | TopKTeacher
