"""An independent PyTorch loop for methods: any loss, an optional change of the gradient, an optional pull, clipping,
AdamW written out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from tests.engine.passes.oracle import gradients, row_nll

SEED = 3


def train(
    model,
    losses: Sequence[Callable[[], torch.Tensor]],
    *,
    transform: Callable[[int, dict], dict] = lambda step, grads: grads,
    pull: Callable[[dict], dict] = lambda params: {},
    before: Callable[[int], None] = lambda step: None,
    after: Callable[[int, dict], None] = lambda step, old: None,
    lr: float = 1e-2,
    eps: float = 1e-4,
    clip_norm: float = 1.0,
) -> dict[str, torch.Tensor]:
    """One AdamW step per loss, in place; returns the weights by name.

    before: runs before a step's gradient. after: gets the weights from before the update, by name.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in params.items()}
    for step, loss in enumerate(losses):
        before(step)
        grads = transform(step, gradients(model, loss()))
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in grads.values()))
        clip = min(1.0, clip_norm / (norm + 1e-6))
        pulls = pull({name: p.detach() for name, p in params.items()})
        old = {name: p.detach().clone() for name, p in params.items()}
        with torch.no_grad():
            for name, p in params.items():
                g = grads[name] * clip + pulls.get(name, 0.0)
                m, v = moments[name]
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.999).addcmul_(g, g, value=0.001)
                p.sub_(lr * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + eps))
        after(step, old)
    return {name: p.detach().clone() for name, p in params.items()}


def mean_nll(model, rows) -> torch.Tensor:
    """Mean over the supervised tokens of all rows."""
    return torch.cat([row_nll(model, row) for row in rows]).mean()


def ids_of(row) -> torch.Tensor:
    return torch.from_numpy(row.input_ids.astype("int64"))[None]


def hidden_states(model, row) -> torch.Tensor:
    """Last hidden states behind the final norm, [tokens, H]."""
    return model.model(input_ids=ids_of(row), use_cache=False).last_hidden_state[0]


def log_probs(model, row, temperature: float) -> torch.Tensor:
    """fp64 log-probabilities at the positions that predict a supervised token, [targets, vocab]."""
    logits = model(input_ids=ids_of(row), use_cache=False).logits[0].double()
    return (logits[:-1][torch.from_numpy(row.loss_mask[1:].copy())] / temperature).log_softmax(-1)


def topk_kl(teacher: torch.Tensor, student: torch.Tensor, k: int) -> torch.Tensor:
    """KL over the teacher's k likeliest tokens and all others as one more event, per token."""
    indices = teacher.topk(k, dim=-1).indices
    events = [_with_rest(log_p, indices) for log_p in (teacher, student)]
    return (events[0].exp() * (events[0] - events[1])).sum(-1)


def stored_kl(teacher, student, rows, k: int) -> torch.Tensor:
    """Mean KL over the tokens of rows of a teacher's stored outputs, and the student's.

    The rounding of the stored outputs gives the direction of the first gradient, where both models are the same.
    """
    found = []
    for row in rows:
        with torch.no_grad():
            known = log_probs(teacher, row, 1.0)
            indices = known.topk(k, dim=-1).indices
            events = _with_rest(known, indices)
            said = torch.cat([events[:, :k].half().double(), events[:, k:].float().double()], -1)
        found.append((said.exp() * (said - _with_rest(log_probs(student, row, 1.0), indices))).sum(-1))
    return torch.cat(found).mean()


def _with_rest(log_p: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    rest = log_p.scatter(-1, indices, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, indices), rest], -1)
