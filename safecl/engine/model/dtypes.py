"""The names of dtypes in a config and in safetensors files, and the bytes of tensors."""

from __future__ import annotations

import torch

CONFIG_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""The dtypes that a model can run in, by their names in a config."""

FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The dtypes that weights can have in a safetensors file, by their names there."""

DTYPES = FLOAT_DTYPES | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""All dtypes of safetensors files that safecl reads, by their names there."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """View the bytes of a contiguous 1-D tensor on the CPU."""
    return tensor.view(torch.uint8).numpy().data
