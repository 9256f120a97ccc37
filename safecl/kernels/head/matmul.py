"""The head's matrix products, with fp32 results from 16-bit operands.

On a GPU cuBLAS accumulates and returns fp32 (mm(out_dtype=fp32)). CPU products return the operands' dtype, so 16-bit
operands are widened first: the same numbers, at the price of an fp32 copy.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logits_dtype(compute: torch.dtype) -> torch.dtype:
    """fp32, or fp64 beside fp64 operands."""
    return torch.promote_types(compute, torch.float32)


def operand_dtype(compute: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of a product's operands: ``compute`` on a GPU, at least fp32 elsewhere."""
    return compute if device.type == "cuda" else logits_dtype(compute)


def operand(tensor: Tensor, compute: torch.dtype) -> Tensor:
    """Rounded to the compute dtype (autocast's may be narrower than the tensor's), then in the dtype that the product
    needs."""
    return tensor.to(compute).to(operand_dtype(compute, tensor.device))


def new_tile(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised [rows, vocab]. Rows start at multiples of 16 on a GPU: any vocabulary then has aligned loads and
    operands."""
    step = row_multiple(device)
    return torch.empty(rows, -(-vocab // step) * step, dtype=dtype, device=device)[:, :vocab]


def row_multiple(device: torch.device) -> int:
    return 16 if device.type == "cuda" else 1


def project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """out = x @ weight.T + bias; out: [rows, vocab] fp32, whatever the dtype of the operands."""
    options = {} if x.dtype == out.dtype else {"out_dtype": out.dtype}
    torch.mm(x, weight.t(), out=out, **options)
    return out if bias is None else out.add_(bias)


def accumulate_(total: Tensor, dlogits: Tensor, x: Tensor, first: bool) -> None:
    """total += dlogits.T @ x, in total's fp32; first: ``total`` holds nothing yet."""
    options = {} if x.dtype == total.dtype else {"out_dtype": total.dtype}
    if first:
        torch.mm(dlogits.t(), x, out=total, **options)
    elif not options:
        torch.addmm(total, dlogits.t(), x, out=total)
    else:  # a batch of one is the same cuBLAS call as addmm, whose out_dtype form takes no fp32 summand in torch 2.8
        batch = total[None]
        torch.baddbmm(batch, dlogits.t()[None], x[None], out=batch, **options)
