"""The flat family in Triton, for CUDA tensors (or CPU tensors under TRITON_INTERPRET=1).

Each program processes BLOCK consecutive elements. Whole blocks are loaded without a mask, so that the compiler uses
16-byte accesses; the rest of the buffer is a second launch of one program. For a sum each program stores one fp32
partial, and a single program adds them in fp64 in a fixed order, without atomics. There is no autotuning, because it
would run an in-place kernel several times. No value is a constexpr: a new lr, step or strength never recompiles.
Products and sums are not contracted to fused multiply-adds, and roots and quotients are correctly rounded: elements
agree bitwise with the C++ kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from safecl.kernels.flat.arguments import AdamWArguments, Coefficients, Scalar, Segments

BLOCK = 2048  # elements per program: each thread has 8 of every stream, one 16-byte access in bf16, two in fp32
NUM_WARPS = 8
MAX_REGISTERS = {False: 80, True: 128}  # per thread, by `wide`: three programs fit a multiprocessor, or two
LANES = 4096  # partial sums added per round by the final program
# The coefficients that may be on the device, in the order in which adamw_kernel reads them.
SCALARS = ("grad", "lr", "step_size", "inv_sqrt_correction2", "weight_decay", "strength")
SCALARS += ("ema_rate", "ema_threshold", "ema_rate_above")


@triton.jit
def _load(pointer, offsets, mask, MASKED: tl.constexpr):
    if MASKED:
        values = tl.load(pointer + offsets, mask=mask, other=0.0)
    else:
        values = tl.load(pointer + offsets)
    return values.to(tl.float32)


@triton.jit
def _store(pointer, offsets, values, mask, MASKED: tl.constexpr):
    if pointer.dtype.element_ty == tl.bfloat16:
        values = _round_to_bf16(values)
    if MASKED:
        tl.store(pointer + offsets, values.to(pointer.dtype.element_ty), mask=mask)
    else:
        tl.store(pointer + offsets, values.to(pointer.dtype.element_ty))


@triton.jit
def _round_to_bf16(values):
    """Round fp32 values to the nearest that bf16 holds exactly, ties to even; the interpreter's own cast truncates."""
    bits = values.to(tl.uint32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
    return tl.where(values == values, rounded.to(tl.float32, bitcast=True), values)


@triton.jit
def _is_finite(values):
    return (values.to(tl.uint32, bitcast=True) & 0x7F800000) != 0x7F800000


@triton.jit
def _sum_of_block(values, mask, MASKED: tl.constexpr):
    if MASKED:
        values = tl.where(mask, values, 0.0)
    return tl.sum(values, 0)


@triton.jit
def _count_nonfinite(nonfinite, param, exp_avg_sq, ema, offsets, mask, MASKED: tl.constexpr):
    """Add the number of elements of this block whose new state is not finite. Reading it once more, where it happens,
    keeps registers free everywhere else."""
    tl.debug_barrier()
    finite = _is_finite(_load(param, offsets, mask, MASKED)) & _is_finite(_load(exp_avg_sq, offsets, mask, MASKED))
    if ema is not None:
        finite = finite & _is_finite(_load(ema, offsets, mask, MASKED))
    count = tl.sum((finite == 0).to(tl.int64), 0)
    tl.atomic_add(nonfinite, count, sem="relaxed")  # integer sums do not depend on the order


@triton.jit
def _mix(x):
    """Mix the bits of 32-bit words: "lowbias32" (C. Wellons), as in ``torch_twin.py``."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _round_stochastically(values, offsets, seed):
    """Round fp32 values to ones that bf16 holds exactly.

    16 random bits, a hash of seed and element index, are added below the mantissa of bf16, then these bits are cut off.
    """
    low, high = (offsets & 0xFFFFFFFF).to(tl.uint32), (offsets >> 32).to(tl.uint32)
    first, second = tl.load(seed).to(tl.uint32), tl.load(seed + 1).to(tl.uint32)
    word = _mix(_mix(low ^ first) + second + high * 0x9E3779B9)
    bits = values.to(tl.uint32, bitcast=True)
    rounded = ((bits + (word >> 16)) >> 16) << 16
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded.to(tl.float32, bitcast=True), values)


@triton.jit
def _block(first_block, BLOCK: tl.constexpr):
    """Return (index of this program's block, its element offsets in int64, since shards exceed 2^31)."""
    block = tl.program_id(0) + first_block
    return block, block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _spread(column, default, starts, first_segment, block, offsets, BLOCK: tl.constexpr):
    """Return the segments' column for each element of a block, or the default without a column.

    Most blocks are in one segment; the loop is then empty.
    """
    if column is None:
        values = tl.zeros([BLOCK], tl.float32) + default
    else:
        first, last = tl.load(first_segment + block), tl.load(first_segment + block + 1)
        values = tl.zeros([BLOCK], tl.float32) + tl.load(column + first)
        for s in range(first + 1, last + 1):
            values = tl.where(offsets >= tl.load(starts + s), tl.load(column + s), values)
    return values


@triton.jit
def _stiffness(fisher, strength, offsets, mask, MASKED: tl.constexpr):
    """Return strength F, the spring constant of the penalty per element."""
    if fisher is None:
        return strength
    else:
        return strength * _load(fisher, offsets, mask, MASKED)


@triton.jit(do_not_specialize=["n", "first_block", "rate"])
def ema_kernel(ema, param, seed, rate_on_device, n, first_block, rate, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    _, offsets = _block(first_block, BLOCK)
    mask = offsets < n
    if rate_on_device is not None:
        rate = tl.load(rate_on_device)
    e = _load(ema, offsets, mask, MASKED)
    new = e + rate * (_load(param, offsets, mask, MASKED) - e)
    if seed is not None:
        new = _round_stochastically(new, offsets, seed)
    _store(ema, offsets, new, mask, MASKED)


@triton.jit(do_not_specialize=["n", "first_block", "weight"])
def fisher_kernel(fisher, grad, weight_on_device, n, first_block, weight, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    _, offsets = _block(first_block, BLOCK)
    mask = offsets < n
    if weight_on_device is not None:
        weight = tl.load(weight_on_device)
    g = _load(grad, offsets, mask, MASKED)
    _store(fisher, offsets, _load(fisher, offsets, mask, MASKED) + weight * g * g, mask, MASKED)


@triton.jit(do_not_specialize=["n", "first_block", "strength"])
def penalty_kernel(
    grad,
    param,
    anchor,
    fisher,
    partial,
    strength_on_device,
    n,
    first_block,
    strength,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, offsets = _block(first_block, BLOCK)
    mask = offsets < n
    if strength_on_device is not None:
        strength = tl.load(strength_on_device)
    distance = _load(param, offsets, mask, MASKED) - _load(anchor, offsets, mask, MASKED)
    pull = _stiffness(fisher, strength, offsets, mask, MASKED) * distance
    tl.store(partial + block, tl.sum(pull * distance, 0))
    _store(grad, offsets, _load(grad, offsets, mask, MASKED) + pull, mask, MASKED)


@triton.jit(do_not_specialize=["n", "first_block", "strength", "grad_mult"])
def norm_kernel(
    grad,
    param,
    anchor,
    fisher,
    partial,
    squares,
    strength_on_device,
    mult_on_device,
    starts,
    first_segment,
    segment_strength,
    n,
    first_block,
    strength,
    grad_mult,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, offsets = _block(first_block, BLOCK)
    mask = offsets < n
    if mult_on_device is not None:
        grad_mult = tl.load(mult_on_device)
    h = grad_mult * _load(grad, offsets, mask, MASKED)
    if anchor is not None:
        if strength_on_device is not None:
            strength = tl.load(strength_on_device)
        strengths = _spread(segment_strength, strength, starts, first_segment, block, offsets, BLOCK)
        distance = _load(param, offsets, mask, MASKED) - _load(anchor, offsets, mask, MASKED)
        pull = _stiffness(fisher, strengths, offsets, mask, MASKED) * distance
        tl.store(partial + block, tl.sum(pull * distance, 0))
        h = h + pull
    tl.store(squares + block, tl.sum(h * h, 0))


@triton.jit(
    do_not_specialize=[
        "n", "first_block", "grad_mult", "lr", "step_size", "inv_sqrt_correction2", "decay", "strength", "ema_rate",
        "ema_threshold", "ema_rate_above", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps",
    ]
)  # fmt: skip
def adamw_kernel(
    param, grad, exp_avg, exp_avg_sq, anchor, fisher, ema, param_out, partial, nonfinite, found_inf, scalars,
    starts, first_segment, segment_strength, segment_decay,
    n, first_block, grad_mult, lr, step_size, inv_sqrt_correction2, decay, strength, ema_rate,
    ema_threshold, ema_rate_above, beta1, one_minus_beta1, beta2, one_minus_beta2, eps,
    PROXIMAL: tl.constexpr, EMA_BY_FISHER: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, offsets = _block(first_block, BLOCK)
    mask = offsets < n
    if scalars is not None:
        grad_mult, lr, step_size = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
        inv_sqrt_correction2, decay = tl.load(scalars + 3), tl.load(scalars + 4)
        strength, ema_rate = tl.load(scalars + 5), tl.load(scalars + 6)
        ema_threshold, ema_rate_above = tl.load(scalars + 7), tl.load(scalars + 8)
    # All loads come before the first sum: a sum has a barrier, behind which the memory would stand still.
    p = _load(param, offsets, mask, MASKED)
    g = grad_mult * _load(grad, offsets, mask, MASKED)
    m = beta1 * _load(exp_avg, offsets, mask, MASKED)
    v = beta2 * _load(exp_avg_sq, offsets, mask, MASKED)
    f = 1.0
    if fisher is not None:
        f = _load(fisher, offsets, mask, MASKED)
    if anchor is not None:
        a = _load(anchor, offsets, mask, MASKED)
    if ema is not None:
        e = _load(ema, offsets, mask, MASKED)
    if segment_decay is not None:
        decays = lr * _spread(segment_decay, 0.0, starts, first_segment, block, offsets, BLOCK)
    else:
        decays = decay
    if anchor is not None:
        strengths = _spread(segment_strength, strength, starts, first_segment, block, offsets, BLOCK)
        stiffness = strengths * f
        pull = stiffness * (p - a)
        tl.store(partial + block, tl.sum(pull * (p - a), 0))
        if not PROXIMAL:
            g = g + pull
    m = m + one_minus_beta1 * g
    v = v + one_minus_beta2 * g * g
    update = tl.div_rn(step_size * m, tl.sqrt_rn(v) * inv_sqrt_correction2 + eps)
    new_p = p - (decays * p + update)
    if anchor is not None:
        if PROXIMAL:
            weight = lr * stiffness
            weight = tl.where(weight > 1e37, 1e37, weight)  # avoids inf / inf and keeps NaN
            new_p = new_p - tl.div_rn(weight, 1.0 + weight) * (new_p - a)
    live = True
    if found_inf is not None:
        live = tl.load(found_inf) == 0
    if live:
        _store(exp_avg, offsets, m, mask, MASKED)
        _store(exp_avg_sq, offsets, v, mask, MASKED)
        _store(param, offsets, new_p, mask, MASKED)
        probe = new_p + v
        if ema is not None:
            if EMA_BY_FISHER:
                rate = tl.where(f > ema_threshold, ema_rate_above, ema_rate)
            else:
                rate = ema_rate
            new_e = e + rate * (new_p - e)
            _store(ema, offsets, new_e, mask, MASKED)
            probe += new_e
        if param_out is not None:
            _store(param_out, offsets, new_p, mask, MASKED)
        if nonfinite is not None:
            if not _is_finite(_sum_of_block(probe, mask, MASKED)):
                _count_nonfinite(nonfinite, param, exp_avg_sq, ema, offsets, mask, MASKED)


@triton.jit(do_not_specialize=["count"])
def sum_kernel(partial, result, count, scale: tl.constexpr, LANES: tl.constexpr):
    """Store scale * sum of partial[:count]; runs as one program.

    Every lane adds its values in order, then the lanes are added as a tree.
    """
    lanes = tl.arange(0, LANES)
    sums = tl.zeros([LANES], tl.float64)
    for start in range(0, count, LANES):
        sums += tl.load(partial + start + lanes, mask=start + lanes < count, other=0.0).to(tl.float64)
    tl.store(result, (scale * tl.sum(sums, 0)).to(result.dtype.element_ty))


def ema_update(ema: Tensor, param: Tensor, rate: Scalar, seed: Tensor | None) -> None:
    value, on_device = _split(rate)
    _launch(ema_kernel, ema.numel(), ema, param, seed, on_device, rate=value)


def fisher_accumulate(fisher: Tensor, grad: Tensor, weight: Scalar) -> None:
    value, on_device = _split(weight)
    _launch(fisher_kernel, fisher.numel(), fisher, grad, on_device, weight=value)


def fisher_penalty(grad: Tensor, param: Tensor, anchor: Tensor, fisher: Tensor | None, strength: Scalar) -> Tensor:
    value, on_device = _split(strength)
    partial = _partials(grad)
    _launch(penalty_kernel, grad.numel(), grad, param, anchor, fisher, partial, on_device, strength=value)
    return _sum(partial, 0.5, torch.float32)


def penalized_grad_norm(
    grad: Tensor,
    param: Tensor | None,
    anchor: Tensor | None,
    fisher: Tensor | None,
    strength: Scalar,
    grad_mult: Scalar,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    (strength, strength_on_device), (mult, mult_on_device) = _split(strength), _split(grad_mult)
    partial, squares = (None if anchor is None else _partials(grad)), _partials(grad)
    starts, first, column, _ = _segment_table(segments, grad)
    tensors = (grad, param, anchor, fisher, partial, squares, strength_on_device, mult_on_device, starts, first, column)
    _launch(norm_kernel, grad.numel(), *tensors, strength=strength, grad_mult=mult)
    if partial is None:
        loss = torch.zeros((), dtype=torch.float64, device=grad.device)
    else:
        loss = _sum(partial, 0.5, torch.float64)
    return _sum(squares, 1.0, torch.float64), loss


def adamw_step(call: AdamWArguments) -> Tensor | None:
    if call.frozen:  # the host knows that only the loss is needed
        if call.anchor is None:
            return None
        penalty = call.grad, call.param, call.anchor, call.fisher, call.coef.strength
        return penalized_grad_norm(*penalty, 0.0, call.segments)[1].float()
    values, on_device = _coefficients(call.coef)
    partial = None if call.anchor is None else _partials(call.param)
    starts, first, segment_strength, segment_decay = _segment_table(call.segments, call.param)
    states = (call.param, call.grad, call.exp_avg, call.exp_avg_sq, call.anchor, call.fisher, call.ema, call.param_out)
    counts = partial, call.nonfinite, call.found_inf
    tensors = (*states, *counts, on_device, starts, first, segment_strength, segment_decay)
    forms = {"PROXIMAL": call.proximal, "EMA_BY_FISHER": call.ema_by_fisher}
    wide = call.segments is not None or any(forms.values())
    _launch(adamw_kernel, call.param.numel(), *tensors, **values, **forms, wide=wide)
    return None if partial is None else _sum(partial, 0.5, torch.float32)


def _coefficients(c: Coefficients) -> tuple[dict[str, float], Tensor | None]:
    """Return (floats for the kernel's arguments, all nine scalars in one device vector if any is on the device)."""
    values = {
        "beta1": c.beta1,
        "one_minus_beta1": 1.0 - c.beta1,
        "beta2": c.beta2,
        "one_minus_beta2": 1.0 - c.beta2,
        "eps": c.eps,
    }
    scalars = [getattr(c, name) for name in SCALARS]
    device = next((s.device for s in scalars if isinstance(s, Tensor)), None)
    names = (
        "grad_mult",
        "lr",
        "step_size",
        "inv_sqrt_correction2",
        "decay",
        "strength",
        "ema_rate",
        "ema_threshold",
        "ema_rate_above",
    )
    if device is None:
        return values | dict(zip(names, scalars, strict=True)), None
    vector = torch.stack(
        [s if isinstance(s, Tensor) else torch.full((), s, dtype=torch.float32, device=device) for s in scalars]
    )
    return values | dict.fromkeys(names, 0.0), vector


def _split(value: Scalar) -> tuple[float, Tensor | None]:
    """Return (number, None) or (unused, device scalar)."""
    return (0.0, value) if isinstance(value, Tensor) else (value, None)


def _segment_table(segments: Segments | None, like: Tensor) -> tuple[Tensor | None, ...]:
    """Return (starts, first segment of each block and of the end, strength, weight_decay), without a host read."""
    if segments is None:
        return None, None, None, None
    blocks = torch.arange(_num_blocks(like.numel()) + 1, device=like.device, dtype=torch.int64) * BLOCK
    count = segments.offsets.numel() - 1
    first = (torch.searchsorted(segments.offsets, blocks, right=True) - 1).clamp_(0, count - 1)
    return segments.offsets, first, segments.strength, segments.weight_decay


def _num_blocks(numel: int) -> int:
    return triton.cdiv(numel, BLOCK)


def _partials(like: Tensor) -> Tensor:
    return torch.empty(_num_blocks(like.numel()), dtype=torch.float32, device=like.device)


def _sum(partial: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    result = torch.empty((), dtype=dtype, device=partial.device)
    with torch.cuda.device_of(partial):
        sum_kernel[(1,)](partial, result, partial.numel(), scale, LANES=LANES, num_warps=NUM_WARPS)
    return result


def options(masked: bool, wide: bool = False) -> dict[str, int | bool]:
    """Return the compile options of the elementwise kernels.

    Without a limit the assembler spills a word rather than use more than 64 or 80 registers; with this limit it uses as
    many as it needs. wide: the step with segments, a proximal penalty, or an average by Fisher information, which needs
    more. The masked program has narrow accesses and needs most; it has no limit, because it runs alone.
    """
    limit = {} if masked else {"maxnreg": MAX_REGISTERS[wide]}
    return {"num_warps": NUM_WARPS, "enable_fp_fusion": False, **limit}


def _launch(
    kernel: triton.JITFunction,
    numel: int,
    *tensors: Tensor | None,
    wide: bool = False,
    **arguments: float | bool,
) -> None:
    """Launch whole blocks without a mask, then the rest of the buffer in one masked program."""
    whole, rest = divmod(numel, BLOCK)
    with torch.cuda.device_of(tensors[0]):
        for masked, programs, first in ((False, whole, 0), (True, min(rest, 1), whole)):
            if programs:
                compiled = {"MASKED": masked, "BLOCK": BLOCK, **options(masked, wide)}
                kernel[(programs,)](*tensors, n=numel, first_block=first, **arguments, **compiled)
