"""Top-k teachers from hidden states: exact top-k log-probabilities, their indices, and the log-mass of the rest.

    log p_v = z_v - lse(z),   log tail = lse(z without its k largest) - lse(z),   z = logits / temperature

The k largest are taken out before the rest is summed, so the tail is right to fp32 even at a mass of 1e-14, where 1 -
sum would be noise. `linear_topk` needs the whole head on the device. `SlicedTopK` gets it slice by slice, and keeps the
k largest so far and the log-mass of the others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from safecl.kernels.head import checks
from safecl.kernels.head.divergences import shape_logits_
from safecl.kernels.head.matmul import logits_dtype, new_tile, operand, project
from safecl.kernels.head.teachers import TopKTeacher
from safecl.kernels.spans import spans

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

    hidden: [rows, H], weight: [V, H], bias: [V], one floating dtype and device. k: 1..V. temperature: that of the
    later training. Returns log_probs [rows, k] in descending order, indices [rows, k] int64, log_tail [rows]; fp32
    (``TopKTeacher`` says how much accuracy fp16 loses). Raises ValueError for shapes, dtypes or devices that do not fit
    and for k outside 1..V.
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
        step = _tile_rows(dtype, vocab, device)
        tile = new_tile(min(step, hidden.shape[0]), vocab, dtype, device)
        for start, end in spans(hidden.shape[0], step):
            raw = project(operand(hidden[start:end], compute), head, bias, tile[: end - start])
            logits = shape_logits_(raw, logit_scale, softcap).div_(temperature)
            log_probs[start:end], indices[start:end], log_tail[start:end] = topk_with_tail_(logits, k)
    return TopKTeacher(log_probs, indices, log_tail, float(temperature), vocab)


class SlicedTopK:
    """The outputs of ``linear_topk`` for a head that comes in slices of the vocabulary, each read once.

    It serves heads that are not on the device as a whole.

        found = SlicedTopK(hidden, k=64)
        for start, weight in slices:            # weight: rows start .. start + len(weight) of the head
            found.add(start, weight)
        teacher = found.result()                # a TopKTeacher

    hidden: [rows, H]. k: clipped to the vocabulary in the result. temperature, softcap, logit_scale: as in
    ``linear_topk``. Needs 12·k bytes per row and one tile of logits. Slices may come in any order; together they must
    cover the vocabulary once.
    """

    def __init__(
        self,
        hidden: Tensor,
        k: int,
        *,
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float | None = None,
    ):
        checks.check_options("forward_kl", 0.5, temperature, "none")
        self.hidden, self.k = hidden, k
        self.temperature, self.softcap, self.logit_scale = float(temperature), softcap, logit_scale
        self.dtype = logits_dtype(hidden.dtype)
        rows = hidden.shape[0]
        self._top = hidden.new_full((rows, k), -math.inf, dtype=self.dtype)
        self._indices = torch.zeros(rows, k, dtype=torch.int64, device=hidden.device)
        self._rest = hidden.new_full((rows,), -math.inf, dtype=self.dtype)
        self._vocab = 0

    @torch.no_grad()
    def add(self, start: int, weight: Tensor, bias: Tensor | None = None) -> None:
        """Add the tokens start .. start + len(weight).

        weight: [slice, H], bias: [slice], in the dtype of ``hidden``.
        """
        checks.check_head(self.hidden, weight, bias, self.softcap, self.logit_scale)
        width, device = weight.shape[0], self.hidden.device
        self._vocab += width
        with torch.autocast(device.type, enabled=False):
            head = operand(weight, self.hidden.dtype)
            step = _tile_rows(self.dtype, width, device)
            tile = self.hidden.new_empty(min(step, self.hidden.shape[0]), width, dtype=self.dtype)
            for low, high in spans(self.hidden.shape[0], step):
                raw = project(operand(self.hidden[low:high], self.hidden.dtype), head, bias, tile[: high - low])
                logits = shape_logits_(raw, self.logit_scale, self.softcap).div_(self.temperature)
                self._merge(slice(low, high), logits, start)

    def _merge(self, rows: slice, logits: Tensor, start: int) -> None:
        """Merge a slice's logits at the temperature into the k largest and the rest of these rows."""
        new, indices = logits.topk(min(self.k, logits.shape[1]), dim=-1)
        rest = torch.logsumexp(logits.scatter_(-1, indices, -math.inf), -1)
        both = torch.cat([self._top[rows], new], -1)
        self._top[rows], chosen = both.topk(self.k, dim=-1)
        self._indices[rows] = torch.cat([self._indices[rows], indices + start], -1).gather(-1, chosen)
        fell_out = torch.logsumexp(both.scatter_(-1, chosen, -math.inf), -1)
        self._rest[rows] = torch.logaddexp(self._rest[rows], torch.logaddexp(rest, fell_out))

    def result(self) -> TopKTeacher:
        """Return the teacher of all slices added so far."""
        k = min(self.k, self._vocab)
        log_total = torch.logaddexp(torch.logsumexp(self._top, -1), self._rest)
        log_probs = (self._top - log_total[:, None])[:, :k]
        return TopKTeacher(log_probs, self._indices[:, :k], self._rest - log_total, self.temperature, self._vocab)


def _tile_rows(dtype: torch.dtype, width: int, device: torch.device) -> int:
    return max(1, min(_TILE_BYTES // (dtype.itemsize * width), _ROWS_CPU if device.type == "cpu" else _ROWS_GPU))


def topk_with_tail_(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (log_probs [rows, k], indices [rows, k], log_tail [rows]) of ``logits`` [rows, vocab].

    Overwrites the k largest logits with -inf.
    """
    top, indices = logits.topk(k, dim=-1)
    log_rest = torch.logsumexp(logits.scatter_(-1, indices, -math.inf), -1)
    log_total = torch.logaddexp(torch.logsumexp(top, -1), log_rest)
    return top - log_total[:, None], indices, log_rest - log_total
