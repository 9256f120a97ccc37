"""A Fisher-weighted penalty of a low-rank update, by row blocks: the dense product B A never exists as a whole.

    L = 1/2 sum_ij F_ij D_ij^2,   D = scale B A            F: the dense Fisher of the weight that the update is added to
    dL/dB = scale (F * D) A^T,    dL/dA = scale B^T (F * D)

The forward forms the gradients, block by block, and the backward only scales them: 6·r·out·in FLOP and one read of F.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from safecl.kernels.spans import spans

_BLOCK_BYTES = 2**26


def lowrank_fisher_penalty(
    a: Tensor, b: Tensor, fisher: Tensor, scale: float = 1.0, *, block_bytes: int = _BLOCK_BYTES
) -> Tensor:
    """Return 1/2 sum F * (scale B A)^2, 0-dim fp32, with gradients of A and B.

    a: [r, in], b: [out, r], fp32 or bf16, one device. fisher: [out, in], fp32 or bf16, non-negative, on that device or
    on the host, from where it is copied block by block (asynchronously if pinned). block_bytes: size of an fp32 block
    of the product; about four of them exist at a time. Products are formed in fp32. Raises ValueError for shapes and
    dtypes that do not fit.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or fisher.shape != (b.shape[0], a.shape[1]):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (a, b, fisher))
        raise ValueError(f"a, b and fisher must be [r, in], [out, r] and [out, in]; got {shapes}")
    if not all(tensor.dtype in (torch.float32, torch.float64, torch.bfloat16) for tensor in (a, b, fisher)):
        raise ValueError(f"a, b and fisher must be fp32 or bf16, got {a.dtype}, {b.dtype} and {fisher.dtype}")
    block_rows = max(1, block_bytes // (4 * max(1, a.shape[1])))
    penalty: Tensor = _LowRankPenalty.apply(  # type: ignore[no-untyped-call]  # torch gives it no types
        a, b, fisher.detach(), float(scale), block_rows
    )
    return penalty


class _LowRankPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, fisher: Tensor, scale: float, block_rows: int) -> Tensor:
        wide = torch.promote_types(a.dtype, torch.float32)
        with torch.autocast(a.device.type, enabled=False):
            wa, wb = a.to(wide), b.to(wide)
            da, db = torch.zeros_like(wa), torch.zeros_like(wb)
            total = torch.zeros((), dtype=torch.float64, device=a.device)
            for start, end in spans(b.shape[0], block_rows):
                rows = wb[start:end]
                delta = (rows @ wa).mul_(scale)  # [block, in]
                pull = fisher[start:end].to(a.device, non_blocking=True).to(wide).mul(delta)
                total += torch.dot(pull.view(-1), delta.view(-1))
                torch.mm(pull, wa.t(), out=db[start:end]).mul_(scale)
                da.addmm_(rows.t(), pull, alpha=scale)
        ctx.save_for_backward(da, db)
        ctx.dtypes = a.dtype, b.dtype
        return (0.5 * total).to(wide)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        da, db = ctx.saved_tensors
        return (da * grad).to(ctx.dtypes[0]), (db * grad).to(ctx.dtypes[1]), None, None, None
