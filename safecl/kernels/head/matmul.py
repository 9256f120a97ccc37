"""The head's matrix products, with fp32 results from 16-bit operands.

On a GPU cuBLAS accumulates in fp32 and returns fp32 (mm(out_dtype=fp32)). A CPU product returns the dtype of its
operands, so 16-bit operands are widened first: the numbers are the same, at the price of an fp32 copy.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logits_dtype(compute: torch.dtype) -> torch.dtype:
    """Return the dtype of the logits: fp32, or fp64 for fp64 operands."""
    return torch.promote_types(compute, torch.float32)


def operand_dtype(compute: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of a product's operands: ``compute`` on a GPU, at least fp32 elsewhere."""
    return compute if device.type == "cuda" else logits_dtype(compute)


def operand(tensor: Tensor, compute: torch.dtype) -> Tensor:
    """Round to the compute dtype, which autocast may make narrower, then convert to the dtype of the product."""
    return tensor.to(compute).to(operand_dtype(compute, tensor.device))


def new_tile(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised [rows, vocab].

    On a GPU rows start at multiples of 16 elements, so that loads and operands are aligned for any vocabulary. The
    elements between are -inf: tokens that are not there, so that a kernel can read whole vectors without a mask.
    """
    tile = torch.empty(rows, padded_width(vocab, row_multiple(device)), dtype=dtype, device=device)
    tile[:, vocab:] = float("-inf")
    return tile[:, :vocab]


def padded_width(vocab: int, step: int = 16) -> int:
    """Return the elements between the beginnings of a tile's rows."""
    return -(-vocab // step) * step


def row_multiple(device: torch.device) -> int:
    return 16 if device.type == "cuda" else 1


def project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Compute out = x @ weight.T + bias; out: [rows, vocab] fp32 for operands of any dtype."""
    options = {} if x.dtype == out.dtype else {"out_dtype": out.dtype}
    torch.mm(x, weight.t(), out=out, **options)
    return out if bias is None else out.add_(bias)


def accumulate_(total: Tensor, dlogits: Tensor, x: Tensor, first: bool) -> None:
    """Add dlogits.T @ x to ``total`` in its fp32; first: ``total`` is uninitialised and is overwritten."""
    options = {} if x.dtype == total.dtype else {"out_dtype": total.dtype}
    if first:
        torch.mm(dlogits.t(), x, out=total, **options)
    elif not options:
        torch.addmm(total, dlogits.t(), x, out=total)
    else:  # addmm with an out_dtype takes no fp32 summand in torch 2.8; a batch of one is the same cuBLAS call
        batch = total[None]
        torch.baddbmm(batch, dlogits.t()[None], x[None], out_dtype=total.dtype, out=batch)
