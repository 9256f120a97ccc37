"""Where the teacher's distribution comes from: a hidden state and a head, a top-k cache, or stored logits.

A teacher speaks about some rows of the student's batch, one teacher row per student row in the same order, and never
receives a gradient. The top-k form keeps the k largest log-probabilities at the training temperature and the logarithm
of the mass of all the others. That log-tail is stored, never derived as 1 - sum: in fp32 the difference has no correct
digit once the k entries hold nearly everything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

TOPK_MODES = ("tail", "truncated", "renormalised", "uniform_tail")


@dataclass(frozen=True)
class DenseTeacher:
    """The teacher's last hidden states and its output head: exact, at the price of one more GEMM (2·rows·H·V FLOP).

    hidden: [rows, teacher_hidden], floating point, on the student's device or on the host (pinned memory is streamed
    tile by tile). weight: [teacher_vocab, teacher_hidden], the dtype of ``hidden``, on the student's device. bias:
    [teacher_vocab] or None. softcap, logit_scale: as in the teacher's own model, logits = softcap(logit_scale · (hidden
    @ weight.T + bias)). The hidden width may differ from the student's. The vocabulary may be padded to another width;
    then the shared tokens are compared.
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
    """Stored logits (or log-probabilities; a constant per row does not matter) over the whole vocabulary.

    logits: [rows, teacher_vocab], floating point, on the student's device or on the host (pinned memory is streamed
    tile by tile). Store fp16 log-probabilities rather than bf16 logits, whose rounding is larger than the differences
    that near the teacher matter.
    """

    logits: Tensor

    @property
    def num_rows(self) -> int:
        return self.logits.shape[0]


@dataclass(frozen=True)
class TopKTeacher:
    """The k most probable tokens of each row and the mass of the rest, at one temperature; made by ``linear_topk``.

    log_probs: [rows, k], floating point, natural logarithms at ``temperature``; -inf is probability 0. Rounded to fp16
    they cost 0.6 %
               of the gradient at a KL of 1e-3 and 6 % at 1e-5 (benchmarks/head_accuracy.py).
    indices:   [rows, k], integer, distinct within a row, below vocab_size.
    log_tail:  [rows], log of the probability of all other tokens at ``temperature``; -inf when there are none.
    temperature, vocab_size: what the teacher was made with. The loss refuses another temperature or another vocabulary.
    mode, the treatment of the tail, Q = sum of the stored q:
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
        """The same teacher with its tensors on ``device``."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in ("log_probs", "indices", "log_tail")
        }
        return replace(self, **moved)

    def __getitem__(self, rows) -> TopKTeacher:
        """The teacher of a slice, mask or index of its rows."""
        return replace(self, log_probs=self.log_probs[rows], indices=self.indices[rows], log_tail=self.log_tail[rows])


Teacher = DenseTeacher | LogitsTeacher | TopKTeacher
