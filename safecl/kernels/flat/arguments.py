"""Checks and scalar arithmetic that all back ends of the flat family share.

A flat kernel works on whole buffers of any shape. After these checks, tensors are contiguous, of a known dtype, on one
device and of one length, and no written buffer overlaps another. Scalars are Python floats or, where the caller passed
device scalars, 0-dim fp32 tensors that the host has never read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Scalar = float | Tensor

FLOAT32_MAX = torch.finfo(torch.float32).max
FLOAT32 = (torch.float32,)
FLOAT32_OR_BF16 = (torch.float32, torch.bfloat16)


class Segments(NamedTuple):
    """Parts of a flat buffer with their own penalty strength and weight decay.

    Element i in [offsets[s], offsets[s + 1]) uses entry s. offsets: int64 [S + 1], ascending (equal neighbours make an
    empty segment), from 0 to the buffer's numel. strength, weight_decay: fp32 [S], or None to use the scalar argument
    of the same name.
    """

    offsets: Tensor
    strength: Tensor | None = None
    weight_decay: Tensor | None = None

    def slice(self, start: int, stop: int) -> Segments:
        """Return the table of elements [start, stop), for a caller that steps a buffer in pieces."""
        return self._replace(offsets=self.offsets.clamp(start, stop) - start)


# `Segments`, or the three columns as sequences or tensors
SegmentTable = (
    Segments | tuple[Tensor | Sequence[int], Tensor | Sequence[float] | None, Tensor | Sequence[float] | None]
)


@dataclass(frozen=True)
class Coefficients:
    """The step's scalars, rounded to fp32 once.

    Each is a float, or a 0-dim fp32 tensor if it depends on a device scalar.
    """

    grad: Scalar  # clip_coef / grad_scale
    lr: Scalar
    step_size: Scalar  # lr / (1 - beta1^t)
    inv_sqrt_correction2: Scalar  # 1 / sqrt(1 - beta2^t)
    weight_decay: Scalar  # lr * weight_decay; lr * segments.weight_decay[s] replaces it in segments
    strength: Scalar
    ema_rate: Scalar  # 1 - ema_decay
    ema_threshold: Scalar  # elements whose fisher is above it use ema_rate_above
    ema_rate_above: Scalar  # 1 - ema_decay_above
    beta1: float
    beta2: float
    eps: float


@dataclass(frozen=True)
class AdamWArguments:
    """One validated call of `adamw_step_`."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    coef: Coefficients
    anchor: Tensor | None = None
    fisher: Tensor | None = None
    proximal: bool = False
    ema: Tensor | None = None
    ema_by_fisher: bool = False  # two rates, chosen per element
    param_out: Tensor | None = None
    found_inf: Tensor | None = None  # a device scalar; a host scalar has become `frozen`
    frozen: bool = False  # found_inf was true on the host: compute the penalty loss, write nothing
    segments: Segments | None = None
    nonfinite: Tensor | None = None  # the number of elements whose new state is not finite is added to it


def check_tensor(name: str, tensor: Tensor | None, like: Tensor, dtypes: Sequence[torch.dtype], like_name: str) -> None:
    """Raise ValueError unless a flat kernel can use `tensor` together with `like`."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous (a flat kernel reads it as one run of elements); pass {name}.contiguous()"
        )
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name} must be {wanted}, not {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.device != like.device:
        raise ValueError(
            f"{name} is on {tensor.device} but {like_name} is on {like.device}; both must be on one device"
        )
    if tensor.numel() != like.numel():
        raise ValueError(f"{name} has {tensor.numel()} elements but {like_name} has {like.numel()}")


def check_overlap(written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """Raise ValueError if a written buffer overlaps another: the result would depend on the order of execution."""
    spans = [(_span(t), name, name in written) for name, t in {**read, **written}.items() if t.numel()]
    spans.sort()
    for i, ((_, stop), name, is_written) in enumerate(spans):
        for (start, _), other, other_written in spans[i + 1 :]:
            if start >= stop:
                break
            if is_written or other_written:
                raise ValueError(f"{name} and {other} overlap in memory; a flat kernel needs separate buffers")


def _span(tensor: Tensor) -> tuple[int, int]:
    start = tensor.data_ptr()
    return start, start + tensor.numel() * tensor.element_size()


def check_scalar(
    name: str, value: Scalar, device: torch.device, *, low: float = 0.0, high: float = math.inf, open_high: bool = False
) -> Scalar:
    """Return a float within [low, high], or a device scalar as a 0-dim fp64 tensor.

    A device scalar is not checked against the bounds, because reading it waits for the device.
    """
    if isinstance(value, Tensor):
        _check_one_element(name, value)
        if stays_on_device(value):
            return _device_scalar(name, value, device)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number or a tensor of one element, not {type(value).__name__}") from None
    inside = low <= number <= min(high, FLOAT32_MAX) and not (open_high and number == high)
    if not inside:
        bounds = f">= {low:g}" if math.isinf(high) else f"in [{low:g}, {high:g}{')' if open_high else ']'}"
        raise ValueError(f"{name} must be finite and {bounds}, not {number}")
    return number


def check_grad_scale(grad_scale: Scalar | None, device: torch.device) -> Scalar:
    """Return the divisor of the gradients, 1 by default; 0 on the host is refused."""
    scale = 1.0 if grad_scale is None else check_scalar("grad_scale", grad_scale, device)
    if not isinstance(scale, Tensor) and scale == 0:
        raise ValueError("grad_scale must be > 0: gradients are divided by it")
    return scale


def stays_on_device(value: object) -> bool:
    """Return whether a scalar is one that the host must not read, because reading would wait for the device."""
    return isinstance(value, Tensor) and value.device.type != "cpu"


def _check_one_element(name: str, value: Tensor) -> None:
    if value.numel() != 1:
        raise ValueError(f"{name} must be a number or a tensor of one element, not of shape {tuple(value.shape)}")


def _device_scalar(name: str, value: Tensor, device: torch.device) -> Tensor:
    if value.device != device:
        raise ValueError(f"{name} is a scalar on {value.device} but the buffers are on {device}")
    return value.detach().reshape(()).double()


def check_found_inf(found_inf: Scalar | None, device: torch.device) -> bool | Tensor:
    """Return True, False, or a device scalar that only the kernel reads. NaN counts as found."""
    if found_inf is None:
        return False
    if isinstance(found_inf, Tensor):
        _check_one_element("found_inf", found_inf)
        if stays_on_device(found_inf):
            return _device_scalar("found_inf", found_inf, device).float()
    return float(found_inf) != 0.0


def check_counter(nonfinite: Tensor | None, device: torch.device) -> Tensor | None:
    """Raise ValueError unless a kernel can add to `nonfinite`."""
    if nonfinite is None:
        return None
    if not isinstance(nonfinite, Tensor):
        raise ValueError(f"nonfinite must be a tensor, not {type(nonfinite).__name__}")
    _check_one_element("nonfinite", nonfinite)
    if nonfinite.dtype != torch.int64 or nonfinite.device != device:
        raise ValueError(f"nonfinite must be int64 on {device}, not {nonfinite.dtype} on {nonfinite.device}")
    return nonfinite


def check_segments(segments: object, numel: int, device: torch.device) -> Segments | None:
    """Return `segments` as tensors on `device`; values on the host are checked."""
    if segments is None:
        return None
    if not isinstance(segments, Sequence) or len(segments) != 3:
        raise ValueError("segments must be three sequences or tensors: (offsets, strength, weight_decay)")
    offsets = _table("segments offsets", segments[0], torch.int64, device)
    if offsets.numel() < 2:
        raise ValueError("segments offsets needs at least two entries: 0 and the buffer's numel")
    _check_offsets(offsets, segments[0], numel)
    columns = [
        _column(name, column, offsets.numel() - 1, device)
        for name, column in zip(("strength", "weight_decay"), segments[1:], strict=True)
    ]
    return Segments(offsets, *columns)


def _table(name: str, values: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    try:
        table = torch.as_tensor(values, dtype=dtype).detach()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be a one-dimensional sequence of numbers or tensor") from None
    if table.dim() != 1:
        raise ValueError(f"{name} must be one-dimensional, not of shape {tuple(table.shape)}")
    return table.to(device, non_blocking=True).contiguous()


def _check_offsets(offsets: Tensor, given: object, numel: int) -> None:
    if offsets.device.type != "cpu":
        if isinstance(given, Tensor) and given.device.type != "cpu":
            return  # reading it would wait for the device; the kernels clamp instead
        offsets = torch.as_tensor(given, dtype=torch.int64)
    if offsets[0] != 0 or offsets[-1] != numel or bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(
            f"segments offsets must ascend from 0 to {numel} (the buffer's numel), not {offsets[0]} to {offsets[-1]}"
        )


def _column(name: str, values: object, length: int, device: torch.device) -> Tensor | None:
    if values is None:
        return None
    on_host = not isinstance(values, Tensor) or values.device.type == "cpu"
    column = _table(f"segments {name}", values, torch.float32, torch.device("cpu") if on_host else device)
    if column.numel() != length:
        raise ValueError(f"segments {name} has {column.numel()} entries but the offsets make {length} segments")
    if on_host and not bool(((column >= 0) & column.isfinite()).all()):
        raise ValueError(f"segments {name} must be finite and >= 0")
    return column.to(device, non_blocking=True)


def single(value: Scalar) -> Scalar:
    """Round a device scalar to fp32; the fp32 arguments of the kernels round a float."""
    return value.float() if isinstance(value, Tensor) else value


def adamw_coefficients(
    device: torch.device,
    *,
    step: Scalar,
    lr: Scalar,
    betas: tuple[float, float],
    eps: float,
    weight_decay: Scalar,
    strength: Scalar,
    ema_decay: Scalar | None,
    ema_threshold: Scalar | None,
    ema_decay_above: Scalar | None,
    clip_coef: Scalar | None,
    grad_scale: Scalar | None,
) -> Coefficients:
    """Check the step's scalars and derive the coefficients of the kernels.

    They are computed in fp64: in fp32 1 - beta^t is wrong by 6e-5 at t = 1, beta = 0.999.
    """
    beta1, beta2 = _check_betas(betas, device)
    step = check_scalar("step", step, device, low=1)
    lr = check_scalar("lr", lr, device)
    clip = 1.0 if clip_coef is None else check_scalar("clip_coef", clip_coef, device)
    scale = check_grad_scale(grad_scale, device)
    rates = {
        name: 0.0 if decay is None else 1.0 - check_scalar(name, decay, device, high=1.0)
        for name, decay in (("ema_decay", ema_decay), ("ema_decay_above", ema_decay_above))
    }
    return Coefficients(
        grad=single(clip / scale),
        lr=single(lr),
        step_size=single(lr / (1.0 - beta1**step)),
        inv_sqrt_correction2=single((1.0 - beta2**step) ** -0.5),
        weight_decay=single(lr * check_scalar("weight_decay", weight_decay, device)),
        strength=single(check_scalar("strength", strength, device)),
        ema_rate=single(rates["ema_decay"]),
        ema_threshold=single(check_scalar("ema_threshold", 0.0 if ema_threshold is None else ema_threshold, device)),
        ema_rate_above=single(rates["ema_decay_above"]),
        beta1=beta1,
        beta2=beta2,
        eps=float(check_scalar("eps", eps, device)),
    )


def _check_betas(betas: tuple[float, float], device: torch.device) -> tuple[float, float]:
    try:
        beta1, beta2 = betas
    except (TypeError, ValueError):
        raise ValueError(f"betas must be a pair of numbers, not {betas!r}") from None
    checked = [
        float(check_scalar(f"betas[{i}]", b, device, high=1.0, open_high=True)) for i, b in enumerate((beta1, beta2))
    ]
    return checked[0], checked[1]
