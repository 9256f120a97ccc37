"""An independent single-process PyTorch loop: the same rows per step, each row alone, torch's own cross-entropy, AdamW
written out.

It shares with safecl only which rows a step has, and the signs of the Fisher estimate (both are functions of the seed,
proven elsewhere).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from safecl.engine.fisher.estimate import sign_batches_of


@dataclass
class Hyper:
    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-4
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.9
    strength: float = 0.0
    replay_weight: float = 0.0


def row_nll(model, row) -> torch.Tensor:
    """Negative log-likelihood of each supervised token of one row, fp32, or fp64 for a model in fp64."""
    ids = torch.from_numpy(row.input_ids.astype("int64"))[None]
    logits = model(input_ids=ids, use_cache=False).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    mask = torch.from_numpy(row.loss_mask[1:].copy())
    return F.cross_entropy(logits[:-1][mask], ids[0, 1:][mask], reduction="none")


def gradients(model, loss) -> dict[str, torch.Tensor]:
    names, params = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, params, grads, strict=True)}


def fisher(model, rows, row_ids, seed: int, sign_batches: int, rows_per_batch: int) -> dict[str, torch.Tensor]:
    """Mean over sign batches of B * (mean of signed row gradients)^2, rows in the order of the estimate."""
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    size = min(rows_per_batch, len(rows))
    for indices, signs in sign_batches_of(row_ids, seed, sign_batches, size):
        loss = sum(
            float(sign) * row_nll(model, rows[index]).mean() / size for index, sign in zip(indices, signs, strict=True)
        )
        for name, grad in gradients(model, loss).items():
            total[name] += size * grad**2 / sign_batches
    return total


def train(model, steps, hyper: Hyper, fisher_state=None) -> dict[str, dict[str, torch.Tensor]]:
    """`steps`: list of (task rows, replay rows). Returns weights, ema and anchor by parameter name, all fp32."""
    params = dict(model.named_parameters())
    anchor = {n: p.detach().clone() for n, p in params.items()}
    ema = {n: p.detach().clone() for n, p in params.items()}
    exp_avg = {n: torch.zeros_like(p) for n, p in params.items()}
    exp_avg_sq = {n: torch.zeros_like(p) for n, p in params.items()}
    mean_fisher = 1.0
    if fisher_state is not None:
        mean_fisher = sum(f.double().sum() for f in fisher_state.values()) / sum(
            f.numel() for f in fisher_state.values()
        )
    for t, (task_rows, replay_rows) in enumerate(steps, start=1):
        loss = torch.cat([row_nll(model, row) for row in task_rows]).mean()
        if replay_rows:
            loss = loss + hyper.replay_weight * torch.cat([row_nll(model, row) for row in replay_rows]).mean()
        grads = gradients(model, loss)
        norm = torch.sqrt(sum((g.double() ** 2).sum() for g in grads.values()))
        clip = min(1.0, hyper.clip_norm / (float(norm) + 1e-6)) if hyper.clip_norm else 1.0
        with torch.no_grad():
            for name, p in params.items():
                g = grads[name] * clip
                if fisher_state is not None:
                    g = g + hyper.strength / mean_fisher * fisher_state[name] * (p - anchor[name])
                exp_avg[name] = hyper.betas[0] * exp_avg[name] + (1 - hyper.betas[0]) * g
                exp_avg_sq[name] = hyper.betas[1] * exp_avg_sq[name] + (1 - hyper.betas[1]) * g * g
                decay = hyper.weight_decay if p.dim() >= 2 else 0.0
                p.mul_(1 - hyper.lr * decay)
                denominator = (exp_avg_sq[name] / (1 - hyper.betas[1] ** t)).sqrt() + hyper.eps
                p.sub_(hyper.lr * (exp_avg[name] / (1 - hyper.betas[0] ** t)) / denominator)
                ema[name] = hyper.ema_decay * ema[name] + (1 - hyper.ema_decay) * p
    return {"weights": {n: p.detach().clone() for n, p in params.items()}, "ema": ema, "anchor": anchor}


def relative_distance(
    a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], start: dict[str, torch.Tensor] | None = None
) -> float:
    """||a - b|| / ||b - start||: relative to the distance moved, so that a state that never moved fails."""
    error = sum(((a[n].double() - b[n].double()) ** 2).sum() for n in b)
    moved = sum(((b[n].double() - (start[n].double() if start is not None else 0.0)) ** 2).sum() for n in b)
    return float(error.sqrt() / moved.sqrt())
