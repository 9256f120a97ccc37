"""The terms that a method adds to a step: replay terms, task terms, a penalty, an average's mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Tokens = Literal["all", "supervised", "last"] | int
"""Tokens of a row whose hidden states are compared: all; those that predict a supervised token; the row's last; or a
number n, those that predict its first n supervised tokens. 1 is the prompt's last token alone, behind which the answer
begins."""

EVERY_LAYER = 2**31 - 1
"""A number of layers that stands for all that the model has."""


@dataclass(frozen=True)
class ReplayTerm:
    """A draw from the memory and its weights in the loss: ce_weight * CE + kd_weight * divergence(teacher, student).

    Both are means over the draw's supervised tokens of the whole step. Terms of one `stream` see the same rows; other
    streams draw independently.
    """

    stream: str
    ce_weight: float = 0.0
    kd_weight: float = 0.0
    divergence: str = "forward_kl"
    """forward_kl, reverse_kl, jsd, or mse over the stored entries, centred."""
    share: float | None = None
    """Tokens of the draw as a share of the task's tokens in a step; None: memory.replay_ratio."""
    mixed: bool = False
    """The rows join the task's own mean as if they were rows of the task: one mean over both, `ce_weight` is 1."""
    distances: tuple[TaskTerm, ...] = ()
    """Distances of these rows to online teachers (`online`) beside the stored outputs."""
    harmful: str | None = None
    """Draw from these harmful rows (the method's `harmful_source`) in the place of the memory, without a teacher. All
    draws from the same rows with the same share have the same rows in a step."""
    every_layer: bool = False
    """`harmful` only: the cross-entropy is the mean over those that final norm and head give behind the embedding and
    behind every layer."""
    noise_weight: float = 0.0
    """`harmful` only: weight of the distance between hidden states and Gaussian noise, see
    safecl.engine.model.features.noise_distances; a mean over rows and layers."""


@dataclass(frozen=True)
class LabelTerm:
    """Information over a few labels at the first token of each replayed answer:

        weight * (mean_i H(p_i) - H(mean_i p_i))        with `sharpen`
        weight * (- H(mean_i p_i))                      without

    p_i are the model's probabilities of the labels alone, which sum to 1, and the means are over all rows of the draw.
    mean_i p_i is computed by a forward pass of these rows before the step's own.
    """

    name: str
    stream: str
    """The draw whose rows it is about; see ReplayTerm."""
    weight: float
    labels: tuple[str, ...]
    """Texts that an answer may begin with; the first token of each counts."""
    sharpen: bool


@dataclass(frozen=True)
class TaskTerm:
    """A further loss on the task's own rows, or on those of a draw: weight * distance(teacher, student).

    It is a mean over its tokens in the whole step. With LoRA the aligned model is the student with its adapters off, in
    the same step. Else a teacher's outputs are recorded before training, row by row, in the run folder, or the teacher
    computes them in every step (`online`).
    """

    name: str
    """Name of the term in the metrics: loss/<name>."""
    weight: float
    divergence: str = "forward_kl"
    """forward_kl, reverse_kl, jsd or mse of the outputs at supervised tokens; hidden: mean squared difference of hidden
    states."""
    layers: int | tuple[int, ...] = ()
    """`hidden` only: number of layers at equal distances, or layers counted from 1, whose hidden states are compared
    side by side; empty: the last, behind the final norm."""
    tokens: Tokens = "supervised"
    """`hidden` only: which tokens of a row."""
    temperature: float = 1.0
    """Temperature of the compared distributions."""
    k: int = 64
    """Recorded entries per token; 6 bytes each."""
    teacher: str = "aligned"
    """aligned: theta_0; previous: the model that the previous task produced; ema: the average of the weights; or a
    model's folder or hub id. The last two only `online`."""
    online: bool = False
    """Compute the teacher's outputs in every step, instead of recording them before training."""
    shaped: bool = False
    """Divergences of outputs only: a token's weight is that of its cross-entropy, normaliser included and without
    `Method.token_factors`, times `weight` and `Method.distance_factors`."""
    larger: bool = False
    """`hidden` only: the target is the larger of the student's and the teacher's value, element by element, so that
    only values below the teacher's have a distance."""


@dataclass(frozen=True)
class PromptTerm:
    """Prompts of the memory's refused rows whose hidden state stays where it was:

        weight * mean over the step's prompts of mean_j (h_j - h0_j)^2

    h is the last hidden state, behind the final norm, at a prompt's last token, from which the answer's first token is
    predicted; h0 is that of the aligned model, recorded once before training. Answers are not computed.
    """

    name: str
    weight: float
    prompts: int
    """Prompts in each step."""
    pool: int
    """Prompts that the steps take in turn, chosen by the seed."""


@dataclass(frozen=True)
class Score:
    """A number per supervised token of every row of the task, computed once before training.

    `Method.row_factors` and `Method.token_factors` are functions of scores.
    """

    name: str
    text: str | None = None
    """Another answer, which takes the place of the row's own; None: the row's own."""
    of: Literal["log_prob", "gradient", "given"] = "log_prob"
    """log_prob: the token's log-probability; gradient: its share of the squared norm of the gradient of the row's loss
    with regard to the output head, summed over tokens. The shares of a row add up to the whole. given: a number that
    was computed elsewhere, for example by a guard model (safecl/planning/given_scores.py)."""
    model: str | None = None
    """Folder or hub id of the model that scores; None: the aligned model."""
    column: str = ""
    """`given` only: the row's column, or the key in `file`."""
    file: str | None = None
    """`given` only: JSONL file whose line n is about line n of the task's file; None: each row has its own score."""
    bounds: tuple[float, float] = (0.0, 1.0)
    """`given` only: the smallest and the largest score that there can be."""


@dataclass(frozen=True)
class TokenConstraint:
    """Factors of the task's tokens that fall as their probability rises above that of the aligned model:

        max(floor, 2 sigmoid(beta_t (log p0(y_t) - log p(y_t)))),      1 while both are equal

    with p at the current weights, without a gradient of its own, and beta_t by the token's place in its answer.
    """

    score: str
    """Name of the Score that holds log p0 of the row's own answer."""
    first_betas: tuple[float, ...]
    """beta of an answer's first tokens."""
    beta: float
    """beta of all later tokens."""
    floor: float = 0.0


@dataclass(frozen=True)
class Penalty:
    """0.5 * strength * sum_i F_i (p_i - a_i)^2 over the trained weights, with F from the state `fisher` divided by its
    mean, or 1 without one."""

    strength: float
    anchor: str = "anchor"
    """Kind of state that holds a, one value per weight."""
    fisher: str | None = None
    """Kind of state that holds F."""
    proximal: bool = False
    """Apply it as a proximal step after AdamW: stable for any strength times learning rate."""
    modules: tuple[str, ...] = ()
    """Patterns of parameter names (`*.self_attn.*`) that it is restricted to; all trained weights without any."""
    factors: tuple[tuple[str, float], ...] = ()
    """Factors of the strength of single weights, by name; 1 for all others."""
    product: bool = False
    """With LoRA, pull the products (alpha / r) B A to 0, which pulls the merged weights to their start, instead of the
    factors. It is then part of the loss, and clipped with it."""
    fisher_file: str | None = None
    """With `product`: file of the dense Fisher that weighs the products; without one they are pulled evenly."""
    base: str | None = None
    """With `product`: folder or hub id of the model before its alignment. The penalty is then strength times the sum of
    ||(I - C) D||_F^2 of the products D, with C = V V^T / ||V||_F and V the change of the weight by the alignment."""


@dataclass(frozen=True)
class AverageMask:
    """Another decay of the average for the elements whose Fisher information exceeds a threshold."""

    fisher: str
    """Kind of state that holds F."""
    threshold: float
    decay: float
    """Decay of the average of elements with F above the threshold."""


@dataclass(frozen=True)
class HiddenMove:
    """Hidden states that are moved in a step's forward pass: the outputs of all attention modules, by rho * g / ||g||.

    g is their gradient in a pass before it, over the same rows, and the norm is over all tokens and layers of the step.
    """

    rho: float
    layers: tuple[int, ...] | None = None
    """Decoder layers, counted from 0, whose attention outputs are moved; None: all."""
