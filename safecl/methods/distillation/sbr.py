"""Safety bottleneck regularization (SBR, "Safety Anchor", Lu et al. 2026, arXiv 2605.05995): keep the hidden state that
the answer to a refused prompt begins with.

    L = CE + weight * mean over the step's prompts of mean_j (h_j - h0_j)^2

h is the last hidden state (behind the final norm) at the last token of a prompt, chat template included; h0 is that of
the aligned model theta_0, recorded once before training. The prompts are those of the memory's refused rows, without
their answers.

The mean over j is that of the authors' code, whose lambda of 50 is the `weight` here; a factor of the squared norm
||h - h0||^2 itself is weight / hidden_size. The paper keeps the same 1 to 8 prompts in all steps (`pool: 8`); here the
steps take the prompts of a pool in turn, 4 bytes * hidden_size each, so that the refusal of more kinds of requests is
kept at the cost of the same `prompts` a step.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base


class Config(MethodConfig):
    """SBR: the hidden state behind the memory's refused prompts stays."""

    needs_memory: ClassVar[bool] = True

    weight: Annotated[float, Field(ge=0)] = 50.0
    """Factor of the distance."""
    prompts: Annotated[int, Field(ge=1)] = 8
    """Prompts in each step."""
    pool: Annotated[int, Field(ge=1)] = 256
    """Prompts that the steps take in turn; as many as `prompts`: the same in all steps, as in the paper."""


class Method(base.Method[Config]):
    def prompt_terms(self) -> list[base.PromptTerm]:
        config = self.config
        return [base.PromptTerm(self.name, config.weight, config.prompts, max(config.prompts, config.pool))]
