"""Settings of merges that run rows through a model. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from safecl.merging.base import MergeConfig


class RowsConfig(MergeConfig):
    """Settings of merges that run rows through a model."""

    max_rows: Annotated[int, Field(ge=1)] = 512
    """Rows that are used, taken evenly from the file."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens of a row; longer ones are cut."""
    trust_remote_code: bool = False
    """Run the code in the tuned model's folder, which a model that transformers does not know needs."""


class ForwardConfig(RowsConfig):
    """Settings of merges that need activations only."""

    rows_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the model that the rows run through; bf16 halves its memory. The merge itself computes in fp32."""
