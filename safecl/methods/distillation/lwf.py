"""Learning without forgetting (Li & Hoiem 2016, arXiv 1606.09282): stay near the aligned model on the task's own rows.
Needs no memory.

    form: hidden    L = CE + weight * mean over tokens of mean_j (h_j - h0_j)^2
    form: output    L = CE + weight * mean over supervised tokens of D(p0_T, p_T)

h is the last hidden state (after the final norm), h0 that of the aligned model theta_0: the form of "Unforgotten
Safety" (Alssum et al. 2025, arXiv 2512.10150), whose squared norm is hidden_size times the mean over j. p_T are the
outputs at temperature T; D is KL(p0 || p), whose gradient is that of Li & Hoiem's cross-entropy between softened
outputs. On poisoned rows, too, the student imitates the aligned model.

With LoRA the teacher is the student with its adapters off: one more forward pass per step and no bytes. Without
adapters theta_0 runs over every task row once before training, and its outputs lie in a memory-mapped file; or
(`outputs: online`) it runs in every step, its layers streamed from the node's one copy in host memory
(safecl/engine/teachers/streamed.py). Bytes of the file per token: hidden_size * 2 in bf16 (4 in fp32) for hidden
states, 6 k + 4 for outputs. 10,000 rows of 300 tokens at hidden size 4,096: 24.6 GB for all tokens, 8.2 GB if a third
is supervised, 0.39 GB for outputs with k = 64.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, model_validator

from safecl.config import MethodConfig
from safecl.methods import base


class Config(MethodConfig):
    """Learning without forgetting."""

    form: Literal["hidden", "output"] = "hidden"
    """hidden: last hidden states; output: the distribution over the vocabulary."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the distance."""
    tokens: Literal["all", "supervised"] | Annotated[int, Field(ge=1)] = "all"
    """hidden only: the tokens of a row that are compared: all; supervised, those from which a supervised token is
    predicted, which needs fewer bytes; or a number n, only those of the first n supervised tokens."""
    distance: Literal["forward_kl", "reverse_kl", "jsd", "mse"] = "forward_kl"
    """output only: the distance between distributions."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """output only: temperature of both distributions."""
    k: Annotated[int, Field(ge=1)] = 64
    """output only: recorded entries per token, 6 bytes each; the mass of the others is kept as one more event."""
    teacher: Annotated[str, Field(min_length=1)] = "aligned"
    """aligned: theta_0 in all tasks; previous: the model that the previous task produced (Li & Hoiem); ema: the average
    that the method `ema` keeps; or the folder or hub id of any model with the same tokenizer."""
    outputs: Literal["recorded", "online"] = "recorded"
    """recorded: the teacher runs over all rows before training, and its outputs are stored on disk; online: it runs in
    every step, with its weights in host memory (see the top-level key `teacher`). With LoRA the aligned model is the
    student with its adapters off, either way."""

    @model_validator(mode="after")
    def _only_a_fixed_teacher_is_recorded(self) -> Config:
        if self.outputs == "recorded" and self.teacher not in ("aligned", "previous"):
            raise ValueError(
                f"teacher: {self.teacher} needs outputs: online; only aligned and previous can be recorded"
            )
        return self

    @property
    def online_teacher(self) -> str | None:
        return self.teacher if self.outputs == "online" and self.weight > 0 else None

    @property
    def compares_hidden(self) -> bool:
        return self.form == "hidden"


class Method(base.Method[Config]):
    def task_terms(self) -> list[base.TaskTerm]:
        config = self.config
        common = base.TaskTerm(self.name, config.weight, teacher=config.teacher, online=config.outputs == "online")
        if config.form == "hidden":
            return [replace(common, divergence="hidden", tokens=config.tokens)]
        return [replace(common, divergence=config.distance, temperature=config.temperature, k=config.k)]
