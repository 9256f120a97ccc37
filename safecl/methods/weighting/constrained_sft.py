"""Constrained fine-tuning of the first tokens (Qi et al. 2025, "Safety Alignment Should Be Made More Than Just a Few
Tokens Deep", arXiv 2406.05946, equation 4). Needs no memory.

    L = - mean over tokens of (2 / beta_t) log sigmoid(beta_t (log p(y_t) - log p0(y_t)))

p0 is the aligned model theta_0. The gradient is that of cross-entropy times w_t = 2 sigmoid(beta_t (log p0 - log p)),
which is 1 at the start and falls as a token becomes likelier than under theta_0: the larger beta_t, the earlier. A
large beta_t on an answer's first tokens keeps their distribution, in which most of the alignment lies; a small one
leaves the rest free. The loss is formed as cross-entropy with these weights, which are at least `floor`, as in the
authors' code; the log shows the plain cross-entropy.

log p0 of every token is computed once before training and kept in a file, 4 bytes per supervised token. A step costs
one more forward of the output head.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base

ANSWER = base.Score("answer")


class Config(MethodConfig):
    """Constrained fine-tuning: the first tokens of answers stay near the aligned model's."""

    head_forwards: ClassVar[int] = 1

    beta: Annotated[float, Field(ge=0)] = 0.1
    """beta_t of all tokens behind the first ones."""
    first_tokens: Annotated[int, Field(ge=0)] = 5
    """Tokens at the beginning of each answer that are constrained more."""
    factor: Annotated[float, Field(ge=0)] = 20.0
    """beta_t of these first tokens, as a multiple of beta."""
    factor_of_first: Annotated[float, Field(ge=0)] = 5.0
    """beta_t of the very first token, as a multiple of beta: its loss is large at the start, and a large beta_t would
    end its training at once."""
    floor: Annotated[float, Field(ge=0, le=1)] = 1e-3
    """Smallest weight of a token."""


class Method(base.Method[Config]):
    def scores(self) -> list[base.Score]:
        return [ANSWER]

    def token_constraint(self) -> base.TokenConstraint:
        config = self.config
        first = [config.beta * config.factor_of_first, *[config.beta * config.factor] * (config.first_tokens - 1)]
        return base.TokenConstraint(ANSWER.name, tuple(first[: config.first_tokens]), config.beta, config.floor)
