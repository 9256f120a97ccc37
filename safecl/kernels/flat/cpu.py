"""The flat family on the CPU: passes validated tensors to the C++ library (`csrc/`) as raw pointers."""

from __future__ import annotations

from ctypes import byref, c_uint32

import torch
from torch import Tensor

from safecl.kernels import native
from safecl.kernels.flat import torch_twin
from safecl.kernels.flat.arguments import AdamWArguments, Coefficients, Scalar, Segments


def ema_update(ema: Tensor, param: Tensor, rate: Scalar, seed: Tensor | None) -> None:
    words = (c_uint32 * 2)(*([0, 0] if seed is None else seed.tolist()))
    native.library().safecl_ema(byref(native.EmaCall(ema.numel(), _buffer(ema), _buffer(param), float(rate), words)))


def fisher_accumulate(fisher: Tensor, grad: Tensor, weight: Scalar) -> None:
    native.library().safecl_fisher_accumulate(
        byref(native.FisherCall(fisher.numel(), _buffer(fisher), _buffer(grad), float(weight)))
    )


def fisher_penalty(grad: Tensor, param: Tensor, anchor: Tensor, fisher: Tensor | None, strength: Scalar) -> Tensor:
    buffers = [_buffer(t) for t in (grad, param, anchor, fisher)]
    call = native.PenaltyCall(grad.numel(), *buffers, native.Segments(), float(strength), 1.0)
    return torch.tensor(0.5 * native.library().safecl_fisher_penalty(byref(call)), dtype=torch.float32)


def penalized_grad_norm(
    grad: Tensor,
    param: Tensor | None,
    anchor: Tensor | None,
    fisher: Tensor | None,
    strength: Scalar,
    grad_mult: Scalar,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    buffers = [_buffer(t) for t in (grad, param, anchor, fisher)]
    call = native.PenaltyCall(grad.numel(), *buffers, _segments(segments), float(strength), float(grad_mult))
    sums = native.Sums()
    native.library().safecl_penalized_grad_norm(byref(call), byref(sums))
    return torch.tensor(sums.square, dtype=torch.float64), torch.tensor(0.5 * sums.penalty, dtype=torch.float64)


def adamw_step(call: AdamWArguments) -> Tensor | None:
    if call.frozen:
        return torch_twin.adamw_step(call)  # rare, and only the loss is computed
    tensors = {
        "param": call.param,
        "exp_avg": call.exp_avg,
        "exp_avg_sq": call.exp_avg_sq,
        "ema": call.ema,
        "param_out": call.param_out,
    }
    arguments = native.AdamWCall(
        numel=call.param.numel(),
        grad=_buffer(call.grad),
        anchor=_buffer(call.anchor),
        fisher=_buffer(call.fisher),
        segments=_segments(call.segments),
        proximal=call.proximal,
        ema_by_fisher=call.ema_by_fisher,
        **{name: None if t is None else t.data_ptr() for name, t in tensors.items()},
        **_coefficients(call.coef),
    )
    sums = native.Sums()
    native.library().safecl_adamw(byref(arguments), byref(sums))
    if call.nonfinite is not None and sums.nonfinite:
        call.nonfinite.add_(sums.nonfinite)
    return None if call.anchor is None else torch.tensor(0.5 * sums.penalty, dtype=torch.float32)


def _coefficients(c: Coefficients) -> dict[str, float]:
    scalars = (
        "lr",
        "step_size",
        "inv_sqrt_correction2",
        "weight_decay",
        "strength",
        "ema_rate",
        "ema_threshold",
        "ema_rate_above",
    )
    betas = {"beta1": c.beta1, "one_minus_beta1": 1.0 - c.beta1, "beta2": c.beta2, "one_minus_beta2": 1.0 - c.beta2}
    return {"grad_mult": float(c.grad), "eps": c.eps, **betas, **{name: float(getattr(c, name)) for name in scalars}}


def _buffer(tensor: Tensor | None) -> native.Buffer:
    return native.Buffer() if tensor is None else native.Buffer(tensor.data_ptr(), tensor.dtype == torch.bfloat16)


def _segments(table: Segments | None) -> native.Segments:
    """Return pointers into the table's tensors, which the caller keeps alive during the call."""
    if table is None:
        return native.Segments()
    columns = (None if t is None else t.data_ptr() for t in table)
    return native.Segments(table.offsets.numel() - 1, *columns)
