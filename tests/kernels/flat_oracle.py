"""The flat family in fp64 from independent code: torch.optim.AdamW and autograd; nothing is shared with safecl."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


def relative_error(got: Tensor, want: Tensor, start: Tensor | None = None) -> float:
    """Return ||got - want|| / ||want - start||; a kernel that does nothing has an error of 1. NaN stays NaN."""
    got, want = got.double().cpu(), want.double().cpu()
    moved = want if start is None else want - start.double().cpu()
    scale = moved.norm()
    return float((got - want).norm() / scale) if scale > 0 else float((got - want).norm())


@dataclass(frozen=True)
class Case:
    """One combination of the options of `adamw_step_`; dtypes are None where the option is off."""

    grad: torch.dtype = torch.float32
    anchor: torch.dtype | None = None
    fisher: torch.dtype | None = None
    strength: float = 0.7
    proximal: bool = False
    ema_decay: float | None = None
    ema_threshold: float | None = None
    ema_decay_above: float | None = None
    out: bool = False
    clip: float | None = None
    scale: float | None = None
    segmented: bool = False
    weight_decay: float = 0.1
    lr: float = 2e-2
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    first_step: int = 1


@dataclass
class Inputs:
    """Start values of one case; `grads` has one entry per step."""

    param: Tensor
    grads: list[Tensor]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    anchor: Tensor | None
    fisher: Tensor | None
    ema: Tensor | None
    out: Tensor | None
    segments: tuple[list[int], list[float], list[float]] | None


def make_inputs(case: Case, numel: int, steps: int = 3, seed: int = 0) -> Inputs:
    g = torch.Generator().manual_seed(seed + numel)
    param = torch.randn(numel, generator=g)
    warm = case.first_step > 1
    moment = torch.randn(numel, generator=g) * 0.1 if warm else torch.zeros(numel)
    second = torch.rand(numel, generator=g) * 0.1 + 0.01 if warm else torch.zeros(numel)
    grads = [(torch.randn(numel, generator=g) * (case.scale or 1.0)).to(case.grad) for _ in range(steps)]
    anchor = None if case.anchor is None else (param + 0.3 * torch.randn(numel, generator=g)).to(case.anchor)
    fisher = None if case.fisher is None else (10.0 ** (2 * torch.rand(numel, generator=g) - 2)).to(case.fisher)
    ema = None if case.ema_decay is None else param + 0.5 * torch.randn(numel, generator=g)
    out = torch.full((numel,), float("nan"), dtype=torch.bfloat16) if case.out else None
    return Inputs(param, grads, moment, second, anchor, fisher, ema, out, _segments(numel) if case.segmented else None)


def _segments(numel: int) -> tuple[list[int], list[float], list[float]]:
    """Uneven stretches, one of them empty, none on a round number."""
    cuts = sorted({0, numel // 7, numel // 3, (2 * numel) // 3 + 1, numel})
    offsets = [c for c in cuts if c <= numel]
    offsets = [offsets[0], offsets[0], *offsets[1:]] if len(offsets) > 1 else [0, numel]
    count = len(offsets) - 1
    return offsets, [0.3 * (s % 4) for s in range(count)], [0.2 * ((s + 1) % 3) for s in range(count)]


def oracle_steps(case: Case, inputs: Inputs) -> tuple[dict[str, Tensor], list[float]]:
    """Final fp64 state and the penalty loss of each step: torch.optim.AdamW on one fp64 parameter per segment, autograd
    for the penalty."""
    offsets, strengths, decays = inputs.segments or ([0, inputs.param.numel()], [case.strength], [case.weight_decay])
    bounds = list(itertools.pairwise(offsets))
    params = [inputs.param[a:b].double().clone().requires_grad_() for a, b in bounds]
    groups = [{"params": [p], "weight_decay": wd} for p, wd in zip(params, decays, strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=case.lr, betas=case.betas, eps=case.eps, foreach=False)
    for p, (a, b) in zip(params, bounds, strict=True):
        state = {"exp_avg": inputs.exp_avg[a:b].double().clone(), "exp_avg_sq": inputs.exp_avg_sq[a:b].double().clone()}
        optimizer.state[p] = {"step": torch.tensor(case.first_step - 1.0), **state}
    ema, losses = None if inputs.ema is None else inputs.ema.double(), []
    for grad in inputs.grads:
        task = (
            grad.double()
            * (case.clip if case.clip is not None else 1.0)
            / (case.scale if case.scale is not None else 1.0)
        )
        losses.append(_oracle_gradients(case, inputs, params, bounds, strengths, task))
        optimizer.step()
        if case.proximal:
            _oracle_proximal(case, inputs, params, bounds, strengths)
        if ema is not None:
            now = torch.cat([p.detach() for p in params])
            decay = _oracle_decay(case, inputs)
            ema = decay * ema + (1 - decay) * now
    joined = {"param": torch.cat([p.detach() for p in params])}
    joined |= {kind: torch.cat([optimizer.state[p][kind] for p in params]) for kind in ("exp_avg", "exp_avg_sq")}
    return joined | ({} if ema is None else {"ema": ema}), losses


def _oracle_gradients(case: Case, inputs: Inputs, params: list, bounds: list, strengths: list, task: Tensor) -> float:
    penalty = torch.zeros((), dtype=torch.float64)
    for p, (a, b), strength in zip(params, bounds, strengths, strict=True):
        p.grad = None
        if inputs.anchor is not None:
            fisher = 1.0 if inputs.fisher is None else inputs.fisher[a:b].double()
            penalty = penalty + (strength / 2) * (fisher * (p - inputs.anchor[a:b].double()).pow(2)).sum()
    if inputs.anchor is not None and not case.proximal:
        penalty.backward()
    for p, (a, b) in zip(params, bounds, strict=True):
        p.grad = task[a:b].clone() if p.grad is None else p.grad + task[a:b]
    return float(penalty.detach())


def _oracle_decay(case: Case, inputs: Inputs) -> Tensor:
    """The decay of each element: another one where its Fisher is above the threshold."""
    decay = torch.full((inputs.param.numel(),), case.ema_decay, dtype=torch.float64)
    if case.ema_threshold is not None:
        decay[inputs.fisher.double() > case.ema_threshold] = case.ema_decay_above
    return decay


def _oracle_proximal(case: Case, inputs: Inputs, params: list, bounds: list, strengths: list) -> None:
    """The minimiser of |q - p|^2 / (2 lr) + strength/2 F (q - a)^2, from its normal equation."""
    for p, (a, b), strength in zip(params, bounds, strengths, strict=True):
        weight = case.lr * strength * (1.0 if inputs.fisher is None else inputs.fisher[a:b].double())
        p.data = (p.data + weight * inputs.anchor[a:b].double()) / (1 + weight)
