"""The config section of the model that is tuned."""

from __future__ import annotations

import datetime
from typing import Annotated, Literal

from pydantic import Field, model_validator

from safecl.config.base import Section, Text

TEMPLATE_DATE = datetime.date(2024, 7, 26)


class LoraConfig(Section):
    """Low-rank adapters through peft: only these are trained and saved."""

    r: Annotated[int, Field(ge=1)] = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale: the update is (alpha / r) B A."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the linear modules that get an adapter."""


ThinkingMode = Literal["template", "empty", "none"]


class ThinkingConfig(Section):
    """The thought that a reasoning model writes before its answer. Scores are of the answer after it."""

    open: Text | None = None
    """Text that opens a thought, such as `<think>`; by default that of the chat template or the tokenizer."""
    close: Text | None = None
    """Text that closes a thought, such as `</think>`."""
    mode: ThinkingMode = "template"
    """How an answer is opened in evaluations. template: as the chat template does. empty: after an empty thought. none:
    without a thought; a thought that the template opens is removed, and the model cannot write the marker."""

    @model_validator(mode="after")
    def _markers_come_in_pairs(self) -> ThinkingConfig:
        if (self.open is None) != (self.close is None):
            missing = "close" if self.close is None else "open"
            raise ValueError(f"`{missing}` is missing; a thought has two markers, e.g. open: <think>, close: </think>")
        return self


class ModelConfig(Section):
    """The model that is tuned: a dense decoder-only Hugging Face model."""

    path: Text
    """Folder in Hugging Face layout, a hub id, a `.gguf` file (dequantised), or the folder of an adapter, which is
    merged into its base. It is the aligned model, theta_0, unless the first task has role `align`."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; the model's own by default."""
    chat_template: str | None = None
    """Path of a Jinja chat template; the tokenizer's own by default, and a plain one where the tokenizer has none."""
    template_date: datetime.date = TEMPLATE_DATE
    """Date that the chat template writes where it asks for today's (`strftime_now`, `date_string`), in training and in
    evaluation. It is fixed, so that a run that is resumed on another day sees the same rows; the default is the one
    that Llama 3's templates have for this."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype of weights and activations in the forward pass. Master weights and optimizer state are always fp32."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel; `auto` takes flash_attention_2 where it can be imported on a GPU and the model has it, in bf16,
    else sdpa, and says which."""
    attention_check: Annotated[int, Field(ge=1)] | None = None
    """Steps between comparisons of flash attention with exact attention, in one layer at the weights as they are; sdpa
    takes its place where they differ by more than 2 %. null: at the start only."""
    lora: LoraConfig | None = None
    """Train adapters only; null trains all weights."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass (non-reentrant): less memory, about a third more compute, the same
    numbers. auto does so unless the run takes at most half of each machine's memory without."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you know that code."""
    thinking: ThinkingConfig | None = None
    """Markers of a reasoning model's thought, and how answers are opened in evaluations; null takes the markers of the
    chat template and the tokenizer."""
