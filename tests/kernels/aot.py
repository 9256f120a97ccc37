"""Ahead-of-time compilation of Triton kernels for GPUs that are not there: registers, shared memory and spills of the cubin."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90, 100)


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes; spill_bytes counts stores and loads of registers to local memory."""

    registers: int
    shared_bytes: int
    spill_bytes: int


def compile_for(
    kernel, capability: int, signature: dict[str, str], constexprs: dict, num_warps: int = 4, divisible: tuple[str, ...] = ()
) -> Resources:
    """Compiles ``kernel`` for sm_<capability>.

    signature: argument name -> type ("*fp32", "i32", "fp32", "constexpr"), in the kernel's order. divisible: arguments known to be
    multiples of 16 (every pointer is), without which loads are scalar.
    """
    names = list(signature)
    aligned = [name for name in names if signature[name].startswith("*") or name in divisible]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    return resources(compiled.asm["cubin"], compiled.metadata.shared)


def resources(cubin: bytes, shared: int) -> Resources:
    """Reads the resource table of a cubin with the cuobjdump that Triton ships."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"\b{key}:(\d+)", text)[1]) for key in ("REG", "STACK"))
    local = int(re.search(r"\bLOCAL:(\d+)", text)[1])
    return Resources(registers, shared, stack + local)
