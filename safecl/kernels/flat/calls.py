"""The flat family: EMA, Fisher accumulation, Fisher penalty and AdamW, each in one pass over a contiguous shard.

    EMA        ema <- ema + (1 - decay) (p - ema)         Polyak & Juditsky 1992
    Fisher     F   <- F + weight g^2                      Kirkpatrick et al. 2017 (EWC), eq. 3
    penalty    g   <- g + strength F (p - a),             the same; F = 1 is L2-SP (Li et al. 2018)
               loss = 1/2 strength sum F (p - a)^2
    AdamW      m, v, p with decoupled decay               Loshchilov & Hutter 2019, algorithm 2

`adamw_step_` does all of it while each element is in a register: grad x clip_coef / grad_scale -> penalty gradient at
the old p -> moments -> decoupled decay and update -> (proximal step) -> EMA of the new p -> low-precision copy. It
moves 40 bytes per parameter with a bf16 gradient, anchor, Fisher and copy; separate tools move 52 to 120.

A shard may have any numel (also 0 and above 2^31), alignment and shape. CPU tensors go to the C++ library, CUDA tensors
to Triton, all others to the torch twin in `torch_twin.py`, which is also the readable definition. All arithmetic is
fp32. Sums are formed in a fixed order, so results repeat bitwise. Scalars (lr, step, decay, strength, clip_coef,
grad_scale, found_inf) may be numbers or one-element tensors; the host never reads a scalar on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safecl.kernels.flat.arguments import (
    FLOAT32,
    FLOAT32_OR_BF16,
    AdamWArguments,
    Scalar,
    Segments,
    SegmentTable,
    adamw_coefficients,
    check_counter,
    check_found_inf,
    check_grad_scale,
    check_overlap,
    check_scalar,
    check_segments,
    check_tensor,
    single,
)
from safecl.kernels.flat.backend import flat_backend

__all__ = ["Segments", "adamw_step_", "ema_update_", "fisher_accumulate_", "fisher_penalty_", "penalized_grad_norm"]

BF16 = (torch.bfloat16,)


@torch.no_grad()
def ema_update_(ema: Tensor, param: Tensor, decay: Scalar, *, generator: torch.Generator | None = None) -> Tensor:
    """Set ema to decay * ema + (1 - decay) * param in place, and return `ema`.

    ema: fp32, or bf16 with a `generator`. A bf16 ema is rounded stochastically (unbiased), because rounding to nearest
        would lose every step smaller than 1/256 of the weight.
    param: fp32 or bf16, same numel and device. decay: number in [0, 1] or one-element tensor.
    generator: seeds the rounding, with one draw per call; ignored for an fp32 ema.

    Raises ValueError naming the argument on a wrong dtype, device, length, layout or overlap, before anything is
    written. Moves 10 bytes per parameter for bf16 into fp32, 12 for fp32, 6 for bf16 into bf16.
    """
    check_tensor("param", param, param, FLOAT32_OR_BF16, "param")
    check_tensor("ema", ema, param, FLOAT32_OR_BF16, "param")
    check_overlap({"ema": ema}, {"param": param})
    rate = single(1.0 - check_scalar("decay", decay, ema.device, high=1.0))
    seed = _rounding_seed(ema, generator)
    flat_backend("ema_update_", ema).ema_update(ema.detach(), param.detach(), rate, seed)
    return _written(ema)


@torch.no_grad()
def fisher_accumulate_(fisher: Tensor, grad: Tensor, weight: Scalar = 1.0) -> Tensor:
    """Add weight * grad^2 to fisher in place, and return `fisher`.

    fisher: fp32 (bf16 would lose small addends; round once, at the end). grad: fp32 or bf16, same numel and device.
    weight: number >= 0 or one-element tensor, for example the number of rows when `grad` is a random-sign sum. Raises
    ValueError like `ema_update_`. Moves 12 bytes per parameter, 10 for a bf16 gradient.
    """
    check_tensor("grad", grad, grad, FLOAT32_OR_BF16, "grad")
    check_tensor("fisher", fisher, grad, FLOAT32, "grad")
    check_overlap({"fisher": fisher}, {"grad": grad})
    weight = single(check_scalar("weight", weight, fisher.device))
    flat_backend("fisher_accumulate_", fisher).fisher_accumulate(fisher.detach(), grad.detach(), weight)
    return _written(fisher)


@torch.no_grad()
def fisher_penalty_(grad: Tensor, param: Tensor, anchor: Tensor, fisher: Tensor | None, strength: Scalar) -> Tensor:
    """Add strength * fisher * (param - anchor) to grad in place, and return the penalty loss.

    The loss is 1/2 strength sum fisher (param - anchor)^2, 0-dim fp32, summed in a fixed order: it repeats bitwise.
    grad, param, anchor, fisher: fp32 or bf16 each (the difference is formed in fp32), same numel and device; fisher
    None means 1 (L2-SP). strength: number >= 0 or one-element tensor. Raises ValueError like `ema_update_`. Moves 10
    bytes per parameter if all are bf16, 20 if all are fp32.
    """
    _check_penalty(grad, param, anchor, fisher)
    check_overlap({"grad": grad}, _given(param=param, anchor=anchor, fisher=fisher))
    strength = single(check_scalar("strength", strength, grad.device))
    kernels = flat_backend("fisher_penalty_", grad)
    loss = kernels.fisher_penalty(grad.detach(), param.detach(), anchor, fisher, strength)
    _written(grad)
    return loss


@torch.no_grad()
def penalized_grad_norm(
    grad: Tensor,
    param: Tensor | None = None,
    anchor: Tensor | None = None,
    fisher: Tensor | None = None,
    strength: Scalar = 0.0,
    *,
    grad_scale: Scalar | None = None,
    segments: SegmentTable | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (sum h^2, penalty loss) for h = grad / grad_scale + strength F (param - anchor), both 0-dim fp64.

    `clip_scope: total` needs them before its step: clipping h by c equals `adamw_step_(clip_coef=c, strength=c *
    strength)`, whose loss is then c times the one returned here. Without an anchor the results are the squared norm of
    the gradient and a loss of 0. Sum the first result over ranks. dtypes and errors: as in `fisher_penalty_`; segments:
    as in `adamw_step_`. Writes nothing, and reads 8 bytes per parameter in bf16.
    """
    if anchor is None:
        check_tensor("grad", grad, grad, FLOAT32_OR_BF16, "grad")
        param = fisher = segments = None
    else:
        _check_penalty(grad, param, anchor, fisher)
    scale = check_grad_scale(grad_scale, grad.device)
    strength = single(check_scalar("strength", strength, grad.device))
    table = check_segments(segments, grad.numel(), grad.device)
    kernels = flat_backend("penalized_grad_norm", grad)
    return kernels.penalized_grad_norm(grad.detach(), param, anchor, fisher, strength, single(1.0 / scale), table)


@torch.no_grad()
def adamw_step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: Scalar,
    lr: Scalar,
    betas: tuple[float, float],
    eps: float,
    weight_decay: Scalar,
    anchor: Tensor | None = None,
    fisher: Tensor | None = None,
    strength: Scalar = 0.0,
    proximal: bool = False,
    ema: Tensor | None = None,
    ema_decay: Scalar | None = None,
    ema_threshold: Scalar | None = None,
    ema_decay_above: Scalar | None = None,
    param_out: Tensor | None = None,
    clip_coef: Scalar | None = None,
    grad_scale: Scalar | None = None,
    found_inf: Scalar | None = None,
    segments: SegmentTable | None = None,
    nonfinite: Tensor | None = None,
) -> Tensor | None:
    """Do one AdamW step with penalty, EMA and bf16 copy in a single pass, and return the penalty loss.

    With t = step (1-based, counting this one), d = p - anchor at the old p, and F = fisher (1 where fisher is None):

        g   = grad * clip_coef / grad_scale  [+ strength F d   unless proximal]
        m   = beta1 m + (1 - beta1) g;    v = beta2 v + (1 - beta2) g^2
        p   = p - (lr weight_decay p + lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps))
        p   = p - w (p - anchor),  w = lr strength F / (1 + lr strength F)      if proximal: stable for any strength, lr
        ema = ema + (1 - eta) (p - ema),  eta = ema_decay_above where F > ema_threshold, else ema_decay
        param_out = bf16(p)

    param, exp_avg, exp_avg_sq, ema: fp32. grad, anchor, fisher: fp32 or bf16; `grad` is not modified. param_out: bf16,
        rounded to nearest. All have one numel and device.
    step, lr, weight_decay, strength, ema_decay, ema_threshold, ema_decay_above, clip_coef, grad_scale, found_inf:
        numbers or one-element tensors. If found_inf is not 0, every buffer stays bitwise as it was and the loss is
        still returned: do not advance `step` then.
    ema_threshold, ema_decay_above: both or neither. They make a Fisher-masked average, for example with a quantile of
        `fisher` as the threshold, and need `ema` and `fisher`; `fisher` then needs no anchor. A NaN in `fisher` counts
        as below the threshold.
    segments: (offsets, strength, weight_decay), see `Segments`; an entry replaces the scalar of the same name.
    nonfinite: int64, one element, on the device of `param`. The number of elements whose new param, exp_avg_sq or ema
        is NaN or infinite is added to it, at no extra pass. That covers exp_avg: where it is not finite, one of the
        others is not either.

    Returns 1/2 sum strength F d^2 at the old p, 0-dim fp32 (summed in a fixed order: it repeats bitwise), or None
    without an anchor. Raises ValueError naming the argument on a wrong dtype, device, length, layout, overlap or value,
    before anything is written.
    """
    states = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, **_given(ema=ema)}
    _check_step_tensors(param, grad, states, anchor, fisher, param_out)
    if fisher is not None and anchor is None and ema_threshold is None:
        raise ValueError("fisher needs an anchor: the penalty is strength * fisher * (param - anchor)")
    _check_average(ema, ema_decay, ema_threshold, ema_decay_above, fisher)
    device = param.device
    coef = adamw_coefficients(
        device,
        step=step,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        strength=strength,
        ema_decay=ema_decay,
        ema_threshold=ema_threshold,
        ema_decay_above=ema_decay_above,
        clip_coef=clip_coef,
        grad_scale=grad_scale,
    )
    table = check_segments(segments, param.numel(), device)
    skip = check_found_inf(found_inf, device)
    arguments = AdamWArguments(
        param=param.detach(),
        grad=grad.detach(),
        exp_avg=exp_avg.detach(),
        exp_avg_sq=exp_avg_sq.detach(),
        coef=coef,
        anchor=anchor,
        fisher=fisher,
        proximal=bool(proximal),
        ema=ema,
        ema_by_fisher=ema_threshold is not None,
        param_out=param_out,
        found_inf=skip if isinstance(skip, Tensor) else None,
        frozen=skip is True,
        segments=table,
        nonfinite=check_counter(nonfinite, device),
    )
    loss = flat_backend("adamw_step_", param).adamw_step(arguments)
    _written(param, *states.values(), *_given(param_out=param_out).values())
    return loss


def _check_step_tensors(
    param: Tensor,
    grad: Tensor,
    states: dict[str, Tensor],
    anchor: Tensor | None,
    fisher: Tensor | None,
    param_out: Tensor | None,
) -> None:
    check_tensor("param", param, param, FLOAT32, "param")
    check_tensor("grad", grad, param, FLOAT32_OR_BF16, "param")
    for name, state in states.items():
        check_tensor(name, state, param, FLOAT32, "param")
    read = _given(anchor=anchor, fisher=fisher)
    for name, tensor in read.items():
        check_tensor(name, tensor, param, FLOAT32_OR_BF16, "param")
    copies = _given(param_out=param_out)
    for name, tensor in copies.items():
        check_tensor(name, tensor, param, BF16, "param")
    check_overlap({"param": param, **states, **copies}, {"grad": grad, **read})


def _check_average(ema: object, decay: object, threshold: object, decay_above: object, fisher: object) -> None:
    if (ema is None) != (decay is None):
        raise ValueError("ema and ema_decay belong together: pass both or neither")
    if (threshold is None) != (decay_above is None):
        raise ValueError("ema_threshold and ema_decay_above belong together: pass both or neither")
    if threshold is not None and (ema is None or fisher is None):
        missing = "an ema" if ema is None else "a fisher"
        raise ValueError(f"ema_threshold needs {missing}: the decay of each element follows its Fisher")


def _check_penalty(grad: Tensor, param: Tensor | None, anchor: Tensor, fisher: Tensor | None) -> None:
    check_tensor("grad", grad, grad, FLOAT32_OR_BF16, "grad")
    for name, tensor in {"param": param, "anchor": anchor, **_given(fisher=fisher)}.items():
        check_tensor(name, tensor, grad, FLOAT32_OR_BF16, "grad")


def _given(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if t is not None}


def _rounding_seed(ema: Tensor, generator: torch.Generator | None) -> Tensor | None:
    """Return two random 31-bit words on ema's device for stochastic rounding, or None for fp32."""
    if ema.dtype == torch.float32:
        return None
    if generator is None:
        raise ValueError(
            "ema is bfloat16 and needs a generator: rounded to nearest it would not move; "
            "pass generator= or an fp32 ema"
        )
    words = torch.randint(2**31, (2,), generator=generator, device=generator.device, dtype=torch.int64)
    return words.to(ema.device, non_blocking=True)


def _written(first: Tensor, *others: Tensor) -> Tensor:
    """Tell autograd that the kernels wrote these tensors, and return the first.

    The kernels write through raw pointers. A graph that saved one of the tensors then raises an error instead of using
    the new values.
    """
    for tensor in (first, *others):
        torch.autograd.graph.increment_version(tensor)
    return first
