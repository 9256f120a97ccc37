"""LDIFS (Mukhoti et al. 2024, arXiv 2308.13320): keep the features of the task's own rows. Needs no memory.

    L = CE + weight * mean over tokens of mean_j (phi_j - phi0_j)^2

phi are the hidden states of several layers side by side, phi0 those of the aligned model theta_0 at the same tokens.
`lwf` with `form: hidden` compares the last layer alone. The paper's squared norm is the mean over j times the number of
compared values; the mean makes `weight` independent of width, layers and lengths. Differences are formed in fp32, and
all layers count the same however far they drift. Padding has no term. `tokens: n` compares only where the first n
supervised tokens are predicted, beginning with the prompt's last token: the first tokens of an answer decide whether it
is a refusal (Qi et al. 2025, arXiv 2406.05946).

With LoRA the teacher is the student with its adapters off: one more forward pass. Without adapters theta_0 runs in
every step (`outputs: online`), streamed from the node's one copy in host memory, or once over every row before training
(`recorded`), which takes layers * hidden_size * 2 bytes per token on the disk in bf16.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from safecl.config import MethodConfig
from safecl.methods import base


class Config(MethodConfig):
    """LDIFS: distance of hidden states at several layers, on the task's rows."""

    compares_hidden: ClassVar[bool] = True

    weight: Annotated[float, Field(ge=0)] = 10.0
    """Factor of the distance."""
    layers: Annotated[int, Field(ge=1)] | Annotated[list[int], Field(min_length=1)] = 5
    """How many layers are compared, at equal distances and with the last; or a list of layers, counted from 1 or, if
    negative, from the end. The last layer is taken behind the final norm."""
    tokens: Literal["all", "supervised"] | Annotated[int, Field(ge=1)] = "all"
    """The tokens of a row that are compared: all; those from which a supervised token is predicted; or a number n, only
    those of the first n supervised tokens, beginning with the prompt's last token. A refusal shows in its first
    tokens."""
    teacher: Literal["aligned", "previous", "ema"] = "aligned"
    """aligned: theta_0 in all tasks; previous: the model that the previous task produced; ema: the average that the
    method `ema` keeps."""
    outputs: Literal["recorded", "online"] = "online"
    """recorded: the teacher runs over all rows before training, and its hidden states are stored on disk; online: it
    runs in every step, with its weights in host memory (see the top-level key `teacher`). With LoRA the aligned model
    is the student with its adapters off, either way."""

    @model_validator(mode="after")
    def _an_average_is_not_recorded(self) -> Config:
        if self.outputs == "recorded" and self.teacher == "ema":
            raise ValueError("teacher: ema needs outputs: online; only aligned and previous can be recorded")
        return self

    @property
    def online_teacher(self) -> str | None:
        return self.teacher if self.outputs == "online" and self.weight > 0 else None

    @property
    def compared_layers(self) -> int | tuple[int, ...]:
        return tuple(self.layers) if isinstance(self.layers, list) else self.layers


class Method(base.Method[Config]):
    def task_terms(self) -> list[base.TaskTerm]:
        config = self.config
        return [
            base.TaskTerm(
                self.name,
                config.weight,
                divergence="hidden",
                layers=config.compared_layers,
                tokens=config.tokens,
                teacher=config.teacher,
                online=config.outputs == "online",
            )
        ]
