"""Losses of the output head: from hidden states by the fused head, or from the model's own logits.

Both forms are functions of targets, weights and one distance to a teacher, and return what linear_distill_loss returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from safecl.engine.model.adapters import base_model
from safecl.engine.model.loss_inputs import Constrained, LabelInformation, OutputDistance
from safecl.kernels import DenseTeacher, LinearDistillOutput, SortedRows, TopKTeacher, linear_distill_loss
from safecl.kernels.head.logits import logits_distill_loss


@dataclass(frozen=True)
class HeadScaling:
    """The model's own treatment of lm_head's product: logits = softcap(logit_scale * product)."""

    softcap: float | None = None
    logit_scale: float | None = None

    def apply(self, logits: Tensor) -> Tensor:
        logits = logits if self.logit_scale is None else logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM


def head_scaling(model: nn.Module) -> HeadScaling:
    """Softcap and scale of the logits, by the settings that transformers' dense architectures use.

    `check_head` finds out whether a model does anything else.
    """
    settings = base_model(model).config.get_text_config()
    scale = getattr(settings, "logit_scale", None)
    if (divisor := getattr(settings, "logits_scaling", None)) is not None:
        scale = 1.0 / divisor
    softcaps = (getattr(settings, name, None) for name in _SOFTCAPS)
    return HeadScaling(next((cap for cap in softcaps if cap is not None), None), scale)


class HeadLosses(Protocol):
    """The losses of a micro-batch's n positions."""

    def __call__(
        self,
        targets: Tensor,
        ce_weights: Tensor,
        distance: OutputDistance | None,
        sorted_rows: SortedRows | None = None,
    ) -> LinearDistillOutput:
        """Cross-entropy to `targets` (int64 [n], negative for none) and one distance to a teacher. sorted_rows: what
        the host knows about them; a GPU is then not asked."""

    def log_probs_of(self, labels: Tensor, rows: Tensor) -> Tensor:
        """fp32 log-probabilities of these tokens alone, [rows, labels], at some of the positions."""

    def logits_of(self, rows: Tensor) -> Tensor:
        """fp32 logits at some of the positions, [rows, vocab]."""


@dataclass(frozen=True)
class FusedHeadLosses:
    """Losses by the fused head, which never holds all logits."""

    hidden: Tensor  # [n, H]
    head: nn.Linear
    scaling: HeadScaling
    vocab_size: int
    reference: Tensor | None  # [n, H], hidden states with the adapters off

    def __call__(
        self,
        targets: Tensor,
        ce_weights: Tensor,
        distance: OutputDistance | None,
        sorted_rows: SortedRows | None = None,
    ) -> LinearDistillOutput:
        # The weight is read here and not kept: ZeRO-3 gathers it when a module's forward reads it.
        return linear_distill_loss(
            self.hidden,
            self.head.weight,
            bias=self.head.bias,
            labels=targets,
            ce_weights=ce_weights,
            sorted_rows=sorted_rows,
            **asdict(self.scaling),
            **self._distance_arguments(distance),
        )

    def log_probs_of(self, labels: Tensor, rows: Tensor) -> Tensor:
        bias = None if self.head.bias is None else self.head.bias[labels].float()
        product = nn.functional.linear(self.hidden[rows].float(), self.head.weight[labels].float(), bias)
        return self.scaling.apply(product).log_softmax(-1)

    def logits_of(self, rows: Tensor) -> Tensor:
        weight = self.head.weight
        return self.scaling.apply(
            nn.functional.linear(self.hidden[rows].to(weight.dtype), weight, self.head.bias).float()
        )

    def _distance_arguments(self, distance: OutputDistance | None) -> dict[str, Any]:
        if distance is None:
            return {}
        teacher: TopKTeacher | DenseTeacher | None = _stored_teacher(distance, self.vocab_size)
        if teacher is None:
            assert self.reference is not None, "LossInputs.reference asks for the pass with the adapters off"
            hidden = self.reference[distance["rows"]]
            teacher = DenseTeacher(hidden, self.head.weight, self.head.bias, **asdict(self.scaling))
        return _arguments(distance, teacher)


@dataclass(frozen=True)
class LogitsLosses:
    """Losses of the model's own logits, for a head that is more than one linear map."""

    logits: Tensor  # [n, vocab]
    vocab_size: int
    reference: Tensor | None  # [n, vocab], logits with the adapters off

    def __call__(
        self,
        targets: Tensor,
        ce_weights: Tensor,
        distance: OutputDistance | None,
        sorted_rows: SortedRows | None = None,
    ) -> LinearDistillOutput:
        arguments = self._distance_arguments(distance)
        return logits_distill_loss(self.logits, labels=targets, ce_weights=ce_weights, **arguments)

    def log_probs_of(self, labels: Tensor, rows: Tensor) -> Tensor:
        return self.logits[rows][:, labels].float().log_softmax(-1)

    def logits_of(self, rows: Tensor) -> Tensor:
        return self.logits[rows].float()

    def _distance_arguments(self, distance: OutputDistance | None) -> dict[str, Any]:
        if distance is None:
            return {}
        teacher = _stored_teacher(distance, self.vocab_size)
        if teacher is None:
            assert self.reference is not None, "LossInputs.reference asks for the pass with the adapters off"
            teacher = _whole_vocabulary(self.reference[distance["rows"]], distance["temperature"])
        return _arguments(distance, teacher)


def label_information(head_losses: HeadLosses, one: LabelInformation) -> Tensor:
    """Return the information of each row, fp32 [m], see LabelInformation.

    The gradient is that of the term with its mean over the whole step: d/dp of -H(mean) is log mean + 1, and the
    probabilities of a row sum to 1.
    """
    log_p = head_losses.log_probs_of(one["labels"], one["rows"])
    p = log_p.exp()
    spread = (p * one["mean"].clamp_min(1e-30).log()).sum(-1)
    return spread - (p * log_p).sum(-1) if one["sharpen"] else spread


@torch.no_grad()
def gradient_shares(head_losses: HeadLosses, hidden: Tensor, targets: Tensor, row_of: Tensor) -> Tensor:
    """Return the tokens' shares of ||G||_F^2 of their rows, fp32 [n], with G = sum_t (p_t - e_{y_t}) h_t^T of a row.

    The share of token t is sum_s ((p_s - e_s) . (p_t - e_t)) (h_s . h_t). hidden: [n, H] before the head. Holds the
    probabilities of one row's tokens at once, [tokens of the row, vocab].
    """
    shares = torch.zeros(len(targets), device=targets.device)
    for row in row_of.unique().tolist() or [-1]:  # under ZeRO-3 every rank reads the head
        own = (row_of == row).nonzero()[:, 0]
        residual = head_losses.logits_of(own).softmax(-1)
        residual[torch.arange(len(own), device=own.device), targets[own]] -= 1.0
        states = hidden[own].float()
        shares[own] = ((residual @ residual.T) * (states @ states.T)).sum(1)
    return shares


@torch.no_grad()
def constrained_weights(
    head_losses: HeadLosses,
    targets: Tensor,
    ce_weights: Tensor,
    constraints: Sequence[Constrained],
    sorted_targets: SortedRows | None = None,
) -> Tensor:
    """Return the weights [n] of the cross-entropies times the factors of the constraints. Costs a forward of the head,
    without gradients."""
    current = -head_losses(targets, torch.ones_like(ce_weights), None, sorted_targets).ce
    factors = torch.ones_like(current)
    for one in constraints:
        rows = one["rows"]
        excess = one["betas"] * (current[rows] - one["log_probs"])
        factors[rows] *= (2.0 * torch.sigmoid(-excess)).clamp_min(one["floor"])
    return ce_weights * factors


def _arguments(distance: OutputDistance, teacher: TopKTeacher | DenseTeacher) -> dict[str, Any]:
    return dict(
        teacher=teacher,
        teacher_rows=distance["rows"],
        kd_weights=distance["kd_weights"],
        divergence=distance["divergence"],
        temperature=distance["temperature"],
    )


def _stored_teacher(distance: OutputDistance, vocab_size: int) -> TopKTeacher | None:
    if "log_probs" not in distance:
        return None
    stored = distance["log_probs"], distance["indices"], distance["log_tail"]
    return TopKTeacher(*stored, distance["temperature"], vocab_size)


def _whole_vocabulary(logits: Tensor, temperature: float) -> TopKTeacher:
    """Logits [m, vocab] as a top-k teacher that has stored every token."""
    log_probs = (logits.float() / temperature).log_softmax(-1)
    indices = torch.arange(logits.shape[-1], device=logits.device).expand_as(log_probs)
    no_tail = log_probs.new_full(log_probs.shape[:1], float("-inf"))
    return TopKTeacher(log_probs, indices, no_tail, temperature, logits.shape[-1])
